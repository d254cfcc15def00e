"""How numbers are printed, everywhere in the report: three digits, an interval as fine as it deserves, a unit.

In: numbers, intervals. Out: short strings. Next: tables.py, whose columns name these formats.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from adafuse.report.rules import MIN_SEEDS, Difference, Number, judge_difference

GAP = "–"
UNITS = (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0))
# by name: what a value is multiplied by, and how it is printed
SCALED = {"short": (1, "{:.3g}"), "whole": (1, "{:,.0f}"), "printed": (1, "{:g}"), "score": (100, "{:.1f}")}
SCALED |= {"share": (100, "{:.0f} %"), "tenths": (100, "{:.1f} %"), "resolution": (100, "± {:.2g} %")}


def ratio_text(found: Number, resolved: bool = True) -> str:
    """1.29 [1.25, 1.33]; with words in front when the A/A arm differs as much."""
    if math.isnan(found.low):
        return f"{digits(found.value)} (no interval)"
    if found.low == found.high:
        return f"{found.value:.4f} ({found.method})" if found.method else f"{found.value:.4f}"
    # As many decimals as the interval's width deserves.
    places = min(4, max(2, math.ceil(-math.log10(found.high - found.low))))
    shown = f"{found.value:.{places}f} [{found.low:.{places}f}, {found.high:.{places}f}]"
    return shown if resolved else f"not resolved: {shown}"


def points_text(found: Number) -> str:
    """A difference (a fraction) in percentage points with its sign: +0.5 [-1.0, +2.0]."""
    ends = "(no interval)" if math.isnan(found.low) else f"[{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"{100 * found.value:+.1f} {ends}"


def judged_text(found: Number) -> str:
    """A difference in points with its verdict in a word or three; none for what stands on too few seeds."""
    if not isinstance(found, Difference) or found.n < MIN_SEEDS:
        return GAP
    return f"{points_text(found)} {judge_difference(found).word}"


def nats_text(found: Number) -> str:
    """A difference of losses: +0.110 [+0.085, +0.136]."""
    ends = "(no interval)" if math.isnan(found.low) else f"[{found.low:+.3f}, {found.high:+.3f}]"
    return f"{found.value:+.3f} {ends}"


def ours_text(found: Number | str | None) -> str:
    """Our side of a claim."""
    if found is None or isinstance(found, str):
        return found or GAP
    return f"{points_text(found)} points" if isinstance(found, Difference) else ratio_text(found)


def digits(value: float | None) -> str:
    """Three significant digits without exponents: 0.0312, 1.29, 12.9, 1290."""
    if value is None or math.isnan(value):
        return GAP
    if value == 0 or math.isinf(value):
        return f"{value:g}"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def plain(form: str, value: float) -> str:
    """A bare value by the name of its format, as a column of tables.yaml gives it."""
    if form in SCALED:
        scale, template = SCALED[form]
        return template.format(scale * value)
    if form == "yes":
        return "yes" if value else "no"
    return count(value) if form == "count" else digits(value)


def count(value: float) -> str:
    """A count with its unit: 7.07 G."""
    unit, scale = next((unit, scale) for unit, scale in UNITS if abs(value) >= scale or scale == 1)
    return f"{digits(value / scale)} {unit}".strip()


def percent_text(ratio: float) -> str:
    """A ratio as the paper prints it: 1.29 is +29 %."""
    extra = 100 * (ratio - 1)
    return f"{extra:+.0f} %" if abs(extra) >= 10 else f"{extra:+.2g} %"


# formats of a number with its interval
WITH_INTERVAL: dict[str, Callable[[Number], str]] = {"interval": ratio_text, "points": points_text}
WITH_INTERVAL |= {"nats": nats_text, "judged": judged_text}
