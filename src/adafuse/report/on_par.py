"""When two methods are on par: an equivalence test over seeds, with the margin of verdicts.py.

In: a paired difference. Out: a verdict and the reason in words, or the numbers behind it in one line. Next:
claims_accuracy.py.
"""

from __future__ import annotations

import math

from adafuse.report.text import points_text
from adafuse.report.verdicts import (
    MARGIN,
    MIN_SEEDS,
    NOT_DECIDED,
    NOT_REPLICATED,
    NOT_TESTABLE,
    REPLICATED,
    Verdict,
)
from adafuse.stats import LEVEL, MOST_SEEDS, SIZE, Difference, Equivalence, equivalence, seeds_needed

BETTER, ON_PAR, NOT_WORSE, WORSE = "better", "on par", "not worse", "worse"


def judge_difference(ours: Difference | None, reason: str) -> Verdict:
    """Judge "no worse": ours is a paired difference as a fraction, better upwards; `reason` says why it is missing."""
    if ours is None:
        return NOT_TESTABLE, reason
    if ours.n_seeds < MIN_SEEDS:
        return NOT_TESTABLE, f"only {ours.n_seeds} of {MIN_SEEDS} seeds were run ({ours.method})"
    found = equivalent(ours)
    assert found is not None
    ends = _ends(found.low, found.high, "90 %")
    if found.p < SIZE:
        return REPLICATED, f"the {ends} lies within ± {MARGIN:g} points ({p_text(found)})"
    if 100 * found.low > -MARGIN:
        better = ours.low > 0 or 100 * found.low > MARGIN
        return (
            REPLICATED,
            f"{BETTER if better else NOT_WORSE}: the {ends} lies above -{MARGIN:g}",
        )
    if ours.high < 0 and 100 * ours.low < -MARGIN:
        worse = _ends(ours.low, ours.high, "95 %")
        return NOT_REPLICATED, f"worse: the {worse} lies below 0 and reaches past -{MARGIN:g} points"
    return NOT_DECIDED, f"the {ends} is too wide to tell; {_seeds_text(ours)}"


def verdict_word(ours: Difference) -> str:
    """The same verdict in a word or three, as sentences have it; `ours` has the seeds that it takes."""
    verdict, why = judge_difference(ours, "")
    if verdict == NOT_REPLICATED:
        return WORSE
    if verdict != REPLICATED:
        return NOT_DECIDED
    tested = equivalent(ours)
    return ON_PAR if tested and tested.p < SIZE else why.split(":")[0]


def is_not_worse(ours: Difference) -> bool:
    """True if the 90 % interval lies above -MARGIN; with one seed, the interval over its items."""
    found = equivalent(ours)
    return 100 * (found.low if found else ours.low) > -MARGIN


def margin_text(ours: Difference) -> str:
    """A difference with the interval that `is_not_worse` looks at."""
    found = equivalent(ours)
    return (
        f"{100 * ours.value:+.1f} points, {_ends(found.low, found.high, '90 %')}"
        if found
        else points_text(ours)
    )


def equivalent(ours: Difference) -> Equivalence | None:
    """The test of a difference against MARGIN; None for one seed."""
    return equivalence(ours.by_seed, MARGIN / 100) if ours.n_seeds > 1 else None


def difference_text(ours: Difference) -> str:
    """The difference, its interval, the test, and where the noise comes from, in points."""
    found = equivalent(ours)
    said = f"{points_text(ours)} points ({ours.method}"
    if found:
        said += f"; equivalent within ± {MARGIN:g}: {p_text(found)}; between seeds {_points(ours.spread)}"
    items = "" if math.isnan(ours.items_error) else f", items of a seed {_points(ours.items_error)}"
    return said + items + ")"


def p_text(found: Equivalence) -> str:
    """p = 0.013, or p < 0.001."""
    return "p < 0.001" if found.p < 0.001 else f"p = {found.p:.2g}"


def _seeds_text(ours: Difference) -> str:
    """How many seeds would decide as often as not, if difference and spread were just those seen: the interval then
    ends at its bound on average.
    """
    above = 100 * ours.value + MARGIN
    # above the margin the 90 % interval has to end before it; below it the 95 % interval before 0
    half, level = (above / 100, 1 - 2 * SIZE) if above > 0 else (-ours.value, LEVEL)
    count = seeds_needed(ours.spread, half, level)
    differ = f"if the difference is {100 * ours.value:+.1f} points and seeds go on differing by {_points(ours.spread)}"
    many = f"about {count} seeds" if count else f"only more than {MOST_SEEDS:,} seeds"
    return f"{many} would give even odds {differ}"


def _ends(low: float, high: float, level: str) -> str:
    return f"{level} interval [{100 * low:+.1f}, {100 * high:+.1f}]"


def _points(value: float) -> str:
    return f"{100 * value:.1f} points"
