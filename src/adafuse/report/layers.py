"""One adapted linear by itself: time in the adapters beside time in the backbone (the paper's Figures 1 and
2).

In: layer records and the paper's numbers. Out: a `Point` for each phase and rank, and the table under the
figures. Next: figures.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from adafuse.records import Record
from adafuse.report.cells import Cell, caption, cells, short_name, title
from adafuse.report.sheet import Columns, Row, Section, Sheet, nothing
from adafuse.report.text import digits, ratio_text
from adafuse.stats import Interval, paired_ratio


@dataclass(frozen=True)
class Point:
    """One phase at one rank: median ms of the two parts, and adapters over backbone."""

    phase: str
    sequence_length: int
    rank: int
    backbone_ms: float
    adapters_ms: float
    ratio: Interval
    files: tuple[str, ...]


def layer_cells(records: list[Record]) -> list[Cell]:
    """The single-layer cells among `records`."""
    return cells(records, "layer")


def figure1_cells(layers: list[Cell]) -> list[Cell]:
    """Cells of the experiment figure1; any cell with a decode point where that was not run."""
    named = [cell for cell in layers if any(r.run.get("experiment") == "figure1" for r in cell.records)]
    return [cell for cell in named or layers if figure1_point(cell)]


def figure1_point(cell: Cell) -> Point | None:
    """The decode point at the cell's own rank, or at the lowest rank that was run."""
    decode = [point for point in points(cell) if point.phase == "decode"]
    own = [point for point in decode if point.rank == cell.config["experts"].get("rank")]
    return next(iter(own or decode), None)


def figure2_cells(layers: list[Cell]) -> list[Cell]:
    """Cells with more than one point: both phases, or several ranks."""
    return [cell for cell in layers if len(points(cell)) > 1]


def points(cell: Cell) -> list[Point]:
    """Every phase and rank that has both parts: prefill first, low ranks first."""
    keys = {(line["phase"], line["sequence_length"], line["rank"]) for _, line in cell.of("layer")}
    found = [_point(cell, *key) for key in sorted(keys, key=lambda key: (key[0] == "decode", key[1], key[2]))]
    return [point for point in found if point]


def layer_table(layers: list[Cell], paper: dict[str, Any]) -> Sheet:
    """The numbers under Figures 1 and 2."""
    columns: Columns = {
        "phase": lambda row: f"{row['phase']}, {tokens(row['sequence_length'])}",
        "rank": lambda row: str(row["rank"]),
        "backbone ms": lambda row: digits(row["backbone_ms"]),
        "adapters ms": lambda row: digits(row["adapters_ms"]),
        "adapters / backbone [95 %]": lambda row: ratio_text(row["ratio"]),
    }
    one = paper["figure1"]
    printed = f"{one['adapters_ms']} / {one['backbone_ms']} = {one['adapters_ms'] / one['backbone_ms']:.2f}"
    note = [f"Paper, Figure 1: {printed}; Figure 2: above 1 at both lengths and both ranks, without values."]
    sections = []
    for cell in layers:
        rows: list[Row] = [vars(point) | {"records": list(point.files)} for point in points(cell)]
        for row in rows:
            row.pop("files")
        sections.append(Section(title(cell), caption(cell), rows, columns, note))
    if not sections:
        sections = [nothing("not run in this profile: experiment=figure1, experiment=figure2")]
    about = "Time in the adapters and in the backbone of one adapted layer."
    return Sheet("layers", "Figures 1 and 2 in numbers", about, sections)


def tokens(count: int) -> str:
    """1 token, 100 tokens."""
    return f"{count} token" + ("" if count == 1 else "s")


def _point(cell: Cell, phase: str, sequence_length: int, rank: int) -> Point | None:
    pairs, files = [], []
    for record in cell.finished:
        times: dict[str, list[float]] = {"backbone": [], "adapters": []}
        for line in record.of("layer"):
            if (line["phase"], line["sequence_length"], line["rank"]) == (phase, sequence_length, rank):
                times.setdefault(line["part"], []).append(line["ms"])
        length = min(len(times["adapters"]), len(times["backbone"]))
        if length:
            pairs.append((times["adapters"][:length], times["backbone"][:length]))
            files.append(short_name(record))
    if not pairs:
        return None
    adapters_ms, backbone_ms = (float(np.median([np.median(pair[i]) for pair in pairs])) for i in (0, 1))
    return Point(phase, sequence_length, rank, backbone_ms, adapters_ms, paired_ratio(pairs), tuple(files))
