"""The verdict on each number that the paper prints, and on our own goals: results/claims.yaml, evaluated.

In: what was measured, as `Cell`s, and the paper's numbers. Out: `Claim`s, cell by cell, those of a GPU first.
Only ratios and differences are judged: the paper's absolute milliseconds lie below the bandwidth floor of any
GPU that it can have used. Next: tables.py, page.py; rules.py has the rules.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, reduce
from itertools import pairwise, product
from operator import getitem
from typing import Any, NamedTuple

import numpy as np
import pandas as pd

from adafuse.report import formats, rules
from adafuse.report.measurements import OF_HOSTS, CellName, Measured, RowName
from adafuse.report.rules import NOT_TESTABLE, Difference, Number, Verdict

Json = dict[str, Any]
# quantities that are paired differences of accuracies, and what stands beside each
DIFFERENCES, TEST = ("minus", "rest", "later"), ("minus90", "p", "spread")


@dataclass(eq=False)
class Cell:
    """One cell of one experiment: its settings, and by row what was measured and what that is called."""

    name: CellName
    facts: Json
    found: dict[str, dict[str, Number]] = field(default_factory=lambda: defaultdict(dict))
    named: dict[str, RowName] = field(default_factory=dict)

    @cached_property
    def key(self) -> tuple[str, frozenset[str]]:
        """Its name and every record behind it: two cells that share both are one, of two experiments."""
        every = (one.records for own in self.found.values() for one in own.values())
        return self.name.cell, frozenset(record for records in every for record in records)

    def row(self, row: str) -> RowName:
        """What a row is called, and what it is."""
        return self.named.get(row) or RowName(self.name.experiment, self.name.cell, row, row)

    def number(self, row: str, quantity: str) -> Number:
        """A number, or why there is none; a paired difference of accuracies with its test."""
        one = self.found.get(row, {}).get(quantity, Number())
        if quantity.partition(".")[0] not in DIFFERENCES or not one:
            return one
        test, p, spread = (self.number(row, f"{name}.{quantity.removeprefix('minus.')}") for name in TEST)
        return Difference(**vars(one), low90=test.low, high90=test.high, p=p.value, spread=spread.value)

    def resolved(self, row: str, ratio: Number) -> bool:
        """Whether a ratio is further from 1 than the A/A arm of its runtime may be, if there is one."""
        resolution = self.number(self.row(row).runtime, "resolution")
        return not resolution or abs(math.log(ratio.value)) > math.log1p(resolution.value)


class At(NamedTuple):
    """Where a number stands."""

    cell: Cell
    row: str
    number: Number


@dataclass(frozen=True)
class Claim:
    """A number of the `paper` beside ours; or a bound of our own: `kind` is goal, `where` a machine.

    `cell` and `row` say where our number stands; no cell where no experiment answers it.
    """

    id: str
    kind: str
    where: str
    text: str
    printed: str
    ours: Number | str
    verdict: Verdict
    cell: Cell | None = None
    row: str = ""
    records: tuple[str, ...] = ()
    paper: float = math.nan


def cells(measured: Measured, runs: pd.DataFrame) -> list[Cell]:
    """Every cell; `runs` has a row a record (`Frames.runs`), or none where no settings are asked for."""
    every = {(name.experiment, name.cell): Cell(name, {}) for name in measured.cells}
    for row in measured.rows:
        every[row.experiment, row.cell].named[row.row] = row
        every[row.experiment, row.cell].found[row.row] = {}
    for one in list[Any](measured.values.itertuples(index=False)):
        if cell := every.get((one.experiment, one.cell)):
            n, hosts = (0 if pd.isna(count) else count for count in (one.n, one.hosts))
            more = {name: getattr(one, name) for name in ("withdrawn", *OF_HOSTS)} | {"hosts": hosts}
            number = Number(one.value, one.low, one.high, n, one.reason, tuple(one.records.split()), **more)
            cell.found[one.row][one.quantity] = number
    known = frozenset(runs.index)
    for cell in every.values():
        own = sorted(cell.key[1] & known)
        timed = [record for record in own if runs.at[record, "task"] != "memory"]
        # a timed one, if there is one
        cell.facts = dict(runs.loc[(timed or own)[0]]) if own else {}
    return list(every.values())


def of(every: list[Cell], experiments: Iterable[str]) -> list[Cell]:
    """The cells of these experiments (or "all"), a GPU's first; of those that share all records one."""
    names = [cell.name.experiment for cell in every] if experiments == "all" else experiments
    order = {name: place for place, name in enumerate(dict.fromkeys(names))}
    own = [cell for cell in every if cell.name.experiment in order]
    own.sort(key=lambda cell: (cell.name.is_cpu, order[cell.name.experiment]))
    return list({cell.key: cell for cell in reversed(own)}.values())[::-1]


def agrees(facts: Json, where: Json) -> bool:
    """Whether a cell has these settings; of a shape its sizes."""
    return all(
        agrees(facts.get(name) or {}, wanted) if isinstance(wanted, dict) else facts.get(name) == wanted
        for name, wanted in where.items()
    )


def all_claims(every: list[Cell], spec: Json, paper: Json) -> list[Claim]:
    """Every claim on every cell that can speak about it; without one, which experiment it lacks."""
    found, machines = list[Claim](), {"": set[str]()}
    # by arm or method
    rows = {name: table["rows"] for name, table in paper.items() if "rows" in table}
    paper = paper | {
        name: {one.get("arm", one.get("method")): one for one in own} for name, own in rows.items()
    }
    for group in spec["groups"]:
        rows, least, others = group.get("rows", []), group.get("least", 0), machines[group.get("unless", "")]
        own = [cell for cell in of(every, group["experiments"]) if cell.name.machine not in others]
        own = [cell for cell in own if sum(row in cell.found for row in rows) >= least]
        machines[group["name"]] = {cell.name.machine for cell in own}
        wanted = [one for claim in group["claims"] for one in _expanded(claim, group.get("set", {}))]
        for cell, claim in product(own, wanted):
            found += _on_cell(cell, {"printed": spec["printed"].get(claim["rule"])} | claim, paper)
        if not own and "unless" not in group:
            verdict = Verdict(NOT_TESTABLE, f"not run in this profile: experiment={group['experiments'][0]}")
            found.append(Claim(group["name"], "", group["where"], group["about"], "see there", "", verdict))
    return _in_families(found)


def _in_families(found: list[Claim]) -> list[Claim]:
    """The claims of accuracy of one machine are judged together as well."""
    families = defaultdict[str, list[int]](list)
    for place, claim in enumerate(found):
        sound = claim.verdict.verdict not in (rules.WITHDRAWN, NOT_TESTABLE)
        if claim.cell and sound and isinstance(claim.ours, rules.Difference):
            families[claim.cell.name.machine].append(place)
    for places in families.values():
        told = [(found[at].ours, found[at].verdict) for at in places]
        for at, verdict in zip(places, rules.judge_family(told), strict=True):  # type: ignore[arg-type]
            found[at] = replace(found[at], verdict=verdict)
    return found


def all_goals(every: list[Cell], spec: Json) -> list[Claim]:
    """Every goal on every GPU that has records of its experiments."""
    machines: dict[str, list[Cell]] = defaultdict(list)
    for cell in of(every, [name for goal in spec["goals"] for name in goal["experiments"]]):
        if not cell.name.is_cpu:
            machines[f"{cell.name.machine} · {cell.facts.get('cpu')}"].append(cell)
    return [
        _goal(machine, own, goal)
        for machine, own in sorted(machines.items())
        for goal in spec["goals"]
        if goal.get("card") in (None, own[0].name.machine)
    ]


def _expanded(claim: Json, words: Json) -> Iterator[Json]:
    """A claim for each value of `for`, in the place of {row} in all its texts."""
    for row in claim.get("for", [""]):
        text = json.dumps(claim)
        for name, word in {"{row}": row, **words}.items():
            text = text.replace(name, str(word))
        yield json.loads(text)


def _on_cell(cell: Cell, spec: Json, paper: Json) -> list[Claim]:
    ours = spec["ours"]
    if "order" in ours:
        return [_order(cell, spec)]
    if "fastest" in ours:
        times = {row: cell.number(row, "ms_per_token") for row in ours["fastest"]}
        fastest = min(times, key=lambda row: times[row].value if times[row] else math.inf)
        absent = [cell.row(row).label for row in times if not times[row]] if times[fastest] else []
        more = f"; not among them, for want of a time: {', '.join(absent)}" if absent else ""
        return [_compared(cell, spec, paper, fastest, more)]
    rows = [row for row, own in cell.found.items() if ours["quantity"] in own]
    return [_compared(cell, spec, paper, row) for row in ([ours["row"]] if "row" in ours else rows)]


def _compared(cell: Cell, spec: Json, paper: Json, row: str, more: str = "") -> Claim:
    """One number of ours against one of the paper's; `more` is added to the reason."""
    ours, rule, kind = spec["ours"], spec["rule"], spec["kind"]
    number, value = cell.number(row, ours["quantity"]), math.nan
    if "over" in ours:
        number = _multiple(number, cell.number(ours["over"], ours["quantity"]), ours["method"])
    if "paper" in spec:
        at: Any = paper
        # a list goes by its mean
        first, *rest = (float(np.mean(reduce(getitem, path.split("."), at))) for path in spec["paper"])
        value = first - sum(rest) if rule == "difference" else first / math.prod(rest)
    words = {"label": cell.row(row).label, "other": cell.row(ours.get("other", "")).label, "paper": value}
    words = paper | words | {"more": formats.percent_text(value), "ours": formats.digits(number.value)}
    if rule == "never":
        verdict = Verdict(NOT_TESTABLE, spec["why"].format(**words))
        return _claim(cell, spec, words, row, spec["shown"].format(**words) if number else "", verdict)
    if rule == "difference":
        verdict = rules.judge_difference(number)
    elif rule == "count":
        verdict = rules.judge_cost(value, number, cell.number(ours["over"], "params"))
    else:
        seen = not number or kind != "time" or cell.resolved(row, number)
        close = rules.CLOSE_MEMORY if kind == "memory" else rules.CLOSE
        verdict, *before = (
            rules.judge_ratio(value, number, one, seen, close) for one in (rule, *spec.get("before", []))
        )
        others = [one.verdict for one in before if one.verdict != verdict.verdict]
        verdict = replace(verdict, before=", ".join(others))
    return _claim(cell, spec, words, row, number, replace(verdict, why=verdict.why + more))


def _order(cell: Cell, spec: Json) -> Claim:
    """Rows, each slower than the next."""
    rows, steps = spec["ours"]["order"], []
    for slow, fast in pairwise(rows):
        found = cell.number(slow, "ratio" if fast == "base" else f"over.{fast}")
        times = [cell.number(row, "ms_per_token") for row in (slow, fast)]
        reason = next((time.reason for time in times if not time), times[0].reason)
        slower = found.low > 1 and cell.resolved(slow, found) if found else None
        if found:
            # beyond interval and A/A arm, or neither
            reason = "" if found.high < 1 and cell.resolved(slow, found) else "not told apart"
        steps.append((f"{cell.row(slow).label} > {cell.row(fast).label}", slower, reason))
    held = f"{sum(bool(slower) for _, slower, _ in steps)} of {len(steps)} steps"
    words = {"labels": " > ".join(cell.row(row).label for row in rows), "steps": len(steps)}
    return _claim(cell, spec, words, rows[-2], held, rules.judge_order(steps))


def _claim(cell: Cell, spec: Json, words: Json, row: str, ours: Number | str, verdict: Verdict) -> Claim:
    """With the records of all rows that it is about."""
    text, printed, about = spec["text"].format(**words), spec["printed"].format(**words), spec["ours"]
    quantity, rows = about.get("quantity", "ms_per_token"), about.get("order", [row, about.get("over", row)])
    numbers = [cell.number(own, quantity) for own in rows]
    records = tuple(dict.fromkeys(record for number in numbers for record in number.records))
    if why := max(number.withdrawn for number in numbers):
        verdict = Verdict(rules.WITHDRAWN, f"{why}: not to be relied on until it is measured anew")
    if cell.name.is_cpu and spec["rule"] != "never":
        verdict = rules.on_cpu(verdict, spec["kind"] in ("time", "memory"), str(cell.facts.get("model")))
    head, paper = (spec["id"], spec["kind"], spec["where"]), words.get("paper", math.nan)
    return Claim(*head, text, printed, ours, verdict, cell, row, records, paper)


def _multiple(own: Number, base: Number, how: str) -> Number:
    """A quantity over the backbone's: counted, or of two processes whose peaks do not vary."""
    if not own or not base:
        return Number(reason=f"of the backbone, {base.reason}" if own else own.reason)
    ratio = own.value / base.value
    return Number(ratio, ratio, ratio, 1, how)


def _goal(machine: str, cells: list[Cell], spec: Json) -> Claim:
    """The least or the most of some rows; those `beside` them are shown and do not count."""
    unit, bound, beside = spec.get("unit", ""), spec["bound"], spec.get("beside", [])
    own = [cell for cell in cells if cell.name.experiment in spec["experiments"]]
    found = _candidates([cell for cell in own if agrees(cell.facts, spec["where"])], spec)
    counted = [at for at in found if at.row not in beside]
    lacking = [at for at in counted if not at.number] if "of" in spec else []
    known = [at for at in counted if at.number and not lacking]
    choose = min if spec["pick"] == "least" else max
    best = choose(known, key=lambda at: at.number.value, default=None)
    ours = best.number if best else Number()
    verdict = rules.judge_goal(bound, ours, spec["sense"], unit, failed=bool(lacking))
    shown, by_row = lacking[0] if lacking else best, {at.row: at for at in found}
    why = formats.rendered("goal", spec=spec, shown=shown, count=len(counted), found=by_row)
    sign, printed = "≤" if spec["sense"] == "at_most" else "≥", formats.with_unit(Number(bound), unit)
    head = spec["id"], "goal", machine, spec["text"], f"{sign} {printed}"
    cell, row, text = best.cell if best else None, best.row if best else "", formats.with_unit(ours, unit)
    return Claim(*head, text if unit else ours, replace(verdict, why=why), cell, row, ours.records, bound)


def _candidates(cells: list[Cell], spec: Json) -> list[At]:
    """Every row that is what `of` says; or each of `rows` and `beside` where most processes are."""

    def weight(at: At) -> tuple[int, float]:
        rounds = at.cell.number(at.cell.row(at.row).runtime, "rounds")
        return (at.number.n, rounds.value if rounds else 0.0) if at.number else (0, 0.0)

    held = [(cell, row) for cell in cells for row, own in cell.found.items() if own]
    every = [At(cell, row, cell.number(row, spec["quantity"])) for cell, row in held]
    if "of" in spec:
        return [at for at in every if spec["of"].items() <= asdict(at.cell.row(at.row)).items()]
    by_row = [[at for at in every if at.row == row] for row in [*spec["rows"], *spec.get("beside", [])]]
    return [max(own, key=weight) for own in by_row if own]
