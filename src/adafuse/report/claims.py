"""The verdict on each number that the paper prints, and on our own goals: results/claims.yaml, evaluated.

In: a `Board` and the paper's numbers. Out: `Claim`s, cell by cell, those of a GPU first. Only ratios and differences
are judged: the paper's absolute milliseconds lie below the bandwidth floor of every GPU that it can have used. Next:
tables.py, page.py; rules.py has the rules.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np

from adafuse.report import formats, rules
from adafuse.report.board import Board, Place
from adafuse.report.rules import NOT_TESTABLE, Difference, Number, Verdict

Json = dict[str, Any]
At = tuple[Place, str]
SIGNS = {"about": "", "count": "", "at_most": "≤ ", "at_least": "≥ "}


@dataclass(frozen=True)
class Claim:
    """A printed number beside ours, or a bound of our own (`kind` is then goal, and `where` a machine). `place` and
    `row` say where our number stands; no place where no experiment answers it. `paper` is the printed number.
    """

    id: str
    kind: str
    where: str
    text: str
    printed: str
    ours: Number | str | None
    verdict: Verdict
    place: Place | None = None
    row: str = ""
    records: tuple[str, ...] = ()
    paper: float = math.nan


def all_claims(board: Board, spec: Json, paper: Json) -> list[Claim]:
    """Every claim on every cell that can speak about it; a group without such a cell says which experiment it lacks."""
    found: list[Claim] = []
    machines: dict[str, set[str]] = {}
    for group in spec["groups"]:
        known = {place: set(board.rows(place)) for place in board.places(group["experiments"])}
        wanted = [one for claim in group["claims"] for one in _expanded(claim, group.get("set", {}))]
        own = [
            place
            for place, rows in known.items()
            if len(rows & set(group.get("rows", []))) >= group.get("least", 0)
        ]
        own = [
            place
            for place in own
            if board.name(place).machine not in machines.get(group.get("unless", ""), set())
        ]
        machines[group["name"]] = {board.name(place).machine for place in own}
        found += [claim for place in own for one in wanted for claim in _on_cell(board, place, one, paper)]
        if not own and "unless" not in group:
            verdict = Verdict(NOT_TESTABLE, f"not run in this profile: experiment={group['experiments'][0]}")
            found.append(Claim(group["name"], "", group["where"], group["about"], "see there", None, verdict))
    return found


def all_goals(board: Board, spec: Json) -> list[Claim]:
    """Every goal on every GPU that has records of its experiments."""
    names = dict.fromkeys(name for goal in spec["goals"] for name in goal["experiments"])
    machines: dict[str, list[Place]] = {}
    for place in board.places(names):
        if not board.name(place).is_cpu:
            machines.setdefault(f"{board.name(place).machine} · {board.facts(place).get('cpu')}", []).append(
                place
            )
    return [
        _goal(board, machine, places, goal)
        for machine, places in sorted(machines.items())
        for goal in spec["goals"]
        if goal.get("card") in (None, board.name(places[0]).machine)
    ]


def printed_row(paper: Json, table: str, row: str) -> Json:
    """The row of one arm or method in one of the paper's tables; empty if it has none."""
    return next((one for one in paper[table]["rows"] if row in (one.get("arm"), one.get("method"))), {})


def agrees(facts: Json, where: Json) -> bool:
    """Whether a cell has these settings; of a shape the sizes count, as a name may be kept while one is overridden."""
    return all(
        all((facts.get(name) or {}).get(key) == size for key, size in wanted.items())
        if isinstance(wanted, dict)
        else facts.get(name) == wanted
        for name, wanted in where.items()
    )


def _expanded(claim: Json, words: Json) -> Iterator[Json]:
    """A claim for each value of `for`, in the place of {row} in all its texts."""
    for row in claim.get("for", [""]):
        yield {name: _filled(value, {"{row}": row, **words}) for name, value in claim.items()}


def _filled(value: Any, words: Json) -> Any:
    if isinstance(value, dict):
        return {name: _filled(own, words) for name, own in value.items()}
    if isinstance(value, list):
        return [_filled(own, words) for own in value]
    for name, word in words.items() if isinstance(value, str) else ():
        value = value.replace(name, str(word))
    return value


def _value(paper: Json, how: Json) -> float:
    """A number of the paper: `of` a path, as a multiple of `over`, or less `minus`; a list goes by its mean."""
    numbers = {}
    for name, path in how.items():
        head, *rest = path.split(".")
        at: Any = printed_row(paper, head, rest.pop(0)) if "rows" in paper[head] else paper[head]
        for part in rest:
            at = at[part]
        numbers[name] = float(np.mean(at))
    return numbers["of"] / numbers.get("over", 1.0) - numbers.get("minus", 0.0)


def _on_cell(board: Board, place: Place, spec: Json, paper: Json) -> list[Claim]:
    ours = spec["ours"]
    if "order" in ours:
        return [_order(board, place, spec)]
    if "fastest" in ours:
        times = {
            row: ms for row in ours["fastest"] if (ms := board.value(place, row, "ms_per_token")) is not None
        }
        fastest = min(times, key=lambda row: times[row], default=ours["fastest"][0])
        absent = [board.row(place, row).label for row in ours["fastest"] if row not in times]
        more = f"; not among them, for want of a time: {', '.join(absent)}" if times and absent else ""
        return [_compared(board, place, spec, paper, fastest, more)]
    rows = [row for row in board.rows(place) if ours["quantity"] in board.of_row(place, row)]
    return [_compared(board, place, spec, paper, row) for row in ([ours["row"]] if "row" in ours else rows)]


def _compared(board: Board, place: Place, spec: Json, paper: Json, row: str, more: str = "") -> Claim:
    """One number of ours against one of the paper's; `more` is added to the reason."""
    ours, kind, rule = spec["ours"], spec["kind"], spec["rule"]
    value = _value(paper, spec["paper"]) if "paper" in spec else math.nan
    own = board.number(place, row, ours["quantity"])
    number = _multiple(board, place, row, ours) if "over" in ours else own
    verdict = _verdict(board, place, spec, value, number, row)
    labels = {
        name: board.row(place, own).label for name, own in (("label", row), ("other", ours.get("other", "")))
    }
    printed = printed_row(paper, *spec["printed"])["label"] if "printed" in spec else ""
    verdict = Verdict(verdict.verdict, verdict.why + more, verdict.word)
    if rule == "never":
        shown = f"{labels['label'].lower()} {formats.digits(own.value)} ms" if own else None
        told = ", ".join(f"{one['label']} {one[ours['quantity']]}" for one in paper[spec["list"]]["rows"])
        verdict = Verdict(NOT_TESTABLE, spec["why"].format(**paper))
        return _claim(board, place, spec, row, spec["text"], told, shown, verdict)
    text = spec["text"].format(**labels, printed=printed, paper=value)
    verdict = _on_device(board, place, kind, verdict)
    return _claim(board, place, spec, row, text, _printed_text(rule, value), number, verdict, value)


def _claim(
    board: Board,
    place: Place,
    spec: Json,
    row: str,
    text: str,
    printed: str,
    ours: Number | str | None,
    verdict: Verdict,
    paper: float = math.nan,
) -> Claim:
    rows = spec["ours"].get("order", [row, spec["ours"].get("over", row)])
    records = board.records(place, rows, [spec["ours"].get("quantity", "ms_per_token")])
    head = spec["id"], spec["kind"], spec["where"]
    return Claim(*head, text, printed, ours, verdict, place, row, records, paper)


def _verdict(board: Board, place: Place, spec: Json, value: float, ours: Number | None, row: str) -> Verdict:
    rule, over, quantity = spec["rule"], spec["ours"].get("over"), spec["ours"]["quantity"]
    reason = board.reason(place, row, quantity)
    if over and board.value(place, row, quantity) is not None:
        reason = f"of the backbone, {board.reason(place, over, quantity)}"
    if rule == "difference":
        return rules.judge_difference(ours if isinstance(ours, Difference) else None, reason)
    if rule == "count":
        return rules.judge_cost(value, ours, board.value(place, over, "params"), reason)
    if rule == "above_one":
        return rules.judge_above_one(ours) if ours else Verdict(NOT_TESTABLE, reason)
    if rule == "never":
        return Verdict(NOT_TESTABLE, "")
    resolved = ours is None or spec["kind"] != "time" or board.resolved(place, row, ours.value)
    close = rules.CLOSE_MEMORY if spec["kind"] == "memory" else rules.CLOSE
    return rules.judge_ratio(value, ours, rule, resolved, reason, close)


def _multiple(board: Board, place: Place, row: str, ours: Json) -> Number | None:
    """A quantity over another row's: counted, or of two processes whose peaks do not vary, so without an interval."""
    own, base = (board.value(place, name, ours["quantity"]) for name in (row, ours["over"]))
    if not own or not base:
        return None
    return Number(own / base, own / base, own / base, 1, ours["method"])


def _order(board: Board, place: Place, spec: Json) -> Claim:
    rows = spec["ours"]["order"]
    steps = [_step(board, place, slow, fast) for slow, fast in pairwise(rows)]
    verdict = _on_device(board, place, spec["kind"], rules.judge_order(steps))
    text = spec["text"].format(labels=" > ".join(board.row(place, row).label for row in rows))
    held = f"{sum(bool(step[2]) for step in steps)} of {len(steps)} steps"
    return _claim(board, place, spec, rows[-2], text, f"{len(steps)} of {len(steps)} steps", held, verdict)


def _step(board: Board, place: Place, slow: str, fast: str) -> tuple[str, str, bool | None, str]:
    labels = board.row(place, slow).label, board.row(place, fast).label
    found = board.number(place, slow, "ratio" if fast == "base" else f"over.{fast}")
    if found:
        return *labels, found.low > 1 and board.resolved(place, slow, found.value), ""
    absent = next((row for row in (slow, fast) if board.value(place, row, "ms_per_token") is None), slow)
    return *labels, None, board.reason(place, absent, "ms_per_token")


def _on_device(board: Board, place: Place, kind: str, found: Verdict) -> Verdict:
    model = str(board.facts(place).get("model"))
    return rules.on_device(found, kind in ("time", "memory"), board.name(place).is_cpu, model)


def _printed_text(rule: str, value: float) -> str:
    if rule not in SIGNS:
        return f"{value:+.2f} points" if rule == "difference" else "> 1"
    shown = f"{value:.4f}" if rule == "count" else f"{value:.2f}"
    return f"{SIGNS[rule]}{shown} ({formats.percent_text(value)})"


def _goal(board: Board, machine: str, places: list[Place], spec: Json) -> Claim:
    """The least or the most of some rows; those `beside` them are shown and do not count."""
    own = [place for place in places if place.experiment in spec["experiments"]]
    own = [place for place in own if agrees(board.facts(place), spec["where"])]
    beside, bound, quantity = spec.get("beside", []), spec["bound"], spec["quantity"]
    found = (
        _all_rows(board, own, spec["of"])
        if "of" in spec
        else _best_cells(board, own, [*spec["rows"], *beside], quantity)
    )
    numbers = {at: board.number(*at, quantity) for at in found if at[1] not in beside}
    known = {at: number for at, number in numbers.items() if number}
    failed = "of" in spec and len(known) < len(numbers)
    choose = min if spec["pick"] == "least" else max
    best = None if failed else choose(known, key=lambda at: known[at].value, default=None)
    ours = known[best] if best else None
    judged = rules.judge_goal(bound, ours, spec["sense"], spec.get("unit", ""), failed)
    places_of = {row: place for place, row in found}
    measured = _lines_text(board, numbers, best) if "of" in spec else _rows_text(board, places_of, spec)
    return Claim(
        id=spec["id"],
        kind="goal",
        where=machine,
        text=spec["text"],
        printed=SIGNS[spec["sense"]] + _goal_text(spec, Number(bound)),
        ours=_goal_text(spec, ours) if ours and (spec.get("unit") or math.isnan(ours.low)) else ours,
        verdict=Verdict(judged.verdict, measured, judged.word),
        place=best[0] if best else None,
        row=best[1] if best else "",
        records=board.records(best[0], [best[1]], [quantity]) if best else (),
        paper=bound,
    )


def _all_rows(board: Board, places: list[Place], of: Json) -> list[At]:
    """Every row of these cells that is what `of` says."""
    every = [(place, row) for place in places for row in board.rows(place)]
    return [at for at in every if all(getattr(board.row(*at), name) == value for name, value in of.items())]


def _best_cells(board: Board, places: list[Place], rows: list[str], quantity: str) -> list[At]:
    """Each row in the cell behind which most processes, then rounds, stand; without a number only if none has one."""

    def weight(at: At) -> tuple[int, float]:
        number, runtime = board.number(*at, quantity), board.row(*at).runtime
        return (number.n, board.value(at[0], runtime, "rounds") or 0.0) if number else (0, 0.0)

    held = [[(place, row) for place in places if board.of_row(place, row)] for row in rows]
    return [max(own, key=weight) for own in held if own]


def _rows_text(board: Board, places: dict[str, Place], spec: Json) -> str:
    """Each row and what it has, or why it has none."""
    said = []
    for row in [*spec["rows"], *spec.get("beside", [])]:
        number = board.number(places[row], row, spec["quantity"]) if row in places else None
        if number is None:
            said.append(
                f"{row}: {board.reason(places[row], row, 'ms_per_token') if row in places else 'not run'}"
            )
            continue
        gemv = board.number(places[row], row, "gemv_ratio") if spec["quantity"] == "ratio" else None
        beside = f" (to the backbone through our GEMV: {formats.ratio_text(gemv)})" if gemv else ""
        thin = f", {number.method}" if number.n == 1 and number.method else ""
        said.append(f"{row}: {_goal_text(spec, number)}{beside}{thin}")
    return "; ".join(said)


def _lines_text(board: Board, numbers: dict[At, Number | None], best: At | None) -> str:
    """The worst of all lines, or the first that has no time."""
    failed = next((at for at, number in numbers.items() if number is None), None)
    shown = failed or best
    if shown is None:
        return "not run"
    where = f"{board.facts(shown[0]).get('model')}, {shown[1]}"
    worst = f", the worst of {len(numbers)} lines" if len(numbers) > 1 else ""
    return f"{where}: {board.reason(*failed, 'ms')}" if failed else where + worst


def _goal_text(spec: Json, number: Number) -> str:
    unit = spec.get("unit", "")
    if unit == "%":
        return formats.plain("tenths", number.value)
    return (
        formats.ratio_text(number)
        if number.low < number.high and not unit
        else f"{formats.digits(number.value)} {unit}".strip()
    )
