"""How figures look and how they are saved: one palette that colour-blind readers can tell apart, and stable
bytes.

In: a drawn figure. Out: SVG and PNG without dates, so that the same records give the same SVG. Next:
figures.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

INK, FAINT, PALE = "#1f2328", "#6e7781", "#d8dee4"
# Okabe and Ito's colours, by routing: what readers compare.
ROUTING = {"none": "#8c959f", "layerwise": "#0072b2", "blockwise": "#009e73", "token": "#d55e00"}
METHODS = {
    "base": "#8c959f",
    "full": "#7f4f24",
    "lora": "#1f2328",
    "mola": "#0072b2",
    "moral": "#56b4e9",
    "pesc": "#009e73",
    "mixlora": "#b59d00",
    "adafuse_layerwise": "#cc79a7",
    "adafuse": "#d55e00",
}
STRATEGIES = {"switch": "#d55e00", "switch_refresh": "#0072b2", "rebase": "#009e73"}
BACKBONE, ADAPTERS, PAPER, BAND = "#8c959f", "#d55e00", "#f0b48a", "#fff1b8"

# of a source line, at its size
CHARACTERS_PER_INCH = 17.5

# Any: matplotlib types each key by name
RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "xtick.color": INK,
    "ytick.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "figure.dpi": 100,
    "svg.hashsalt": "adafuse",
    "svg.fonttype": "path",
}


def canvas(
    width: float, height: float, columns: int = 1, rows: int = 1, **options: Any
) -> tuple[Figure, list[Axes]]:
    """A figure of `columns` panels side by side, or `rows` one under another; sizes in inches."""
    with mpl.rc_context(RC):
        # not pyplot's, which would keep every figure open
        figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(wspace=0.08))
        axes = figure.subplots(rows, columns, squeeze=False, **options)
    return figure, list(axes.flat)


def settle(figure: Figure) -> None:
    """Lay out now and round the panels' places, once everything is drawn.

    With several rows the last bit of a place depends on addresses in memory, and an SVG's clip names on that bit.
    """
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    for axis in figure.axes:
        left, bottom, width, height = (round(value, 6) for value in axis.get_position().bounds)
        axis.set_position((left, bottom, width, height))


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path`.svg and `path`.png."""
    path.parent.mkdir(parents=True, exist_ok=True)
    svg, png = path.with_suffix(".svg"), path.with_suffix(".png")
    with mpl.rc_context(RC):
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
        figure.savefig(png, dpi=160, metadata={"Software": None})
    return [svg, png]


def source_line(figure: Figure, text: str) -> None:
    """A line at the foot of the figure that says what machine and cell it shows; two where it would be cut off."""
    room = int(CHARACTERS_PER_INCH * figure.get_size_inches()[0])
    lines = [""]
    for part in text.split(" · "):
        longer = f"{lines[-1]} · {part}" if lines[-1] else part
        lines = [*lines[:-1], longer] if len(longer) <= room or not lines[-1] else [*lines, part]
    figure.supxlabel("\n".join(lines), fontsize=7.5, color=FAINT, x=0.01, ha="left")
