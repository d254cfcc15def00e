"""Each arm as a multiple of the backbone: bars with intervals, the A/A band, and the paper's ratio where it
has one.

In: a latency cell and the paper's numbers. Out: a matplotlib figure. Next: claims.py.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from adafuse.report.cells import Cell, title
from adafuse.report.paper import by_arm
from adafuse.report.style import BAND, FAINT, INK, PALE, ROUTING, canvas, source_line
from adafuse.report.text import digits
from adafuse.report.timing import AGAIN, BASE, ArmResult, again, results
from adafuse.stats import Interval, resolution

LEGEND = {
    "none": "no router",
    "layerwise": "a router per linear",
    "blockwise": "a router per block",
    "token": "one decision per token",
}
BAR = 0.5
# The paper's mark stands under the bar, clear of the interval.
BELOW = 0.36


def latency_figure(cell: Cell, paper: dict[str, Any]) -> Figure:
    """Horizontal bars from 1 (the backbone), slowest arm on top."""
    found = [
        (result, result.ratio)
        for result in results(cell).values()
        if result.ratio and result.arm not in (BASE, AGAIN)
    ]
    found.sort(key=lambda pair: -pair[1].ratio)
    figure, (axis,) = canvas(7.2, 1.7 + 0.32 * max(len(found), 2))
    routings = [_routing(cell, result) for result, _ in found]
    for row, (_, ratio) in enumerate(found):
        _bar(axis, row, ratio, ROUTING.get(routings[row], FAINT))
    handles: list[Artist] = [
        Patch(color=colour, label=LEGEND[name]) for name, colour in ROUTING.items() if name in routings
    ]
    handles += _paper_marks(axis, [result for result, _ in found], paper)
    handles += _noise_band(axis, cell)
    _frame(axis, [result.label for result, _ in found], [ratio for _, ratio in found])
    figure.legend(handles=handles, loc="outside upper left", ncols=3)
    source_line(figure, title(cell))
    return figure


def _bar(axis: Axes, row: int, ratio: Interval, colour: str) -> None:
    axis.barh(row, ratio.ratio - 1, left=1, height=BAR, color=colour)
    ends = [ratio.ratio] if math.isnan(ratio.low) else [ratio.low, ratio.high]
    axis.plot(ends, [row] * len(ends), color=INK, linewidth=1.4, solid_capstyle="butt", zorder=3)
    place = (max(*ends, 1.0), row)
    axis.annotate(digits(ratio.ratio), place, (5, 0), textcoords="offset points", va="center", fontsize=8)


def _paper_marks(axis: Axes, found: list[ArmResult], paper: dict[str, Any]) -> list[Artist]:
    printed = by_arm(paper["table6"]) | by_arm(paper["table5"])
    marks = [
        (printed[result.arm]["ms_per_token"] / printed[BASE]["ms_per_token"], row + BELOW)
        for row, result in enumerate(found)
        if result.arm in printed
    ]
    if not marks:
        return []
    xs, ys = zip(*marks, strict=True)
    look: dict[str, Any] = {
        "markerfacecolor": "white",
        "markeredgecolor": INK,
        "markersize": 4.5,
        "linestyle": "none",
    }
    return list(axis.plot(xs, ys, marker="D", label="paper", zorder=4, **look))


def _noise_band(axis: Axes, cell: Cell) -> list[Artist]:
    noise = again(cell)
    if noise is None:
        return []
    width = math.exp(resolution(noise))
    label = "A/A: not resolved"
    return [axis.axvspan(1 / width, width, color=BAND, linewidth=0, label=label, zorder=0)]


def _frame(axis: Axes, labels: list[str], ratios: list[Interval]) -> None:
    lowest = [ratio.low for ratio in ratios if not math.isnan(ratio.low)]
    axis.set_xlim(left=min([0.95, *(0.98 * low for low in lowest)]), right=1.06 * axis.get_xlim()[1])
    left, right = axis.get_xlim()
    # Counted from 1, the backbone, so that 1 always has its tick.
    step = float(np.diff(MaxNLocator(7).tick_values(left, right))[0])
    axis.set_xticks(np.arange(1 - step * ((1 - left) // step), right, step))
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.set_yticks(range(len(labels)), labels)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.xaxis.grid(True, color=PALE, linewidth=0.6)
    axis.set_xlabel("time per token over the backbone's (1 = backbone), with 95 % interval")
    axis.set_title("Decoding with an adapter")


def _routing(cell: Cell, result: ArmResult) -> str:
    arm = cell.config["arms"].get("table", {}).get(result.arm, {})
    return str(cell.config.get("methods", {}).get(arm.get("method"), {}).get("routing"))
