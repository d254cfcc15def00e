"""What each scan found, in numbers: a row for each point, a column for each arm, ratios with their intervals.

In: latency cells. Out: the sheet `scans`. Next: readme.py.
"""

from __future__ import annotations

from adafuse.report.cells import Cell, caption, title
from adafuse.report.findings import GATHERED, LAYERWISE
from adafuse.report.scans import WORDS, Scan, scans
from adafuse.report.sheet import Columns, Row, Section, Sheet, nothing
from adafuse.report.text import GAP, digits, ratio_text
from adafuse.report.timing import ArmResult, again_of, base_of, ratio, results

ABOUT = (
    "Cells that differ in one thing alone. A ratio is of a token's time to the plain backbone's in the same runtime, "
    "with its 95 % interval over processes; the last columns hold a gate per layer against one gate, both gathered and "
    "paired by round, which is known far better than the quotient of the two. Figures scan_* show the same; the "
    "check that each arm passed, its distance to the floor and its files stand in table attribution, under the "
    "heading of its cell."
)
GATE = "per layer / one gate"


def sheet(latency: list[Cell]) -> Sheet:
    """A section for each scan, those of a GPU first."""
    found = sorted(scans(latency), key=lambda scan: scan.cells[0].is_cpu)
    reason = "no three cells differ in one thing alone: experiment=batch_scan and the other scans"
    return Sheet(
        "scans", "Over batch, context, model and experts", ABOUT, [*map(_section, found)] or [nothing(reason)]
    )


def _section(scan: Scan) -> Section:
    rows = [_row(cell, value) for cell, value in zip(scan.cells, scan.values, strict=True)]
    arms = dict.fromkeys(arm for row in rows for arm in row["_arms"])
    columns: Columns = {
        WORDS[scan.what]: lambda row: row["point"],
        "backbone ms/token": lambda row: digits(row["base_ms"]),
    }
    for arm, found in {arm: next(r["_arms"][arm] for r in rows if arm in r["_arms"]) for arm in arms}.items():
        columns[found.label] = lambda row, arm=arm: _shown(row["_arms"].get(arm))  # type: ignore[misc]
    if any(row["gate_ratio"] for row in rows):
        columns[GATE] = lambda row: ratio_text(row["gate_ratio"])
    columns["processes"] = lambda row: str(row["processes"])
    heading = f"Over {scan.what.replace('_', ' ')} · {title(scan.cells[0])} (the first point)"
    every = Cell(tuple(record for cell in scan.cells for record in cell.records))
    return Section(heading, caption(every), rows, columns)


def _row(cell: Cell, value: object) -> Row:
    every = results(cell)
    plain = {name for found in every.values() for name in (base_of(found.runtime), again_of(found.runtime))}
    arms = {arm: found for arm, found in every.items() if found.ratio and arm not in plain}
    runtime = next(iter(every.values())).runtime
    base = every.get(base_of(runtime))
    row: Row = {"point": str(value).replace("\n", " "), "base_ms": base and base.ms_per_token, "_arms": arms}
    row |= {f"{arm}_ratio": found.ratio for arm, found in arms.items()}
    row["gate_ratio"] = ratio(cell, LAYERWISE, GATHERED) if {LAYERWISE, GATHERED} <= set(arms) else None
    row["processes"] = len(cell.rounds)
    return row | {"records": list(dict.fromkeys(file for found in arms.values() for file in found.files))}


def _shown(found: ArmResult | None) -> str:
    return GAP if found is None else ratio_text(found.ratio, found.resolved)
