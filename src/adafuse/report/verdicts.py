"""The rules of judgement, written down before looking: when a printed number counts as replicated.

In: the paper's number and ours with its interval. Out: a verdict and the reason in words. Next: on_par.py.

Ratios (latency, layers, memory). The paper gives no interval, prints two digits (a ratio is known to 4 %) and
disagrees with itself by up to 14 % (2.4 times in the abstract, 8.5 / 3.1 = 2.7 in Table 6): its number stands
for a band of CLOSE to either side; for memory, printed to three digits, of CLOSE_MEMORY. Memory is a ratio of two
processes' peaks and has no interval: what is allocated does not vary.
- `about`: replicated if our value lies in the band; in part if it does not but is on the same side of 1, beyond its
  interval, and what is above 1 is within a factor of PART of what the paper has above it; else not. Not decided if the
  interval is wider than a factor of WIDE and its ends would be judged differently: noise must not count for the paper,
  nor against it, and does not matter where both ends say the same.
- `at_most` (AdaFuse's cost in time and memory): replicated if our interval ends below the band's top; in part
  if it straddles the top; not replicated if it starts above it.
- `at_least` (AdaFuse's gain): the mirror image, except that a gain too small but above 1 is replicated in
  part.
- A ratio that the A/A arm does not resolve from 1 is not replicated where the paper's band excludes 1.
- An interval that holds both 1 and the paper's number cannot tell: not decided.
Until records were in, an interval that met the band was enough, however wide, and any excess of the right sign was in
part: a review found that this rewarded noise, and called 32.9 times for 1.67 a partial success.

Order of rows: replicated if every step is slower beyond its interval and the A/A arm; in part if some are.
Parameters and MACs: the added share by the rule of `about`; counts, judged on any device, but only on a backbone of at
least COST_PARAMS parameters, because the share of an adapter falls with the width of the model.
Accuracy (on_par.py): "on par" is an equivalence test, not the absence of a difference. It needs MIN_SEEDS seeds; the
margin is MARGIN points. Replicated if the 90 % interval of the paired difference lies within ± MARGIN (two one-sided
tests at 5 %) or above -MARGIN altogether (not worse; "better" if the 90 % interval lies beyond MARGIN or
the 95 % interval above 0); else not replicated if the 95 % interval lies wholly below 0 and reaches past -MARGIN; else
not decided, and the reason says how many seeds it would take.
Absolute milliseconds are never compared. The paper's claims are about a GPU: a time or a memory measured on a CPU
leaves them not testable, and the reason says what the rule would give.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from adafuse.report.cells import Cell, model_name
from adafuse.stats import Difference, Interval

REPLICATED, IN_PART, NOT_REPLICATED = "replicated", "replicated in part", "not replicated"
NOT_DECIDED, NOT_TESTABLE = "not decided", "not testable here"
CLOSE = 1.10
PART = 3.0
WIDE = 1.5
CLOSE_MEMORY = 1.02
COST_PARAMS = 1e9
MIN_SEEDS = 5
MARGIN = 2.0


def _percent(factor: float) -> str:
    return f"{100 * (factor - 1):.0f} %"


RULES = (
    "Rules (`src/adafuse/report/verdicts.py`): a ratio is replicated if our value lies within the paper's number "
    f"± {_percent(CLOSE)} (memory ± {_percent(CLOSE_MEMORY)}), in part if what it has above 1 is within a factor of "
    f"{PART:g} of the paper's, and not decided if our interval is wider than a factor of {WIDE:g} and its ends would "
    "be judged differently, or holds both 1 and the paper's number; a bound is replicated if our 95 % interval stays "
    f"on its side or within {_percent(CLOSE)} of it, in part if it straddles that, or is a gain all the same; what "
    "the A/A arm does not tell from 1 is not replicated where the paper's number is another. An order of rows is "
    "replicated if every step is slower beyond its interval, in part if some are; a count if the added share is within "
    f"{_percent(CLOSE)}, in part within a factor of {PART:g}. Accuracy is on par, over {MIN_SEEDS} seeds or more, "
    f"if a paired equivalence test at 5 % with a margin of {MARGIN:g} points says so; better or not worse (the 90 % "
    f"interval above -{MARGIN:g}) counts as replicated too, worse (the 95 % interval below 0 and past -{MARGIN:g}) as "
    "not replicated. The paper's absolute milliseconds are never compared."
)


@dataclass
class Claim:
    """One printed number: where, what it says, ours, the verdict and why. `cell` is the heading it stands
    under.
    """

    cell: str
    where: str
    text: str
    printed: str
    ours: Interval | Difference | str | None
    verdict: str
    why: str
    files: list[str] = field(default_factory=list)


Sense = Literal["about", "at_most", "at_least"]
Verdict = tuple[str, str]


def judge_ratio(
    paper: float,
    ours: Interval | None,
    sense: Sense,
    resolved: bool = True,
    reason: str | None = None,
    close: float = CLOSE,
) -> Verdict:
    """Judge a ratio; `reason` says why it is missing, `resolved` whether the A/A arm tells it from 1."""
    if ours is None:
        return NOT_TESTABLE, reason or "not measured"
    low, high, basis = _ends(ours)
    if sense == "about" and low <= 1 <= high and low <= paper <= high and not _meets(paper, 1, 1, close):
        return NOT_DECIDED, f"the interval holds both 1 and the paper's number{basis}"
    if sense == "about" and high > WIDE * low and len(_judged_at_ends(paper, low, high, close)) > 1:
        return NOT_DECIDED, f"the interval spans a factor of {high / low:.1f}{basis}"
    if not resolved and not _meets(paper, 1, 1, close) and sense != "at_most":
        return NOT_REPLICATED, f"no difference that the A/A arm resolves{basis}"
    if sense == "about":
        verdict, why = _about(paper, ours.ratio, low, high, close)
    else:
        verdict, why = {"at_most": _at_most, "at_least": _at_least}[sense](paper, low, high, close)
    return verdict, why + basis


def judge_above_one(ours: Interval) -> Verdict:
    """Judge a claim that only says: more than 1."""
    low, high, basis = _ends(ours)
    if low > 1:
        return REPLICATED, f"the interval lies above 1{basis}"
    if high < 1:
        return NOT_REPLICATED, f"the interval lies below 1{basis}"
    return NOT_DECIDED, f"the interval holds 1{basis}"


def judge_order(steps: list[tuple[str, str, bool | None, str | None]]) -> Verdict:
    """Judge an order of rows from `(slow, fast, slower, reason)`; `slower` is None without a time."""
    absent = [f"{slow} > {fast} ({reason})" for slow, fast, slower, reason in steps if slower is None]
    wrong = [f"{slow} > {fast}" for slow, fast, slower, _ in steps if slower is False]
    right = [step for step in steps if step[2]]
    if len(absent) == len(steps):
        return NOT_TESTABLE, f"no step was timed: {absent[0]}"
    why = "; ".join(
        [
            *([f"does not hold: {', '.join(wrong)}"] if wrong else []),
            *([f"not timed: {', '.join(absent)}"] if absent else []),
        ]
    )
    if len(right) == len(steps):
        return REPLICATED, "every step is slower beyond its interval"
    return (IN_PART if right else NOT_REPLICATED), why


def judge_cost(paper: float, ours: Interval | None, base_params: float | None, reason: str | None) -> Verdict:
    """Judge a count of parameters or MACs over the backbone's."""
    if ours is None or base_params is None:
        return NOT_TESTABLE, reason or "no cost line in the record"
    if base_params < COST_PARAMS:
        return (
            NOT_TESTABLE,
            f"an adapter's share falls with the width, so it takes {COST_PARAMS / 1e9:g} billion parameters",
        )
    excess = (ours.ratio - 1) / (paper - 1)
    if 1 / CLOSE <= excess <= CLOSE:
        return REPLICATED, "the added share is within the band"
    verdict = IN_PART if 1 / PART <= excess <= PART else NOT_REPLICATED
    return verdict, f"the added share is {excess:.2g} times the paper's, whose rank and targets are unstated"


def on_cell(cell: Cell, why: str) -> str:
    """The reason, with the machine in front where it is not a GPU."""
    return f"on CPU, {model_name(cell.config)} backbone: {why}" if cell.is_cpu else why


def timed_on(cell: Cell, verdict: str, why: str) -> Verdict:
    """A time measured on a CPU judges no claim about a GPU, whichever way it points; what the rule gives is said."""
    if not cell.is_cpu or verdict == NOT_TESTABLE:
        return verdict, on_cell(cell, why)
    return NOT_TESTABLE, on_cell(cell, f"needs a GPU; here the rule gives “{verdict}”: {why}")


def _about(paper: float, value: float, low: float, high: float, close: float) -> Verdict:
    if _meets(paper, value, value, close):
        return REPLICATED, f"our value lies within the paper's number ± {_percent(close)}"
    if (low > 1) != (paper > 1) or (high > 1) != (paper > 1):
        return NOT_REPLICATED, "another direction than printed"
    excess = (value - 1) / (paper - 1)
    why = f"same direction, {excess:.2g} times what the paper has above 1"
    return (IN_PART if 1 / PART <= excess <= PART else NOT_REPLICATED), why


def _judged_at_ends(paper: float, low: float, high: float, close: float) -> set[str]:
    return {_about(paper, end, end, end, close)[0] for end in (low, high)}


def _at_most(paper: float, low: float, high: float, close: float) -> Verdict:
    top = paper * close
    if high <= top:
        return (
            REPLICATED,
            f"{_said(low, high, 'ends')} below {top:.2f}, the printed bound + {_percent(close)}",
        )
    if low <= top:
        return IN_PART, f"our interval straddles {top:.2f}, the printed bound + {_percent(close)}"
    return (
        NOT_REPLICATED,
        f"{_said(low, high, 'starts')} above {top:.2f}, the printed bound + {_percent(close)}",
    )


def _at_least(paper: float, low: float, high: float, close: float) -> Verdict:
    bottom = paper / close
    if low >= bottom:
        return (
            REPLICATED,
            f"our interval starts above {bottom:.2f}, the printed bound within {_percent(close)}",
        )
    if low > 1:
        return IN_PART, f"a gain, but our interval starts at {low:.3f}, below {bottom:.3f}"
    if high >= bottom:
        return NOT_DECIDED, "the interval holds both 1 and the paper's number"
    return NOT_REPLICATED, "no gain beyond the interval"


def _said(low: float, high: float, verb: str) -> str:
    """What the reason is about: an interval, or a value that has none."""
    return f"our interval {verb}" if low < high else "our value lies"


def _meets(paper: float, low: float, high: float, close: float) -> bool:
    return low <= paper * close and high >= paper / close


def _ends(ours: Interval) -> tuple[float, float, str]:
    """The interval, or the bare ratio where nothing varied, with a word on how little stands behind it."""
    if math.isnan(ours.low):
        return ours.ratio, ours.ratio, f" ({ours.method})"
    return (
        ours.low,
        ours.high,
        f" ({ours.method})" if ours.n_processes == 1 and ours.method != "counted" else "",
    )
