"""How numbers are printed, everywhere in the report: three digits, an interval, a unit, or the reason for a
gap.

In: numbers, intervals, sizes. Out: short strings. Next: tables.py.
"""

from __future__ import annotations

import math

from adafuse.stats import Difference, Interval

GAP = "–"


def ratio_text(found: Interval | None, resolved: bool = True, reason: str | None = None) -> str:
    """1.29 [1.25, 1.33]; with a word in front when the A/A arm differs as much."""
    if found is None:
        return reason or GAP
    if found.low == found.high or math.isnan(found.low):
        return (
            f"{digits(found.ratio)} (no interval)"
            if math.isnan(found.low)
            else f"{found.ratio:.4f} (counted)"
        )
    # As many decimals as the interval's width deserves.
    places = min(4, max(2, math.ceil(-math.log10(found.high - found.low))))
    shown = f"{found.ratio:.{places}f} [{found.low:.{places}f}, {found.high:.{places}f}]"
    return shown if resolved else f"not resolved: {shown}"


def points_text(found: Difference | None, reason: str | None = None) -> str:
    """A difference in percentage points with its sign: +0.5 [-1.0, +2.0]."""
    if found is None:
        return reason or GAP
    value, low, high = (100 * x for x in (found.value, found.low, found.high))
    ends = "(no interval)" if math.isnan(low) else f"[{low:+.1f}, {high:+.1f}]"
    return f"{value:+.1f} {ends}"


def digits(value: float | None) -> str:
    """Three significant digits without exponents: 0.0312, 1.29, 12.9, 1290."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return GAP
    if value == 0:
        return "0"
    places = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{places}f}"


def short(value: object) -> str:
    """Three digits, with an exponent where needed; "none" for a value that was not finite."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return "none" if value is None else str(value)
    return f"{value:.3g}"


def count_text(value: float | None, base: float | None = None) -> str:
    """A count with its unit and, against a base, what it adds: 7.07 G (+4.9 %)."""
    if value is None:
        return GAP
    unit, scale = next(
        (u, s) for u, s in (("G", 1e9), ("M", 1e6), ("k", 1e3), ("", 1.0)) if value >= s or s == 1
    )
    shown = f"{digits(value / scale)} {unit}".strip()
    return shown if not base or value == base else f"{shown} ({percent_text(value / base)})"


def percent_text(ratio: float) -> str:
    """A ratio as the paper prints it: 1.29 is +29 %."""
    extra = 100 * (ratio - 1)
    return f"{extra:+.0f} %" if abs(extra) >= 10 else f"{extra:+.2g} %"
