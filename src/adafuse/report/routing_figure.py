"""Routers as figures: which expert serves which family, and whether layers agree.

In: train records of one cell. Out: the figures `load` and `agreement`. Next: figures.py.
"""

from __future__ import annotations

import math

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import QuadMesh
from matplotlib.figure import Figure
from numpy.typing import NDArray

from adafuse.records import Record
from adafuse.report.accuracy import heading
from adafuse.report.agreement import Agreement, agreements, block_of
from adafuse.report.cells import Cell
from adafuse.report.routing import loads, routers, tells_family
from adafuse.report.style import FAINT, INK, METHODS, PALE, canvas, settle, source_line
from adafuse.report.variants import ADAFUSE, TWIN, variants

# of blue; from 50 on matplotlib draws the scale as a picture
SHADES = 40
# more numbers than this would touch
LABELS = 10


def load_figure(cell: Cell) -> Figure | None:
    """The token router's load by family in the first seed, and what each router of the twin tells of the family.

    Experts have no common numbers over seeds, so that their loads cannot be averaged.
    """
    found = variants(list(cell.finished))
    token = [record for record in found.get(ADAFUSE, []) if _by_family(record)]
    layered = [record for record in found.get(TWIN, []) if _by_family(record)]
    if not token:
        return None
    height = max(2.6, 1.5 + 0.24 * len(loads(token[0], routers(token[0])[0])))
    figure, axes = canvas(8.4 if layered else 4.6, height, 2 if layered else 1)
    first = min(token, key=lambda record: record.run.get("seed", 0))
    _load_map(figure, axes[0], first)
    if layered:
        _told_by_layer(axes[1], token, layered)
    source_line(figure, heading(cell))
    settle(figure)
    return figure


def agreement_figure(cell: Cell) -> Figure | None:
    """Pairs of routers of the twin (or of the first method that has them), with lines between the blocks."""
    found = agreements(cell)
    if not found:
        return None
    one = next((a for a in found if a.method == TWIN), found[0])
    figure, (axis,) = canvas(5.0, 4.6)
    shown = one.information.copy()
    # what a router tells of itself is no agreement
    np.fill_diagonal(shown, np.nan)
    axis.set_facecolor(PALE)
    squares = _squares(axis, shown, max(0.1, float(np.nanmax(shown))))
    axis.set_aspect("equal")
    for start in one.blocks:
        axis.axhline(start, color="white", linewidth=1.2)
        axis.axvline(start, color="white", linewidth=1.2)
    places, names = _block_labels(one)
    axis.set_xticks(places, names, fontsize=8)
    axis.set_yticks(places, names, fontsize=8)
    axis.tick_params(length=0)
    axis.set_xlabel("router, by block of the backbone")
    # not seeds: a study of domains trains one adapter for each domain and seed
    count = len(one.by_adapter)
    axis.set_title(f"{one.method}: mean {one.mean:.2f}, {count} adapter{'s'[: count > 1]}")
    figure.colorbar(
        squares, ax=axis, shrink=0.8, label="normalised mutual information of two routers' first choices"
    )
    source_line(figure, heading(cell))
    settle(figure)
    return figure


def _load_map(figure: Figure, axis: Axes, record: Record) -> None:
    by_family = loads(record, routers(record)[0])
    matrix = 100 * np.array(list(by_family.values()))
    squares = _squares(axis, matrix, float(matrix.max()))
    axis.set_yticks([row + 0.5 for row in range(len(by_family))], list(by_family))
    shown = range(0, matrix.shape[1], math.ceil(matrix.shape[1] / LABELS))
    axis.set_xticks([expert + 0.5 for expert in shown], list(map(str, shown)))
    axis.tick_params(length=0)
    axis.set_xlabel("expert")
    axis.set_title(f"{ADAFUSE}: load, seed {record.run.get('seed', 0)}")
    figure.colorbar(squares, ax=axis, shrink=0.9, label="% of the chosen slots")


def _squares(axis: Axes, matrix: NDArray[np.float64], top: float) -> QuadMesh:
    """Row 0 on top; drawn as paths, because the bytes of a picture inside an SVG depend on libraries."""
    drawn = axis.pcolormesh(matrix, cmap=mpl.colormaps["Blues"].resampled(SHADES), vmin=0, vmax=top)
    axis.invert_yaxis()
    return drawn


def _told_by_layer(axis: Axes, token: list[Record], layered: list[Record]) -> None:
    """One point a router of the twin, mean over seeds; the lines are the twin's mean and the one router of AdaFuse."""
    names = routers(layered[0])
    told = [float(np.mean([tells_family(record, name) or 0.0 for record in layered])) for name in names]
    single = float(np.mean([tells_family(record, routers(record)[0]) or 0.0 for record in token]))
    colour = METHODS[TWIN]
    axis.plot(range(len(names)), told, ".", color=colour, markersize=5)
    mean = float(np.mean(told))
    dashed = (0, (4, 3))
    axis.axhline(mean, color=colour, linewidth=1.0, linestyle=dashed, label=f"{TWIN}, mean {mean:.2f}")
    axis.axhline(single, color=METHODS[ADAFUSE], linewidth=1.3, label=f"{ADAFUSE} {single:.2f}")
    blocks = [
        index
        for index, name in enumerate(names)
        if index == 0 or block_of(name) != block_of(names[index - 1])
    ]
    kept = blocks[:: math.ceil(len(blocks) / LABELS)]
    axis.set_xticks(kept, [block_of(names[index]) for index in kept])
    axis.set_xlabel("router, by block of the backbone")
    axis.set_ylabel("of the family's entropy")
    # room for the legend above the points
    axis.set_ylim(0, 1.7 * max([*told, single, 0.01]))
    axis.yaxis.grid(True, color=PALE, linewidth=0.6)
    axis.set_title("Family told by a choice")
    axis.legend(loc="upper left", labelcolor=INK, edgecolor=FAINT)


def _block_labels(one: Agreement) -> tuple[list[float], list[str]]:
    """Block numbers in the middle of their routers."""
    starts = [0, *one.blocks]
    ends = [*one.blocks, len(one.routers)]
    places = [(start + end) / 2 for start, end in zip(starts, ends, strict=True)]
    names = [block_of(one.routers[start]) for start in starts]
    step = math.ceil(len(names) / LABELS)
    return places[::step], names[::step]


def _by_family(record: Record) -> bool:
    return any(len(loads(record, router)) > 1 for router in routers(record)[:1])
