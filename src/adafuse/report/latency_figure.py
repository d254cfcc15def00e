"""Each arm as a multiple of the backbone: bars with intervals, the A/A band, and the paper's ratio where it
has one.

In: a latency cell and the paper's numbers. Out: a matplotlib figure, a panel for each runtime, because each has a
backbone of its own. Next: claims.py.
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
from adafuse.report.style import BAND, FAINT, INK, PALE, ROUTING, canvas, settle, source_line
from adafuse.report.text import digits
from adafuse.report.timing import BASE, EAGER, RUNTIMES, ArmResult, again, again_of, results
from adafuse.stats import resolution

LEGEND = {
    "none": "no router",
    "layerwise": "a router per linear",
    "blockwise": "a router per block",
    "token": "one decision per token",
}
HEADING = "Decoding with an adapter"
OVER_BACKBONE = "time per token over the backbone's (1 = backbone), with 95 % interval"
# shorter: the labels of these arms leave less room
SAME_RUNTIME = "time over the backbone's in the same runtime, 95 % interval"
BAR = 0.5
# inches of a row, and of the title and ticks of one more panel
ROW, PANEL = 0.32, 0.55
# The paper's mark stands under the bar, clear of the interval.
BELOW = 0.36


def latency_figure(cell: Cell, paper: dict[str, Any]) -> Figure:
    """Horizontal bars from 1 (the backbone in the same runtime), slowest arm of each runtime on top."""
    groups = _groups(cell)
    captured = list(groups) != [EAGER]
    sizes = [max(len(group), 2) for group in groups.values()]
    height = 1.7 + ROW * sum(sizes) + PANEL * (len(sizes) - 1)
    figure, axes = canvas(7.2, height, rows=len(sizes), height_ratios=sizes)
    routings = {_routing(cell, result) for group in groups.values() for result in group}
    handles: list[Artist] = [
        Patch(color=colour, label=LEGEND[name]) for name, colour in ROUTING.items() if name in routings
    ]
    bands: list[Artist] = []
    for axis, (runtime, group) in zip(axes, groups.items(), strict=True):
        for row, result in enumerate(group):
            _bar(axis, row, result, ROUTING.get(_routing(cell, result), FAINT))
        handles += _paper_marks(axis, group, paper)
        bands += _noise_band(axis, cell, runtime)
        _frame(axis, group, f"{HEADING}, runtime {runtime}" if captured else HEADING)
    axes[-1].set_xlabel(SAME_RUNTIME if captured else OVER_BACKBONE)
    figure.legend(handles=handles + bands[:1], loc="outside upper left", ncols=3)
    source_line(figure, title(cell))
    if len(groups) > 1:
        settle(figure)
    return figure


def _groups(cell: Cell) -> dict[str, list[ArmResult]]:
    """The arms that have a ratio, without the backbone itself, by runtime."""
    found = [
        result
        for result in results(cell).values()
        if result.ratio and result.arm not in (result.to_base.base, again_of(result.runtime))
    ]
    groups = {runtime: [result for result in found if result.runtime == runtime] for runtime in RUNTIMES}
    for group in groups.values():
        group.sort(key=_slowest_first)
    return {runtime: group for runtime, group in groups.items() if group} or {EAGER: []}


def _slowest_first(result: ArmResult) -> float:
    assert result.ratio is not None
    return -result.ratio.ratio


def _bar(axis: Axes, row: int, result: ArmResult, colour: str) -> None:
    ratio = result.ratio
    assert ratio is not None
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
        if result.arm in printed and result.runtime == EAGER
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


def _noise_band(axis: Axes, cell: Cell, runtime: str) -> list[Artist]:
    noise = again(cell, runtime)
    if noise is None:
        return []
    width = math.exp(resolution(noise))
    label = "A/A: not resolved"
    return [axis.axvspan(1 / width, width, color=BAND, linewidth=0, label=label, zorder=0)]


def _frame(axis: Axes, group: list[ArmResult], heading: str) -> None:
    lowest = [r.ratio.low for r in group if r.ratio and not math.isnan(r.ratio.low)]
    axis.set_xlim(left=min([0.95, *(0.98 * low for low in lowest)]), right=1.06 * axis.get_xlim()[1])
    left, right = axis.get_xlim()
    # Counted from 1, the backbone, so that 1 always has its tick.
    step = float(np.diff(MaxNLocator(7).tick_values(left, right))[0])
    axis.set_xticks(np.arange(1 - step * ((1 - left) // step), right, step))
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.set_yticks(range(len(group)), [_label(result) for result in group])
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.xaxis.grid(True, color=PALE, linewidth=0.6)
    axis.set_title(heading)


def _label(result: ArmResult) -> str:
    """Without the runtime, which the panel's title says."""
    return result.label.replace(f", {result.runtime})", ")").replace(f" ({result.runtime})", "")


def _routing(cell: Cell, result: ArmResult) -> str:
    arm = cell.config["arms"].get("table", {}).get(result.arm, {})
    return str(cell.config.get("methods", {}).get(arm.get("method"), {}).get("routing"))
