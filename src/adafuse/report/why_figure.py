"""What each knob does to accuracy, as a figure: a line for each method over the values of the knob.

In: studies of one knob and the train records behind them. Out: one figure each. Next: figures.py.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from adafuse.report.accuracy import Seeds, averages
from adafuse.report.cells import BACKBONE
from adafuse.report.fits import Fits
from adafuse.report.knobs import BYPASS, GATE_INPUTS
from adafuse.report.style import FAINT, METHODS, PALE, canvas, source_line
from adafuse.report.why import bypassed_share, source, value_text
from adafuse.report.why_studies import Why
from adafuse.stats import mean_interval

MARKS = ("o", "s", "D", "^", "v", "P", "X")
# of the distance between two values: how far apart the methods' points stand, so that no bar covers another
APART = 0.08
LONG_LABEL = 30


def why_figure(why: Why, known: Fits) -> Figure:
    """Accuracy averaged over tasks, with the t interval over seeds where there are several."""
    # a legend that is wider than the figure loses its first column
    wide = max(map(len, [*why.lines, *why.levels])) > LONG_LABEL
    figure, (axis,) = canvas(6.6 if wide else 6.0, 3.6)
    if why.knob.name == BYPASS:
        _over_share(axis, why, known)
    else:
        _over_values(axis, why)
    axis.set_ylabel("accuracy, mean over tasks, %")
    axis.yaxis.grid(True, color=PALE, linewidth=0.6)
    axis.margins(y=0.12)
    axis.set_title(f"Accuracy: {'bypass' if why.knob.name == BYPASS else why.knob.words}")
    figure.legend(loc="outside upper right", ncols=2 if wide else 3)
    source_line(figure, source(why))
    return figure


def _over_values(axis: Axes, why: Why) -> None:
    """Values stand evenly: they double, or are names."""
    named = any(value in GATE_INPUTS for value in why.values)
    for number, (name, points) in enumerate(why.lines.items()):
        shift = APART * (number - (len(why.lines) - 1) / 2)
        places = [index + shift for index, value in enumerate(why.values) if value in points]
        found = [points[value] for value in why.values if value in points]
        _line(axis, name, number, places, [_percent(seeds, why.tasks) for seeds in found], not named)
    for name, seeds in why.levels.items():
        # the plain backbone would squeeze all else
        if name != BACKBONE:
            level = _percent(seeds, why.tasks)[0]
            axis.axhline(level, color=_colour(name), linewidth=1.0, linestyle=(0, (4, 3)), label=name)
    axis.set_xticks(range(len(why.values)), [value_text(why, value) for value in why.values])
    axis.set_xlim(-0.5, len(why.values) - 0.5)
    axis.set_xlabel(why.knob.words)


def _over_share(axis: Axes, why: Why, known: Fits) -> None:
    """By the share of tokens that were really left alone, each point with its penalty; the level is without bypass."""
    for number, (name, points) in enumerate(why.lines.items()):
        found = []
        for value, seeds in points.items():
            share = bypassed_share(seeds, known) if value is not None else None
            if share is not None:
                found.append((100 * share, value, _percent(seeds, why.tasks)))
        found.sort(key=lambda point: point[0])
        if None in points:
            level = _percent(points[None], why.tasks)[0]
            axis.axhline(
                level, color=_colour(name), linewidth=1.0, linestyle=(0, (4, 3)), label=f"{name}, no bypass"
            )
        _line(
            axis, name, number, [place for place, _, _ in found], [percent for _, _, percent in found], True
        )
        for place, value, (_, low, _) in found:
            text = f"{value:g}"
            axis.annotate(
                text, (place, low), (0, -3), textcoords="offset points", ha="center", va="top", fontsize=7.5
            )
    axis.set_xlim(left=0)
    axis.set_xlabel("tokens left to the backbone alone, % (below each point: the penalty)")


def _line(
    axis: Axes,
    name: str,
    number: int,
    places: list[float],
    found: list[tuple[float, float, float]],
    joined: bool,
) -> None:
    means = np.array([mean for mean, _, _ in found])
    ends = [means - [low for _, low, _ in found], [high for _, _, high in found] - means]
    axis.errorbar(
        places,
        means,
        yerr=np.array(ends),
        color=_colour(name),
        linestyle="-" if joined else "none",
        marker=MARKS[number % len(MARKS)],
        markersize=4.5,
        linewidth=1.3,
        capsize=2.5,
        label=name,
    )


def _percent(seeds: Seeds, tasks: list[str]) -> tuple[float, float, float]:
    """Mean and 95 % interval over seeds, in per cent; one seed has no interval, none no mean."""
    values = 100 * np.array(averages(seeds, tasks))
    if len(values) > 1:
        return mean_interval(values)
    only = float(values[0]) if len(values) else float("nan")
    return only, only, only


def _colour(name: str) -> Any:
    return METHODS.get(name.split(" ")[0], FAINT)
