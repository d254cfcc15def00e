"""The figures: the paper's Figures 1 and 2 and the training loss; the others have files of their own.

In: findings (cells and studies). Out: matplotlib figures by file name; report/__init__.py saves them as SVG
and PNG. Next: latency_figure.py.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from adafuse.report.cells import Cell, title
from adafuse.report.drift import drift_figure, traces
from adafuse.report.latency_figure import latency_figure
from adafuse.report.layers import Point, figure1_cells, figure1_point, figure2_cells, points, tokens
from adafuse.report.losses import Curve
from adafuse.report.routing_figure import agreement_figure, load_figure
from adafuse.report.scans import scan_figure, scans
from adafuse.report.style import ADAPTERS, BACKBONE, FAINT, INK, METHODS, PALE, PAPER, RC, canvas, source_line
from adafuse.report.text import digits
from adafuse.report.traces import timelines
from adafuse.report.traces_figure import timeline_figure
from adafuse.report.trained import Trained
from adafuse.report.why_figure import why_figure


def all_figures(
    latency: list[Cell],
    layers: list[Cell],
    curves: list[list[Curve]],
    paper: dict[str, Any],
    drift: Sequence[Cell] = (),
    traced: Sequence[Cell] = (),
    trained: Trained | None = None,
) -> dict[str, Figure]:
    """Every figure that the records allow, by file name; a second cell of the same kind gets a number."""
    drawn: list[tuple[str, Figure]] = []
    with mpl.rc_context(RC):
        drawn += [("figure1", figure1(cell, paper)) for cell in figure1_cells(layers)]
        drawn += [("figure2", figure2(cell)) for cell in figure2_cells(layers)]
        varied = scans(latency)
        drawn += [(f"scan_{scan.what}", scan_figure(scan)) for scan in varied]
        in_scans = [cell for scan in varied for cell in scan.cells]
        for cell in latency:
            if cell.rounds and cell not in in_scans:
                drawn.append((f"latency_{cell.config['arms'].get('name')}", latency_figure(cell, paper)))
        drawn += [("drift", drift_figure(cell)) for cell in drift if traces(cell)]
        for cell in traced:
            if timelines(cell):
                drawn.append((f"timeline_{cell.config['arms'].get('name')}", timeline_figure(cell)))
        drawn += [("loss", loss_figure(own)) for own in curves]
        drawn += _of_adapters(trained) if trained else []
    named: dict[str, Figure] = {}
    for name, figure in drawn:
        count = sum(key == name or key.startswith(f"{name}_cell") for key in named)
        named[name if not count else f"{name}_cell{count + 1}"] = figure
    return named


def _of_adapters(trained: Trained) -> list[tuple[str, Figure]]:
    """What knobs do, and what routers do."""
    drawn = [(f"why_{why.knob.name}", why_figure(why, trained.fits)) for why in trained.whys]
    for name, draw in (("load", load_figure), ("agreement", agreement_figure)):
        figures = [draw(cell) for cell in trained.routing]
        drawn += [(name, figure) for figure in figures if figure]
    return drawn


def figure1(cell: Cell, paper: dict[str, Any]) -> Figure:
    """One layer at decode: ours in ms, and the adapters as a multiple of the backbone for both sides."""
    point = figure1_point(cell)
    assert point is not None
    figure, (left, right) = canvas(7.2, 2.7, 2, width_ratios=[1, 1])
    _bars(left, ["backbone", "adapters"], [point.backbone_ms, point.adapters_ms], [BACKBONE, ADAPTERS])
    left.set_xlabel("ms, one layer, one token (ours)")
    left.set_title("One layer with a router of its own")
    printed = paper["figure1"]["adapters_ms"] / paper["figure1"]["backbone_ms"]
    ends = [] if math.isnan(point.ratio.low) else [point.ratio.low, point.ratio.high]
    _bars(
        right,
        ["ours", "paper"],
        [point.ratio.ratio, printed],
        [ADAPTERS, PAPER],
        reach=max([point.ratio.ratio, *ends]),
    )
    if ends:
        right.plot(ends, [0, 0], color=INK, linewidth=1.4)
    right.axvline(1, color=INK, linewidth=0.8, linestyle=(0, (4, 3)))
    right.set_xlabel("adapters / backbone")
    right.set_title("Adapters over backbone")
    source_line(figure, title(cell))
    return figure


def figure2(cell: Cell) -> Figure:
    """Adapter and backbone time at prefill and decode, for each rank."""
    by_phase: dict[tuple[str, int], list[Point]] = {}
    for point in points(cell):
        by_phase.setdefault((point.phase, point.sequence_length), []).append(point)
    figure, axes = canvas(3.6 * len(by_phase), 2.9, len(by_phase))
    for axis, ((phase, length), group) in zip(axes, by_phase.items(), strict=True):
        _pairs(axis, group)
        axis.set_title(f"{phase}, {tokens(length)}")
    axes[0].set_ylabel("ms in one layer")
    handles = [
        Patch(color=BACKBONE, label="backbone"),
        Patch(color=ADAPTERS, label="adapters"),
    ]
    figure.legend(handles=handles, loc="outside upper right", ncols=2)
    source_line(figure, title(cell))
    return figure


def loss_figure(curves: list[Curve]) -> Figure:
    """Training loss of one backbone, mean over seeds: its pre-training if it was run here, and its adapters'."""
    stages = [stage for stage in ("pretrain", "train") if any(curve.stage == stage for curve in curves)]
    figure, axes = canvas(4.2 * len(stages) + 0.6, 3.2, len(stages))
    for axis, stage in zip(axes, stages, strict=True):
        own = [curve for curve in curves if curve.stage == stage]
        for curve in own:
            colour = INK if stage == "pretrain" else METHODS.get(curve.method, FAINT)
            # of seeds that were logged at the same steps the mean: nine methods times their seeds are a tangle
            same = [loss for steps, loss in curve.seeds if steps == curve.seeds[0][0]]
            axis.plot(curve.seeds[0][0], np.mean(same, axis=0), color=colour, linewidth=1.3, alpha=0.9)
            axis.plot([], [], color=colour, linewidth=2, label=curve.method)
        axis.set_title("Pre-training the backbone" if stage == "pretrain" else "Training the adapters")
        axis.set_xlabel("step")
        axis.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axis.grid(True, color=PALE, linewidth=0.6)
        axis.set_ylim(bottom=0)
        if stage == "train":
            axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))
    axes[0].set_ylabel("training loss, nats per token")
    source_line(figure, curves[-1].source)
    return figure


def _pairs(axis: Axes, group: list[Point]) -> None:
    """Backbone and adapters side by side for each rank."""
    for index, point in enumerate(group):
        for offset, ms, colour in ((-0.19, point.backbone_ms, BACKBONE), (0.19, point.adapters_ms, ADAPTERS)):
            axis.bar(index + offset, ms, width=0.34, color=colour)
            axis.annotate(
                digits(ms), (index + offset, ms), (0, 2), textcoords="offset points", ha="center", fontsize=8
            )
    axis.set_xticks(range(len(group)), [f"rank {point.rank}" for point in group])
    axis.set_xlim(-0.6, len(group) - 0.4)
    axis.margins(y=0.14)
    axis.tick_params(axis="x", length=0)
    axis.yaxis.grid(True, color=PALE, linewidth=0.6)


def _bars(
    axis: Axes, names: list[str], values: list[float], colours: list[str], reach: float | None = None
) -> None:
    """Horizontal bars with their values; `reach` is where the first bar's interval ends."""
    axis.barh(range(len(names)), values, color=colours, height=0.55)
    for row, value in enumerate(values):
        end = reach if reach and row == 0 else value
        axis.annotate(digits(value), (end, row), (4, 0), textcoords="offset points", va="center")
    axis.set_yticks(range(len(names)), names)
    axis.tick_params(axis="y", length=0)
    axis.invert_yaxis()
    axis.set_xlim(0, 1.22 * max([*values, reach or 0]))
