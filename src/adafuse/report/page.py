"""The report as text: one self-contained HTML page, docs/results.md and the README's block, all by templates.

In: a `Report` and the specifications in results/. Out: a `Page`, and its files. Next: scripts/report.py.

At most six sentences answer the reader who must decide. Each has a predicate over the measurements and a text
for either outcome; it is said of the first cell that has all its numbers, and left out where none has. None stands on
what is withdrawn: a last one says how much that is.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import pandas as pd

from adafuse.files import put
from adafuse.report import Report, claims, figures, formats, measurements, rules, specification, tables
from adafuse.report.claims import Cell, Claim, Json, agrees, of
from adafuse.report.formats import environment, rendered
from adafuse.report.rules import WITHDRAWN, Difference, Number

# what the README's block may hold of its 15 KB
BLOCK_BYTES = 7_200
# where a claim's number stands on the page, by kind
SHOWN_IN = {"time": ("table6", "table1", "layers"), "memory": ("table5",), "count": ("table1",)}
SHOWN_IN |= {"accuracy": ("table2", "table3", "table4"), "goal": ("attribution", "kernels")}


@dataclass(frozen=True)
class Page:
    """What a report says; `tables` are those of tables.yaml with their sections."""

    report: Report
    claims: list[Claim]
    goals: list[Claim]
    sentences: list[str]
    tables: list[Json]


def page(report: Report) -> Page:
    """What is told of a report."""
    spec, shown = specification("claims"), specification("tables")
    cells = claims.cells(report.measured, report.frames.runs)
    judged, goals = claims.all_claims(cells, spec, report.paper), claims.all_goals(cells, spec)
    said = [text for one in spec["sentences"] if (text := sentence(cells, one, judged))]
    runs = report.frames.runs[report.frames.runs["task"] == "evaluate"]
    # how much is withdrawn, and why: a sentence for each reason
    every = {why: count for why, count in runs["withdrawn"].value_counts(sort=False).items() if why}
    gone = sum(claim.verdict.verdict == WITHDRAWN for claim in judged)
    said += [
        rendered("withdrawn", why=why, count=count, of=len(runs), verdicts=gone)
        for why, count in every.items()
    ]
    return Page(report, judged, goals, said, tables.all_tables(cells, shown, report.paper))


def write(found: Page, out: Path) -> list[figures.Planned]:
    """What is published: the page, figures, and numbers and verdicts for programs; returns the figures."""
    drawn = figures.draw(found.report, out / "figures")
    measurements.write(found.report.measurements, out / "measurements.csv.gz")
    rows = []
    for one in [*found.claims, *found.goals]:
        number = one.ours if isinstance(one.ours, Number) else Number()
        ends = {
            name: getattr(number, name) for name in ("value", "low", "high", "predict_low", "predict_high")
        }
        ends |= {"hosts": number.hosts or None}
        own = {"cell": one.cell and one.cell.name.cell, "records": " ".join(one.records)}
        rows.append(vars(one) | vars(one.verdict) | own | {"ours": formats.ours_text(one.ours)} | ends)
    verdicts = pd.DataFrame(rows)
    put(out / "claims.csv", verdicts.to_csv(index=False, float_format="%.6g", lineterminator="\n"))
    put(out / "report.html", html(found, drawn, out / "figures"))
    return drawn


def write_tables(found: Page, out: Path) -> None:
    """Every table as Markdown."""
    for table in found.tables:
        put(out / f"{table['name']}.md", rendered("table.md", table=table))


def html(found: Page, drawn: list[figures.Planned], folder: Path) -> str:
    """The whole page, which loads nothing, with the SVG of `folder`; a claim leads to its number and its check."""
    pictures = [(own, "<svg" + (folder / own.file).read_text().partition("<svg")[2]) for own in drawn]
    ids: dict[Any, str] = {}
    for table in found.tables:
        at = (line.at for section in table["sections"] for line in section.lines)
        ids |= {(table["name"], one): f"{table['name']}-{number}" for number, one in enumerate(at)}
    links: dict[Claim, dict[str, str]] = {}
    for claim in [*found.claims, *found.goals]:
        line = (*claim.cell.key, claim.row) if claim.cell else ()
        wanted = {"measurement": SHOWN_IN.get(claim.kind, ()), "check": ("checks",)}
        every = {
            word: [ids[name, line] for name in names if (name, line) in ids] for word, names in wanted.items()
        }
        links[claim] = {word: own[0] for word, own in every.items() if own}
    runs = found.report.frames.runs.fillna({"driver": "", "commit": "unknown", "dirty": False})
    facts = found.report.measurements.query("cell == ''").set_index(["row", "quantity"])
    own = {"values": facts["value"].to_dict(), "reasons": facts["reason"].to_dict(), "runs": runs}
    own |= {"ids": ids, "links": links, "targets": {id for own in links.values() for id in own.values()}}
    return rendered("report.html", page=found, pictures=pictures, **own)


def readme_block(found: Page) -> str:
    """What stands between the README's markers: the sentences, and the claims of the headline cell."""
    first = next((claim.cell for claim in found.claims if claim.cell), None)
    block = rendered("readme.md", page=found, cell=first)
    assert len(block.encode()) <= BLOCK_BYTES, f"the README's block has {len(block.encode())} bytes"
    return block


def sentence(cells: list[Cell], spec: Json, judged: list[Claim]) -> str:
    """What is said of the first cell that has all numbers; nothing if none has."""
    evaluated, own = environment().compile_expression, of(cells, spec["experiments"])
    own = [cell for cell in own if not cell.name.is_cpu or spec.get("only") != "gpu"]
    for cell in sorted(own, key=lambda cell: not agrees(cell.facts, spec.get("prefer", {}))):
        told = [one for one in judged if one.cell and one.ours and one.verdict.verdict != WITHDRAWN]
        words: Json = {"claim": {claim.id: claim for claim in told if claim.cell is cell}}
        words |= {"elsewhere": partial(_elsewhere, told)}
        words |= {"number": partial(_number, cell), "best": partial(_best, cell)}
        words |= {"first": partial(_first, cells)}
        words |= {"spared": partial(_spared, cell), "studies": partial(_studies, cells)}
        values = {name: evaluated(how)(**words) for name, how in spec["values"].items()}
        if all(values.values()):
            values |= {"model": cell.facts.get("model"), "machine": cell.name.machine}
            text = spec["text" if evaluated(spec["holds"])(**values) else "turned"]
            return environment().from_string(f"{text} {spec.get('also', '')}").render(**values).strip()
    return ""


def _elsewhere(judged: list[Claim], name: str) -> list[Claim]:
    """The claims of this id on a GPU, in their order."""
    return [one for one in judged if one.id == name and one.cell and not one.cell.name.is_cpu]


def _number(cell: Cell, row: str, quantity: str) -> Number:
    """A number; none for one that is withdrawn, or a difference that stands on fewer seeds than decide."""
    found = cell.number(row, quantity)
    few = isinstance(found, Difference) and found.n < rules.MIN_SEEDS
    return Number() if found.withdrawn or few else found


def _first(cells: list[Cell], experiment: str, row: str, quantity: str, **facts: str) -> Number:
    """A number of the first cell of another experiment, with these facts, that has it, on a GPU."""
    own = [cell for cell in of(cells, [experiment]) if not cell.name.is_cpu and agrees(cell.facts, facts)]
    return next(filter(None, (_number(cell, row, quantity) for cell in own)), Number())


def _studies(cells: list[Cell], experiments: list[str], row: str, quantity: str) -> list[Json]:
    """A difference in every study, with its verdict; the same weights again are no further study."""
    found: list[Json] = []
    for cell in of(cells, experiments):
        number, same = _number(cell, row, quantity), cell.number("study", "same_weights").reason
        if number and same not in [one["model"] for one in found]:
            word = rules.judge_difference(number).word
            found.append({"number": number, "word": word, "model": cell.facts.get("model")})
    return found


def _best(cell: Cell, method: str, by: str) -> str:
    """That row of a method which has most of a quantity."""
    rows = [row for row in cell.found if cell.row(row).method == method and _number(cell, row, by)]
    return max(rows, key=lambda row: cell.number(row, by).value, default="")


def _spared(cell: Cell, share: str, cost: str) -> Json:
    """The largest share of tokens without experts that, as every smaller one, rules out a loss."""
    costs = {}
    for row in cell.found:
        own, lost = _number(cell, row, share), _number(cell, row, cost)
        if own and isinstance(lost, Difference):
            costs[own.value] = lost
    kept = list(takewhile(lambda own: 100 * costs[own].low90 > -rules.MARGIN, sorted(costs)))
    if not kept:
        return {"share": 0.0, "cost": None} if costs else {}
    # with the interval that decided, which is narrower than the one of 95 %
    last = costs[kept[-1]]
    return {"share": kept[-1], "cost": replace(last, low=last.low90, high=last.high90)}
