"""How numbers are printed, everywhere in the report: three digits, an interval, a unit, or the reason for a
gap; and what is said under several tables.

In: numbers, intervals, sizes. Out: short strings. Next: tables.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from adafuse.stats import Difference, Interval

GAP = "–"
FLOOR_NOTE = (
    "time / floor: the floor is the time to read (and where a strategy merges, write) each byte that a token needs "
    "once, at the read bandwidth measured in the same process."
)
CHECK_NOTE = (
    "check: of all that an arm had to meet before it was timed, the value that came nearest to its bound; each of them "
    "stands in table checks."
)
MEMORY_NOTE = (
    "Memory is measured apart, one arm a process (experiment=table5). weights: counted from the tensors that the arm "
    "needs. peak: the most that torch's allocator held while the installed adapter ran, prefill and decode; with load: "
    "in the whole process. process: what the driver counts, CUDA's context included; on a CPU the peak resident set. "
    "What each arm had to meet before it was timed stands in table checks."
)
CAPTURED = (
    "Each ratio is to the plain backbone in the same runtime. Strategy fused is built on a matrix-vector product of "
    "our own, which may beat the library's: its second ratio is to the backbone through that product."
)


def ratio_text(found: Interval | None, resolved: bool = True, reason: str | None = None) -> str:
    """1.29 [1.25, 1.33]; with a word in front when the A/A arm differs as much."""
    if found is None:
        return reason or GAP
    if found.low == found.high or math.isnan(found.low):
        return (
            f"{digits(found.ratio)} (no interval)"
            if math.isnan(found.low)
            else f"{found.ratio:.4f} ({found.method})"
        )
    # As many decimals as the interval's width deserves.
    places = min(4, max(2, math.ceil(-math.log10(found.high - found.low))))
    shown = f"{found.ratio:.{places}f} [{found.low:.{places}f}, {found.high:.{places}f}]"
    return shown if resolved else f"not resolved: {shown}"


def process_text(found: Interval | None, resolved: bool = True) -> str:
    """A ratio with its interval, and how little stands behind it where it is one process."""
    once = found is not None and found.n_processes == 1
    return ratio_text(found, resolved) + (" (one process)" if once else "")


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


def share_text(value: float | None) -> str:
    """A share of a whole: 0.531 is 53 %."""
    return GAP if value is None else f"{100 * value:.0f} %"


def bound_text(check: Mapping[str, Any] | None) -> str:
    """A check and how near its bound it came: logits 0.0041 of 0.0885; where none may differ: greedy 0 of 0."""
    if check is None:
        return GAP
    said = f"{check['check']} {short(check['value'])} of {short(check['bound'])}"
    return said if check["passed"] else f"failed: {said}"


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


def times_text(ratio: float | None) -> str:
    """A ratio that the paper prints as a percentage: 1.29 (+29 %)."""
    if ratio is None:
        return GAP
    return "1" if ratio == 1 else f"{digits(ratio)} ({percent_text(ratio)})"


def printed_text(value: float | None, unit: str = "") -> str:
    """A number as the paper prints it."""
    return GAP if value is None else f"{value}{unit}"


def more_text(value: float | None, base: float, unit: str = "") -> str:
    """A printed number and what it adds to the printed base: 13.8 (+7.0 %)."""
    shown = printed_text(value, unit)
    return shown if value is None or value == base else f"{shown} ({percent_text(value / base)})"
