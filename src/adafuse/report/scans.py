"""Cells that differ in one thing alone, side by side: how each arm's ratio moves with batch, context or geometry.

In: latency cells. Out: `Scan`s and a figure of each, ratios with their intervals over what was varied. The numbers are
those of table attribution. Next: figures.py.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adafuse.config import GateSource
from adafuse.report.cells import Cell, model_name, title
from adafuse.report.pooling import pooling_key
from adafuse.report.style import FAINT, INK, METHODS, PALE, canvas, source_line
from adafuse.report.timing import again_of, base_of, results

# fewer points are no scan
LEAST = 3
WORDS = {
    "batch": "sequences decoded together",
    "context": "tokens of the prompt",
    "model": "backbone's shape",
    "experts": "adapted linears, rank, experts",
    "gates": "where the experts come from",
    "bypass_share": "share of tokens left to the backbone alone",
}
# doubled from point to point, while a share goes evenly from nothing to all
DOUBLED = ("batch", "context")
# of the latency knobs; the others are the cell's own
KNOBS = ("gates", "bypass_share")
# a strategy's line and mark; its colour is the method's
MARKS = {
    "gather": ("-", "o"),
    "dense": ("--", "s"),
    "fused": ("-.", "D"),
    "switch": (":", "v"),
    "rebase": (":", "^"),
    "loop": ("--", "x"),
}
SHORT = {"q_proj,v_proj": "q,v", "q_proj,k_proj,v_proj,o_proj": "q,k,v,o"}


@dataclass(frozen=True)
class Scan:
    """Cells in the order of what varies, with what each is called on the axis."""

    what: str
    cells: tuple[Cell, ...]
    values: tuple[Any, ...]

    @property
    def is_number(self) -> bool:
        return self.what in (*DOUBLED, "bypass_share")


def scans(latency: list[Cell]) -> list[Scan]:
    """Every set of at least three cells with the same arms that differ in one thing."""
    found = []
    for what, value_of in VARIED.items():
        groups: dict[str, list[Cell]] = {}
        for cell in latency:
            if cell.rounds:
                groups.setdefault(_rest(cell, what), []).append(cell)
        for group in groups.values():
            ordered = sorted(group, key=partial(_order, what))
            values = tuple(value_of(cell) for cell in ordered)
            if len(set(values)) >= LEAST:
                found.append(Scan(what, tuple(ordered), values))
    return found


def scan_figure(scan: Scan) -> Figure:
    """A line per arm; a point is a cell, its bar the interval over processes. 1 is the backbone in the same cell."""
    figure, (axis,) = canvas(7.2, 4.2)
    places = (
        [float(value) for value in scan.values] if scan.is_number else [*map(float, range(len(scan.values)))]
    )
    rows = [{arm: found for arm, found in results(cell).items() if found.ratio} for cell in scan.cells]
    for arm in dict.fromkeys(arm for row in rows for arm in row):
        _line(axis, scan, arm, places, rows)
    axis.axhline(1, color=INK, linewidth=0.8)
    if scan.what in DOUBLED:
        axis.set_xscale("log", base=2)
    axis.set_xticks(places, [str(value) for value in scan.values], fontsize=8)
    axis.minorticks_off()
    axis.set_xlabel(WORDS[scan.what])
    axis.set_ylabel("time over the backbone's")
    axis.yaxis.grid(True, color=PALE, linewidth=0.6)
    axis.set_title(f"Over {scan.what.replace('_', ' ')}")
    figure.legend(loc="outside upper left", ncols=2)
    source_line(figure, f"first point: {title(scan.cells[0])}")
    return figure


def _line(axis: Axes, scan: Scan, arm: str, places: list[float], rows: list[dict[str, Any]]) -> None:
    own = [(place, row[arm]) for place, row in zip(places, rows, strict=True) if arm in row]
    first = own[0][1]
    if arm in (base_of(first.runtime), again_of(first.runtime)):
        return
    table = scan.cells[0].config["arms"]["table"][arm]
    style, mark = MARKS.get(str(first.strategy), ("-", "."))
    ratios = [found.ratio for _, found in own]
    low = [0.0 if math.isnan(r.low) else max(0.0, r.ratio - r.low) for r in ratios]
    high = [0.0 if math.isnan(r.high) else max(0.0, r.high - r.ratio) for r in ratios]
    axis.errorbar(
        [place for place, _ in own],
        [r.ratio for r in ratios],
        yerr=[low, high],
        color=METHODS.get(table["method"], FAINT),
        linestyle=style if scan.is_number else "none",
        marker=mark,
        markersize=4,
        linewidth=1.3,
        capsize=2,
        label=first.label,
    )


def _experts(cell: Cell) -> str:
    own = cell.config["experts"]
    targets = ",".join(own["targets"])
    named = SHORT.get(targets, "all" if len(own["targets"]) == 7 else targets.replace("_proj", ""))
    return f"{named}\nr={own['rank']}\n{own['count']} experts"


VARIED: dict[str, Callable[[Cell], Any]] = {
    "batch": lambda cell: cell.config["batch"],
    "context": lambda cell: cell.config["context"],
    "model": lambda cell: model_name(cell.config),
    "experts": _experts,
    "gates": lambda cell: cell.config["latency"].get("gates", "router"),
    "bypass_share": lambda cell: cell.config["latency"].get("bypass_share", 0.0),
}


def _rest(cell: Cell, what: str) -> str:
    """All that must agree, as text: the cell with its arms and their methods, without what varies."""
    same = json.loads(pooling_key(cell.records[0]))
    if what in KNOBS:
        same["latency"] = {k: v for k, v in same["latency"].items() if k != what}
    else:
        same.pop(what, None)
    return json.dumps(same, sort_keys=True)


def _order(what: str, cell: Cell) -> tuple[Any, ...]:
    """Numbers by size, geometries by linears, rank and experts, gates as they are declared, names by letter."""
    own = cell.config["experts"]
    if what == "experts":
        return len(own["targets"]), own["rank"], own["count"]
    value = VARIED[what](cell)
    return (GateSource[value].value if what == "gates" else value,)
