"""One token of each arm as a lane on a shared time axis, coloured by what every launch is for; white is a gap.

In: a trace cell. Out: a matplotlib figure. A token may have ten thousand launches, more than a figure has columns, so
a lane is cut into columns, and in each the height of a colour is its share of the time: a launch longer than a column
fills it, many short ones stand above one another. Next: figures.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from adafuse.report.cells import Cell
from adafuse.report.style import (
    ADAPTERS,
    BACKBONE,
    FAINT,
    INK,
    METHODS,
    PALE,
    ROUTING,
    canvas,
    settle,
    source_line,
)
from adafuse.report.text import digits
from adafuse.report.timing import RUNTIMES, again_of, base_of
from adafuse.report.traces import PARTS, Timeline, heading, timelines

COLOURS = {
    "base_gemm": BACKBONE,
    "attention": ROUTING["layerwise"],
    "adapters": ADAPTERS,
    "routing": METHODS["adafuse_layerwise"],
    "switch": ROUTING["blockwise"],
    "other": METHODS["moral"],
}
# of the longest lane; about one for two points of the page
COLUMNS = 400
LANE = 0.62
# inches of a lane, and of legend, title, axis and source line
HEIGHT, REST = 0.4, 1.75
# what the longest lane leaves for its text
ROOM = 1.36


def timeline_figure(cell: Cell) -> Figure:
    """The backbone on top, then the arms in the order in which they were asked for."""
    lanes = shown(cell)
    longest_ms = max(lane.token_ms for lane in lanes)
    figure, (axis,) = canvas(7.2, REST + HEIGHT * len(lanes))
    for row, lane in enumerate(lanes):
        _lane(axis, row, lane, longest_ms)
    axis.set_xlim(0, ROOM * longest_ms)
    axis.set_ylim(len(lanes) - 0.45, -0.55)
    axis.set_yticks(range(len(lanes)), [lane.label for lane in lanes])
    axis.tick_params(axis="y", length=0)
    axis.set_xlabel("ms since the first launch, profiled; height: share of the time")
    axis.xaxis.grid(True, color=PALE, linewidth=0.6)
    axis.set_title("One token, launch by launch")
    used = {span[2] for lane in lanes for span in lane.spans}
    handles: list[Artist] = [Patch(color=COLOURS[part], label=PARTS[part]) for part in PARTS if part in used]
    handles.append(Patch(facecolor="white", edgecolor=FAINT, linewidth=0.6, label="gap"))
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles))
    source_line(figure, heading(cell))
    settle(figure)
    return figure


def shown(cell: Cell) -> list[Timeline]:
    """Every arm that was traced, the backbone first and once: its twin where there is one, for the first arm of a
    process may show the host warming up.
    """
    lanes = timelines(cell)
    traced = {lane.arm for lane in lanes}
    first = {base_of(runtime) for runtime in RUNTIMES if again_of(runtime) in traced}
    return sorted(
        (lane for lane in lanes if lane.arm not in first), key=lambda lane: not lane.arm.startswith("base")
    )


def columns(lane: Timeline, width_ms: float) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Edges of the columns in ms, the last one the token's end; and by part its share of each column's time."""
    inner = np.arange(0, lane.token_ms, width_ms)
    edges = np.append(inner, lane.token_ms)
    shares = {}
    for part in PARTS:
        own = np.array([span[:2] for span in lane.spans if span[2] == part], float).reshape(-1, 2) / 1e3
        ends = own.sum(axis=1)
        moments = np.stack([own[:, 0], ends], axis=1).ravel()
        done = np.cumsum(np.stack([np.zeros(len(own)), own[:, 1]], axis=1).ravel())
        until = np.interp(edges, moments, done) if len(own) else np.zeros(len(edges))
        shares[part] = np.diff(until) / np.diff(edges)
    return edges, shares


def _lane(axis: Axes, row: int, lane: Timeline, longest_ms: float) -> None:
    """The frame of the token, in it the columns, and behind it the length and how much of it is gap."""
    low = row + LANE / 2
    frame: dict[str, Any] = {"facecolor": "white", "edgecolor": FAINT, "linewidth": 0.6}
    axis.add_patch(Rectangle((0, row - LANE / 2), lane.token_ms, LANE, zorder=1, **frame))
    edges, shares = columns(lane, longest_ms / COLUMNS)
    below = np.zeros(len(edges) - 1)
    for part, share in shares.items():
        boxes = _boxes(edges, low - LANE * below, low - LANE * (below + share))
        if boxes:
            drawn = PolyCollection(boxes, facecolors=COLOURS[part], linewidths=0, antialiased=False, zorder=2)
            drawn.set_label(f"{lane.arm} {part}")
            axis.add_collection(drawn, autolim=False)
        below = below + share
    text = f"{digits(lane.token_ms)} ms, {100 * lane.gap_share:.0f} % gap"
    place = (lane.token_ms, row)
    axis.annotate(text, place, (5, 0), textcoords="offset points", va="center", fontsize=8, color=INK)


def _boxes(edges: np.ndarray, bottoms: np.ndarray, tops: np.ndarray) -> list[list[tuple[float, float]]]:
    """A rectangle for every run of equal columns that are not empty."""
    boxes: list[list[tuple[float, float]]] = []
    heights = np.round(np.stack([bottoms, tops], axis=1), 3)
    start = 0
    for number in range(1, len(heights) + 1):
        if number < len(heights) and (heights[number] == heights[start]).all():
            continue
        bottom, top = map(float, heights[start])
        if bottom != top:
            left, right = float(edges[start]), float(edges[number])
            boxes.append([(left, bottom), (right, bottom), (right, top), (left, top)])
        start = number
    return boxes
