"""Where one token's time goes: launches, milliseconds by what they are for, and the gaps, arm by arm.

In: trace records. Out: a `Timeline` for each arm that was traced, and the sheet `traces`. Next: traces_figure.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from adafuse.records import Record
from adafuse.report.cells import Cell, caption, cells, first_error, short_name, title, why_empty
from adafuse.report.sheet import Columns, Row, Section, Sheet, nothing
from adafuse.report.text import GAP, digits

# as bench/trace_scopes.py splits a step, and what each is called
PARTS = {
    "base_gemm": "base GEMM",
    "attention": "attention",
    "adapters": "adapters",
    "routing": "routing",
    "switch": "switch",
    "other": "other",
}
ABOUT = (
    "One decoded token under a profiler, which costs the host time of its own: ms untraced is the same token without "
    "it, and what arms cost is said by the latency tables alone. Launches are kernels, copies and fills (on a CPU: "
    "operators called from Python); host launches are the calls that caused them, one for a captured graph. The gap is "
    "what of the token no launch fills. Base GEMM holds the frozen products, and whatever is computed in the same "
    "launch: the experts' A where it stands behind the weights, all of strategy fused. Attributed by scopes in the "
    "code; by the order of a replay's launches, which are those of the same step launched one by one; or by names "
    "alone, which cannot tell a library's product of experts from one of the backbone."
)


@dataclass(frozen=True)
class Timeline:
    """One arm: its trace line, and the spans [start us, length us, part] of the same token."""

    arm: str
    label: str
    line: dict[str, Any]
    spans: list[list[Any]]
    file: str

    @property
    def token_ms(self) -> float:
        return sum(self.line["parts_ms"].values()) + float(self.line["gap_ms"])

    @property
    def gap_share(self) -> float:
        return float(self.line["gap_ms"]) / self.token_ms


def trace_cells(records: list[Record]) -> list[Cell]:
    """The trace cells among `records`, one for each set of arms."""
    return cells(records, "trace")


def heading(cell: Cell) -> str:
    """What the cell is about, with its workload and its arms."""
    config = cell.config
    workload = [f"batch {config.get('batch')}", f"context {config.get('context')}"]
    return " · ".join([title(cell), *workload, f"arms={config['arms'].get('name')}"])


def timelines(cell: Cell) -> list[Timeline]:
    """Every traced arm in the order in which it was asked for; of several records the token of median length."""
    found = (_timelines(cell, arm) for arm in cell.config["arms"]["run"])
    return [sorted(own, key=lambda own: own.token_ms)[(len(own) - 1) // 2] for own in found if own]


def trace_table(traced: list[Cell]) -> Sheet:
    """A row for each arm that was asked for, traced or not."""
    sections = [_section(cell) for cell in traced] or [nothing("not run in this profile: experiment=trace")]
    return Sheet("traces", "Where a token's time goes", ABOUT, sections)


def _timelines(cell: Cell, arm: str) -> list[Timeline]:
    """One for each record that holds the arm."""
    return [
        Timeline(arm, _label(cell, arm), line, spans["spans"], short_name(record))
        for record in cell.finished
        for line in record.of("trace")
        for spans in record.of("spans")
        if line["arm"] == spans["arm"] == arm
    ]


def _section(cell: Cell) -> Section:
    found = {timeline.arm: timeline for timeline in timelines(cell)}
    if not found:
        return nothing(why_empty(cell, "trace"), heading(cell), caption(cell))
    columns: Columns = {
        "arm": lambda row: row["label"],
        "ms": lambda row: row["reason"] or digits(row["token_ms"]),
        "ms untraced": lambda row: digits(row["untraced_ms"]),
        "launches": lambda row: _count(row["launches"]),
        "host launches": lambda row: _count(row["host_launches"]),
        "graph nodes": lambda row: _count(row["graph_nodes"]),
    }
    for part, name in PARTS.items():
        columns[f"{name} ms"] = lambda row, key=f"{part}_ms": digits(row[key])  # type: ignore[misc]
    columns |= {
        "gap ms": lambda row: digits(row["gap_ms"]),
        "gap": lambda row: GAP if row["gap_share"] is None else f"{100 * row['gap_share']:.0f} %",
        "attributed by": lambda row: row["attributed_by"] or GAP,
    }
    rows = [_row(cell, arm, found.get(arm)) for arm in cell.config["arms"]["run"]]
    return Section(heading(cell), caption(cell), rows, columns, _notes(list(found.values())))


def _row(cell: Cell, arm: str, found: Timeline | None) -> Row:
    line = found.line if found else {}
    row: Row = {"arm": arm, "label": found.label if found else _label(cell, arm)}
    row["reason"] = None if found else first_error(cell.finished, arm) or why_empty(cell, "trace")
    row["token_ms"] = found.token_ms if found else None
    row |= {name: line.get(name) for name in ("untraced_ms", "launches", "host_launches", "graph_nodes")}
    row |= {f"{part}_ms": line.get("parts_ms", {}).get(part) for part in PARTS}
    row |= {"gap_ms": line.get("gap_ms"), "gap_share": found.gap_share if found else None}
    row["attributed_by"] = line.get("attributed_by")
    return row | {"records": [found.file] if found else []}


def _notes(found: list[Timeline]) -> list[str]:
    """Where the parts are less sure than the column says."""
    notes = []
    for own in found:
        if own.line.get("disagreement"):
            notes.append(
                f"{own.label}: by names, because its launches are not those of a step launched one by one: "
                f"{own.line['disagreement']}."
            )
        if own.line.get("unlinked"):
            notes.append(
                f"{own.label}: {own.line['unlinked']} launches had no call of the host, and are left out."
            )
    return notes


def _label(cell: Cell, arm: str) -> str:
    return str(cell.config["arms"].get("table", {}).get(arm, {}).get("label", arm))


def _count(value: float | None) -> str:
    return GAP if value is None else str(value)
