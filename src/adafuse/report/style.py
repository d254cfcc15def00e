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

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT, PALE = "#1f2328", "#6e7781", "#d8dee4"
# Okabe and Ito's colours, by routing: what readers compare.
ROUTING = {"none": "#8c959f", "layerwise": "#0072b2", "blockwise": "#009e73", "token": "#d55e00"}
METHODS = {
    "base": "#8c959f",
    "lora": "#1f2328",
    "mola": "#0072b2",
    "moral": "#56b4e9",
    "pesc": "#009e73",
    "mixlora": "#b59d00",
    "adafuse_layerwise": "#cc79a7",
    "adafuse": "#d55e00",
}
BACKBONE, ADAPTERS, PAPER, BAND = "#8c959f", "#d55e00", "#f0b48a", "#fff1b8"

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


def canvas(width: float, height: float, columns: int = 1, **options: Any) -> tuple[Figure, list[Axes]]:
    """A figure of `columns` panels side by side, sizes in inches."""
    with mpl.rc_context(RC):
        figure, axes = plt.subplots(
            1, columns, figsize=(width, height), squeeze=False, layout="constrained", **options
        )
    figure.get_layout_engine().set(wspace=0.08)
    return figure, list(axes[0])


def save(figure: Figure, path: Path) -> list[Path]:
    """Write `path`.svg and `path`.png and close the figure."""
    path.parent.mkdir(parents=True, exist_ok=True)
    svg, png = path.with_suffix(".svg"), path.with_suffix(".png")
    with mpl.rc_context(RC):
        figure.savefig(svg, metadata={"Date": None, "Creator": None})
        figure.savefig(png, dpi=160, metadata={"Software": None})
    plt.close(figure)
    return [svg, png]


def source_line(figure: Figure, text: str) -> None:
    """A line at the foot of the figure that says what machine and cell it shows."""
    figure.supxlabel(text, fontsize=7.5, color=FAINT, x=0.01, ha="left")
