"""Kernels by themselves: time, bandwidth and the floor of each, with the check that came before the clock.

In: kernel records. Out: the sheet `kernels`, a section for each cell (machine, backbone's shape, dtype). Next:
drift.py.
"""

from __future__ import annotations

import re
from typing import Any

from adafuse.records import Record
from adafuse.report.cells import Cell, caption, cells, short_name, title, why_empty
from adafuse.report.sheet import Columns, Row, Section, Sheet, nothing
from adafuse.report.text import GAP, digits, short

FIELDS = (
    "kernel",
    "model",
    "targets",
    "rank",
    "tokens",
    "shape",
    "dtype",
    "ms",
    "naive_ms",
    "bytes",
    "floor_ms",
)
ABOUT = (
    "One pass over all blocks of the backbone, as one decoded token pays it. The floor is the time to move the bytes "
    "that must move at the measured bandwidth: of a copy for switch and rebase, of reading for the others."
)


def kernel_cells(records: list[Record]) -> list[Cell]:
    """The kernel cells among `records`."""
    return cells(records, "kernel")


def kernel_table(kernels: list[Cell]) -> Sheet:
    """Every kernel at every size, in the order in which they were timed."""
    sections = [_section(cell) for cell in kernels] or [
        nothing("not run in this profile: experiment=kernels")
    ]
    return Sheet("kernels", "Kernels by themselves", ABOUT, sections)


def lines(cell: Cell) -> list[Row]:
    """The kernel lines of the finished records as rows; `naive_ratio` is how much faster than naive."""
    return [_row(record, line) for record, line in cell.of("kernel")]


def _section(cell: Cell) -> Section:
    columns: Columns = {
        "kernel": lambda row: row["kernel"],
        "model": lambda row: row["model"],
        "targets": lambda row: row["targets"],
        "rank": lambda row: _or_gap(row["rank"]),
        "tokens": lambda row: _or_gap(row["tokens"]),
        "ms": lambda row: digits(row["ms"]),
        "GB/s": lambda row: digits(row["gbps"]),
        "of bandwidth": lambda row: GAP if row["share"] is None else f"{100 * row['share']:.0f} %",
        "floor ms": lambda row: digits(row["floor_ms"]),
        "naive / kernel": lambda row: digits(row["naive_ratio"]),
        "check": check_text,
    }
    rows = lines(cell)
    if not rows:
        return nothing(why_empty(cell, "kernel"), title(cell), caption(cell))
    return Section(title(cell), caption(cell), rows, columns, failures(cell))


def failures(cell: Cell, kernel: str = "") -> list[str]:
    """What could not be measured at all, in words; of one kernel if it is named."""
    return [
        f"Not measured: {line['where']}: {line['message']}"
        for _, line in cell.of("error")
        if re.search(rf"\b{re.escape(kernel)}\b", str(line["where"])) or not kernel
    ]


def check_text(row: Row) -> str:
    """The error beside its bound; a kernel that fails is not timed."""
    said = f"{short(row['error'])}, bound {short(row['bound'])}"
    return said if row["passed"] else f"failed: {said}"


def _row(record: Record, line: dict[str, Any]) -> Row:
    row = {name: line.get(name) for name in (*FIELDS, "gbps", "share", "error", "bound")}
    ms, naive_ms = row["ms"], row["naive_ms"]
    row["passed"] = bool(line.get("passed", ms is not None))
    row["naive_ratio"] = naive_ms / ms if ms and naive_ms else None
    return row | {"records": [short_name(record)]}


def _or_gap(value: Any) -> str:
    return GAP if value is None else str(value)
