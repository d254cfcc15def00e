"""The rules of judgement, fixed before looking: when a printed number counts as replicated.

In: the paper's number and ours with its interval. Out: a `Verdict`: what, why in words, and for accuracy a word or two
as data. The rules in prose, with these constants: templates/rules.md.j2. Next: claims.py.

Why they are as they are. The paper gives no interval, prints two digits (a ratio is known to 4 %) and disagrees with
itself by up to 14 % (2.4 times in the abstract, 8.5 / 3.1 = 2.7 in Table 6): its number stands for a band of CLOSE to
either side; for memory, printed to three digits, of CLOSE_MEMORY. Until records were in, an interval that met the band
was enough, however wide, and any excess of the right sign was in part: a review found that this rewarded noise.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

from adafuse.stats import LEVEL, MOST_SEEDS, SIZE, seeds_needed

REPLICATED, IN_PART, NOT_REPLICATED = "replicated", "replicated in part", "not replicated"
NOT_DECIDED, NOT_TESTABLE = "not decided", "not testable here"
VERDICTS = (REPLICATED, IN_PART, NOT_REPLICATED, NOT_DECIDED, NOT_TESTABLE)
BETTER, ON_PAR, NOT_WORSE, WORSE = "better", "on par", "not worse", "worse"
MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
CLOSE, PART, WIDE, CLOSE_MEMORY = 1.10, 3.0, 1.5, 1.02
# an adapter's share of the parameters falls with the width of the model
COST_PARAMS = 1e9
MIN_SEEDS = 5
# points of accuracy
MARGIN = 2.0

Sense = Literal["about", "at_most", "at_least"]


@dataclass(frozen=True)
class Number:
    """A measured number: `low` and `high` are nan without an interval, `method` says how that was made, `n` is of
    processes or seeds.
    """

    value: float
    low: float = math.nan
    high: float = math.nan
    n: int = 1
    method: str = ""

    @property
    def ends(self) -> tuple[float, float]:
        """The interval, or the bare value twice."""
        return (self.value, self.value) if math.isnan(self.low) else (self.low, self.high)

    @property
    def basis(self) -> str:
        """A remark on how little stands behind it, for the end of a reason."""
        thin = math.isnan(self.low) or (self.n == 1 and self.method != "counted")
        return f" ({self.method})" if thin and self.method else ""


@dataclass(frozen=True)
class Difference(Number):
    """A paired difference of accuracies (a fraction): `low90`, `high90` and `p` are of the test of equivalence,
    `spread` is the standard deviation between seeds; all nan for one seed.
    """

    low90: float = math.nan
    high90: float = math.nan
    p: float = math.nan
    spread: float = math.nan


@dataclass(frozen=True)
class Verdict:
    """What the rule says, why in words, and the finer word that sentences use of accuracy and of goals."""

    verdict: str
    why: str
    word: str = ""


def judge_ratio(
    paper: float,
    ours: Number | None,
    sense: Sense,
    resolved: bool = True,
    reason: str = "",
    close: float = CLOSE,
) -> Verdict:
    """Judge a ratio; `reason` says why it is missing, `resolved` whether the A/A arm tells it from 1."""
    if ours is None:
        return Verdict(NOT_TESTABLE, reason or "not measured")
    low, high = ours.ends
    beyond_one = not _meets(paper, 1, close)
    judged_at_ends = {_about(paper, end, end, end, close).verdict for end in (low, high)}
    if sense == "about" and low <= 1 <= high and low <= paper <= high and beyond_one:
        found = Verdict(NOT_DECIDED, "the interval holds both 1 and the paper's number")
    elif sense == "about" and high > WIDE * low and len(judged_at_ends) > 1:
        found = Verdict(NOT_DECIDED, f"the interval spans a factor of {high / low:.1f}")
    elif not resolved and beyond_one and sense != "at_most":
        found = Verdict(NOT_REPLICATED, "no difference that the A/A arm resolves")
    elif sense == "about":
        found = _about(paper, ours.value, low, high, close)
    else:
        found = (_at_most if sense == "at_most" else _at_least)(paper, low, high, close)
    return replace(found, why=found.why + ours.basis)


def judge_above_one(ours: Number) -> Verdict:
    """Judge a claim that only says: more than 1."""
    low, high = ours.ends
    if low > 1 or high < 1:
        verdict, where = (REPLICATED, "above") if low > 1 else (NOT_REPLICATED, "below")
        return Verdict(verdict, f"the interval lies {where} 1{ours.basis}")
    return Verdict(NOT_DECIDED, f"the interval holds 1{ours.basis}")


def judge_order(steps: list[tuple[str, str, bool | None, str]]) -> Verdict:
    """Judge an order of rows, each slower than the next, from (slow, fast, slower, reason); `slower` is None without a
    time, and `reason` says why.
    """
    absent = [f"{slow} > {fast} ({reason})" for slow, fast, slower, reason in steps if slower is None]
    wrong = [f"{slow} > {fast}" for slow, fast, slower, _ in steps if slower is False]
    if len(absent) == len(steps):
        return Verdict(NOT_TESTABLE, f"no step was timed: {absent[0]}")
    if not absent and not wrong:
        return Verdict(REPLICATED, "every step is slower beyond its interval")
    told = [f"does not hold: {', '.join(wrong)}"] if wrong else []
    told += [f"not timed: {', '.join(absent)}"] if absent else []
    right = len(steps) - len(absent) - len(wrong)
    return Verdict(IN_PART if right else NOT_REPLICATED, "; ".join(told))


def judge_cost(paper: float, ours: Number | None, base_params: float | None, reason: str = "") -> Verdict:
    """Judge a count of parameters or MACs over the backbone's."""
    if ours is None or base_params is None:
        return Verdict(NOT_TESTABLE, reason or "no cost line in the record")
    if base_params < COST_PARAMS:
        least = f"{COST_PARAMS / 1e9:g} billion parameters"
        return Verdict(NOT_TESTABLE, f"an adapter's share falls with the width, so it takes {least}")
    excess = (ours.value - 1) / (paper - 1)
    if 1 / CLOSE <= excess <= CLOSE:
        return Verdict(REPLICATED, "the added share is within the band")
    why = f"the added share is {excess:.2g} times the paper's, whose rank and targets are unstated"
    return Verdict(IN_PART if 1 / PART <= excess <= PART else NOT_REPLICATED, why)


def judge_difference(ours: Difference | None, reason: str = "") -> Verdict:
    """Judge "no worse": a paired difference, better upwards; `reason` says why it is missing."""
    if ours is None:
        return Verdict(NOT_TESTABLE, reason, NOT_DECIDED)
    if ours.n < MIN_SEEDS:
        few = f"only {ours.n} of {MIN_SEEDS} seeds were run ({ours.method})"
        return Verdict(NOT_TESTABLE, few, NOT_DECIDED)
    ends = f"90 % interval [{100 * ours.low90:+.1f}, {100 * ours.high90:+.1f}]"
    if ours.p < SIZE:
        p = "p < 0.001" if ours.p < 0.001 else f"p = {ours.p:.2g}"
        return Verdict(REPLICATED, f"the {ends} lies within ± {MARGIN:g} points ({p})", ON_PAR)
    if 100 * ours.low90 > -MARGIN:
        word = BETTER if ours.low > 0 or 100 * ours.low90 > MARGIN else NOT_WORSE
        return Verdict(REPLICATED, f"{word}: the {ends} lies above -{MARGIN:g}", word)
    if ours.high < 0 and 100 * ours.low < -MARGIN:
        why = (
            f"the 95 % interval [{100 * ours.low:+.1f}, {100 * ours.high:+.1f}] lies below 0 and reaches past"
        )
        return Verdict(NOT_REPLICATED, f"{WORSE}: {why} -{MARGIN:g} points", WORSE)
    return Verdict(NOT_DECIDED, f"the {ends} is too wide to tell; {_seeds_text(ours)}", NOT_DECIDED)


def judge_goal(
    bound: float, ours: Number | None, sense: Sense, unit: str = "", failed: bool = False
) -> Verdict:
    """Judge a goal of our own by the measured value; an interval that holds the bound is named."""
    if failed or ours is None:
        word = MISSED if failed else NOT_MEASURED
        return Verdict(f"{word}: a line has no time" if failed else word, "", word)
    beyond = ours.value - bound if sense == "at_most" else bound - ours.value
    doubt = ", but the interval holds the bound" if ours.low <= bound <= ours.high else ""
    if beyond <= 0:
        return Verdict(MET + doubt, "", MET)
    short = f"{100 * beyond:.2g} points" if unit == "%" else f"{beyond:.2g} {unit}".strip()
    return Verdict(f"{MISSED} by {short}{doubt}", "", MISSED)


def on_device(found: Verdict, of_time: bool, is_cpu: bool, model: str) -> Verdict:
    """A time or a memory measured on a CPU judges no claim about a GPU, whichever way it points; what the rule gives
    is said. A count or an accuracy is judged anywhere, and says where.
    """
    if not is_cpu:
        return found
    where = f"on CPU, {model} backbone"
    if not of_time or found.verdict == NOT_TESTABLE:
        return replace(found, why=f"{where}: {found.why}")
    why = f"{where}: needs a GPU; here the rule gives “{found.verdict}”: {found.why}"
    return replace(found, verdict=NOT_TESTABLE, why=why)


def _about(paper: float, value: float, low: float, high: float, close: float) -> Verdict:
    if _meets(paper, value, close):
        return Verdict(REPLICATED, f"our value lies within the paper's number ± {_percent(close)}")
    if (low > 1) != (paper > 1) or (high > 1) != (paper > 1):
        return Verdict(NOT_REPLICATED, "another direction than printed")
    excess = (value - 1) / (paper - 1)
    why = f"same direction, {excess:.2g} times what the paper has above 1"
    return Verdict(IN_PART if 1 / PART <= excess <= PART else NOT_REPLICATED, why)


def _at_most(paper: float, low: float, high: float, close: float) -> Verdict:
    top = paper * close
    bound = f"{top:.2f}, the printed bound + {_percent(close)}"
    # what a reason is about: an interval, or a value that has none
    ends, starts = ("our interval ends", "our interval starts") if low < high else ("our value lies",) * 2
    if high <= top:
        return Verdict(REPLICATED, f"{ends} below {bound}")
    return (
        Verdict(IN_PART, f"our interval straddles {bound}")
        if low <= top
        else Verdict(NOT_REPLICATED, f"{starts} above {bound}")
    )


def _at_least(paper: float, low: float, high: float, close: float) -> Verdict:
    bottom = paper / close
    if low >= bottom:
        why = f"our interval starts above {bottom:.2f}, the printed bound within {_percent(close)}"
        return Verdict(REPLICATED, why)
    if low > 1:
        return Verdict(IN_PART, f"a gain, but our interval starts at {low:.3f}, below {bottom:.3f}")
    if high >= bottom:
        return Verdict(NOT_DECIDED, "the interval holds both 1 and the paper's number")
    return Verdict(NOT_REPLICATED, "no gain beyond the interval")


def _meets(paper: float, value: float, close: float) -> bool:
    return paper / close <= value <= paper * close


def _percent(factor: float) -> str:
    return f"{100 * (factor - 1):.0f} %"


def _seeds_text(ours: Difference) -> str:
    """How many seeds would decide as often as not, if difference and spread were just those seen: the interval then
    ends at its bound on average.
    """
    above = 100 * ours.value + MARGIN
    # above the margin the 90 % interval has to end before it; below it the 95 % interval before 0
    half, level = (above / 100, 1 - 2 * SIZE) if above > 0 else (-ours.value, LEVEL)
    count = seeds_needed(ours.spread, half, level)
    many = f"about {count} seeds" if count else f"only more than {MOST_SEEDS:,} seeds"
    seen = f"{100 * ours.value:+.1f} points and seeds go on differing by {100 * ours.spread:.1f} points"
    return f"{many} would give even odds if the difference is {seen}"
