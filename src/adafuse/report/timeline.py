"""One token of each arm as a lane on a shared time axis, coloured by what every launch is for; white is a gap.

In: trace and spans lines. Out: `Lane`s, and panels of them. A token may have ten thousand launches, more than a figure
has columns, so a lane is cut into columns, and in each the height of a colour is its share of the time: a launch longer
than a column fills it, many short ones stand above one another. Next: figures.py, which frames them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.patches import Patch, Rectangle
from numpy.typing import NDArray

from adafuse.report.formats import digits
from adafuse.report.frames import Frames, Json
from adafuse.report.latency import median_tokens
from adafuse.report.naming import arms_of, outdated

# columns of the longest lane, one for three points of the page; height of a lane; room that its text takes
COLUMNS, LANE, ROOM = 150, 0.62, 1.36
FRAME: Any = {"facecolor": "white", "edgecolor": "#6e7781", "linewidth": 0.6}
Shares = NDArray[np.float64]


@dataclass(frozen=True)
class Lane:
    """One arm: `spans` are [start us, length us, part] of every launch of a token of `token_ms`, gaps included."""

    arm: str
    label: str
    token_ms: float
    gap_ms: float
    spans: list[list[Any]]


def lanes(frames: Frames, traced: pd.DataFrame) -> list[Lane]:
    """Every arm of these records, the backbone first and once: its twin where there is one, for the first arm of a
    process may show the host warming up. Of several records the token of median length.
    """
    arms = arms_of(traced.iloc[0])
    backbone = {arm for arm, own in arms.items() if (own.method, own.strategy) == ("base", "dense")}
    spans = frames.lines("spans")[["record", "arm", "spans"]]
    found = frames.lines("trace").merge(spans, on=["record", "arm"])
    older = pd.MultiIndex.from_frame(found[["record", "arm"]]).isin(outdated(traced))
    found = median_tokens(found[found["record"].isin(traced["record"]) & ~older], ["arm"])
    shown: dict[str, Lane] = {}
    for arm in sorted(arms, key=lambda arm: arm not in backbone):
        if arm in found.index:
            line: Any = found.loc[arm]
            key = arms[arm].runtime if arm in backbone else arm
            shown[key] = Lane(arm, arms[arm].label, line["token_ms"], line["gap_ms"], line["spans"])
    return list(shown.values())


def draw(axis: Axes, shown: Sequence[Lane], parts: Json) -> list[Artist]:
    """The lanes from top to bottom; what the colours mean. `parts`: colour and name of what launches are for."""
    longest_ms = max(lane.token_ms for lane in shown)
    for place, lane in enumerate(shown):
        _lane(axis, place, lane, longest_ms / COLUMNS, parts)
    axis.set(xlim=(0, ROOM * longest_ms), ylim=(len(shown) - 0.45, -0.55))
    axis.set_xlabel("ms since the first launch, profiled; height: share of the time")
    axis.set_yticks(range(len(shown)), [lane.label for lane in shown])
    axis.tick_params(axis="y", length=0)
    axis.xaxis.grid(True)
    used = {span[2] for lane in shown for span in lane.spans}
    handles = [Patch(color=one["colour"], label=one["name"]) for part, one in parts.items() if part in used]
    return [*handles, Patch(**FRAME, label="gap")]


def columns(lane: Lane, width_ms: float, parts: Iterable[str]) -> tuple[Shares, dict[str, Shares]]:
    """Edges of the columns in ms, the last one the token's end; and by part its share of each column's time."""
    edges = np.append(np.arange(0, lane.token_ms, width_ms), lane.token_ms)
    starts, lengths, names = zip(*lane.spans, strict=True)
    spans, of_part, shares = np.array([starts, lengths], float).T / 1e3, np.array(names), {}
    for part in parts:
        own = spans[of_part == part]
        # how much of the part is done at the start and at the end of each launch, from zero
        moments = np.append(0, own.cumsum(axis=1))
        done = np.append(0, np.cumsum(own * [0, 1]))
        shares[part] = np.diff(np.interp(edges, moments, done)) / np.diff(edges)
    return edges, shares


def _lane(axis: Axes, place: int, lane: Lane, width_ms: float, parts: Json) -> None:
    """The frame of the token, in it the columns, and behind it the length and how much of it is gap."""
    axis.add_artist(Rectangle((0, place - LANE / 2), lane.token_ms, LANE, **FRAME, zorder=1))
    edges, shares = columns(lane, width_ms, parts)
    bottom = np.full(len(edges) - 1, place + LANE / 2)
    for part, share in shares.items():
        top = bottom - LANE * share
        if share.any():
            how: Any = {"label": f"{lane.arm} {part}", "color": parts[part]["colour"], "antialiased": False}
            tops = np.where(share > 0, top, np.nan)
            # pixels: as outlines, a figure of thousands of launches takes seven times the bytes
            axis.stairs(tops, edges, baseline=bottom, fill=True, lw=0, zorder=2, rasterized=True, **how)
        bottom = top
    text = f"{digits(lane.token_ms)} ms, {100 * lane.gap_ms / lane.token_ms:.0f} % gap"
    axis.annotate(text, (lane.token_ms, place), (5, 0), textcoords="offset points", va="center", fontsize=8)
