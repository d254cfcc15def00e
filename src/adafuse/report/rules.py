"""The rules of judgement, written down: when a printed number counts as replicated.

In: the paper's number and ours with its interval. Out: a `Verdict`. In prose, and why they are so:
templates/rules.md.j2. They are frozen: `SHA256` is their `digest`. Who changes one gives it a new date, and leaves the
old one in claims.yaml as what counted `before`. Next: claims.py.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

from adafuse.stats import LEVEL, MOST_SEEDS, SIZE, holm, not_worse, seeds_needed

SINCE = "2026-12-01"
SHA256 = "3fb8ead2153cb04738187ddb87d94a1f5a1f68162b00f028b2e34005ba0d7fc8"
REPLICATED, IN_PART, NOT_REPLICATED = "replicated", "replicated in part", "not replicated"
NOT_DECIDED, NOT_TESTABLE, WITHDRAWN = "not decided", "not testable here", "withdrawn"
VERDICTS = (REPLICATED, IN_PART, NOT_REPLICATED, NOT_DECIDED, NOT_TESTABLE, WITHDRAWN)
BETTER, ON_PAR, NOT_WORSE, WORSE = "better", "on par", "not worse", "worse"
MET, MISSED, NOT_MEASURED = "met", "missed", "not measured"
CLOSE, PART, WIDE, CLOSE_MEMORY = 1.10, 3.0, 1.5, 1.02
# an adapter's share of the parameters falls with the width of the model
COST_PARAMS = 1e9
MIN_SEEDS = 5
# points of accuracy
MARGIN = 2.0


@dataclass(frozen=True)
class Number:
    """A measured number over `n` processes or seeds; false where there is none, as `reason` says.

    `low` and `high` are nan without an interval; else `reason` says how that was made. Of a ratio of times, `hosts`:
    how many it is over, and if several, where the next host's would lie, and the interval within these (stats.py).
    `withdrawn`: why it is not to be relied on, until it is measured anew.
    """

    value: float = math.nan
    low: float = math.nan
    high: float = math.nan
    n: int = 1
    reason: str = NOT_MEASURED
    records: tuple[str, ...] = ()
    withdrawn: str = field(default="", kw_only=True)
    hosts: int = field(default=0, kw_only=True)
    predict_low: float = field(default=math.nan, kw_only=True)
    predict_high: float = field(default=math.nan, kw_only=True)
    within_low: float = field(default=math.nan, kw_only=True)
    within_high: float = field(default=math.nan, kw_only=True)

    def __bool__(self) -> bool:
        return not math.isnan(self.value)


@dataclass(frozen=True)
class Difference(Number):
    """A paired difference of accuracies (a fraction), its test of equivalence and deviation between seeds."""

    low90: float = math.nan
    high90: float = math.nan
    p: float = math.nan
    spread: float = math.nan


@dataclass(frozen=True)
class Verdict:
    """What a rule says, why in words, and the finer word that sentences use of accuracy and of goals; what the rule
    before `SINCE` says, if that is something else.
    """

    verdict: str
    why: str
    word: str = ""
    before: str = ""


def judge_ratio(paper: float, ours: Number, sense: str, seen: bool = True, close: float = CLOSE) -> Verdict:
    """Judge a ratio that is printed as `about` a number, or as `above_one`; until `SINCE` also as `at_most` or
    `at_least` one, by its better side.

    The first case that holds counts. `seen`: the A/A arm tells ours from 1.
    """
    if not ours:
        return Verdict(NOT_TESTABLE, ours.reason)
    point = math.isnan(ours.low) or ours.low == ours.high
    low, high = (ours.value, ours.value) if point else (ours.low, ours.high)
    bottom, top, band = paper / close, paper * close, f"{100 * (close - 1):.0f} %"
    unseen = not seen and not bottom <= 1 <= top
    both = low <= 1 <= high and low <= paper <= high and not bottom <= 1 <= top
    wide = high > WIDE * low
    if wide and sense == "about":
        wide = (
            len(
                {
                    judge_ratio(paper, Number(end), sense, close=close).verdict
                    for end in (low, ours.value, high)
                }
            )
            > 1
        )
    away = (low > 1) != (paper > 1) or (high > 1) != (paper > 1)
    excess = (ours.value - 1) / (paper - 1)
    most, least = f"{top:.2f}, the printed bound + {band}", f"{bottom:.2f}, the printed bound within {band}"
    ends, starts = ("value lies", "value lies") if point else ("interval ends", "interval starts")
    alike = f"no difference that the A/A arm resolves, where the paper has {100 * (paper - 1):+.0f} %"
    cases = {
        "about": (
            (both, NOT_DECIDED, "the interval holds both 1 and the paper's number"),
            (wide, NOT_DECIDED, f"the interval spans a factor of {high / low:.1f}"),
            (unseen, NOT_REPLICATED, alike),
            (bottom <= ours.value <= top, REPLICATED, f"our value lies within the paper's number ± {band}"),
            (away, NOT_REPLICATED, "another direction than printed"),
            (True, _in_part(excess), f"same direction, {excess:.2g} times what the paper has above 1"),
        ),
        "at_most": (
            (high <= top, REPLICATED, f"our {ends} below {most}"),
            (low <= top, IN_PART, f"our interval straddles {most}"),
            (True, NOT_REPLICATED, f"our {starts} above {most}"),
        ),
        "at_least": (
            (unseen, NOT_REPLICATED, alike),
            (low >= bottom, REPLICATED, f"our interval starts above {least}"),
            (low > 1, IN_PART, f"a gain, but our interval starts at {low:.3f}, below {bottom:.3f}"),
            (high >= bottom, NOT_DECIDED, "the interval holds both 1 and the paper's number"),
            (True, NOT_REPLICATED, "no gain beyond the interval"),
        ),
        "above_one": (
            (low > 1, REPLICATED, "the interval lies above 1"),
            (high < 1, NOT_REPLICATED, "the interval lies below 1"),
            (True, NOT_DECIDED, "the interval holds 1"),
        ),
    }
    verdict, why = next((verdict, why) for holds, verdict, why in cases[sense] if holds)
    thin = (math.isnan(ours.low) or ours.n == 1) and ours.reason not in ("", "counted")
    return Verdict(verdict, f"{why} ({ours.reason})" if thin else why)


def judge_order(steps: list[tuple[str, bool | None, str]]) -> Verdict:
    """Judge an order of rows by its steps: a name, whether it is slower (None without a time), and why that cannot be
    told; no reason where it is faster.
    """
    absent = [f"{step} ({reason})" for step, slower, reason in steps if slower is None]
    wrong = [step for step, slower, reason in steps if slower is False and not reason]
    alike = [step for step, slower, reason in steps if slower is False and reason]
    if len(absent) == len(steps):
        return Verdict(NOT_TESTABLE, f"no step was timed: {absent[0]}")
    if not absent and not wrong and not alike:
        return Verdict(REPLICATED, "every step is slower beyond its interval")
    parts = {"does not hold": wrong, "not told apart": alike, "not timed": absent}
    why = "; ".join(f"{word}: {', '.join(own)}" for word, own in parts.items() if own)
    if any(slower for _, slower, _ in steps):
        return Verdict(IN_PART, why)
    return Verdict(NOT_REPLICATED if wrong else NOT_DECIDED, why)


def judge_cost(paper: float, ours: Number, base_params: Number) -> Verdict:
    """Judge a count of parameters or MACs over the backbone's."""
    if not ours or not base_params:
        return Verdict(NOT_TESTABLE, (ours and base_params).reason)
    if base_params.value < COST_PARAMS:
        least = f"{COST_PARAMS / 1e9:g} billion parameters"
        return Verdict(NOT_TESTABLE, f"an adapter's share falls with the width, so it takes {least}")
    excess = (ours.value - 1) / (paper - 1)
    if 1 / CLOSE <= excess <= CLOSE:
        return Verdict(REPLICATED, "the added share is within the band")
    why = f"the added share is {excess:.2g} times the paper's, whose rank and targets are unstated"
    return Verdict(_in_part(excess), why)


def judge_difference(ours: Number) -> Verdict:
    """Judge "no worse": a paired difference, better upwards."""
    if not isinstance(ours, Difference):
        return Verdict(NOT_TESTABLE, ours.reason, NOT_DECIDED)
    if ours.n < MIN_SEEDS:
        few = f"only {ours.n} of {MIN_SEEDS} seeds were run ({ours.reason})"
        return Verdict(NOT_TESTABLE, few, NOT_DECIDED)
    low, high, low90, high90 = (100 * end for end in (ours.low, ours.high, ours.low90, ours.high90))
    within = f"the 90 % interval [{low90:+.1f}, {high90:+.1f}]"
    if ours.p < SIZE:
        p = "p < 0.001" if ours.p < 0.001 else f"p = {ours.p:.2g}"
        return Verdict(REPLICATED, f"{within} lies within ± {MARGIN:g} points ({p})", ON_PAR)
    if low90 > -MARGIN:
        word = BETTER if low > 0 or low90 > MARGIN else NOT_WORSE
        return Verdict(REPLICATED, f"{word}: {within} lies above -{MARGIN:g}", word)
    if high < 0 and low < -MARGIN:
        why = f"the 95 % interval [{low:+.1f}, {high:+.1f}] lies below 0 and reaches past -{MARGIN:g} points"
        return Verdict(NOT_REPLICATED, f"{WORSE}: {why}", WORSE)
    return Verdict(NOT_DECIDED, f"{within} is too wide to tell; {_seeds_text(ours)}", NOT_DECIDED)


def judge_family(told: list[tuple[Difference, Verdict]]) -> list[Verdict]:
    """Verdicts of claims that stand together, each "no worse": what counts as replicated must be so after Holm's
    correction too, or nothing is decided.
    """
    ps = holm([not_worse(ours.value, ours.low90, ours.n, MARGIN / 100) for ours, _ in told])
    return [
        Verdict(
            NOT_DECIDED,
            f"{found.why}; but not among {len(told)} claims (Holm: p = {p:.2g})",
            NOT_DECIDED,
            REPLICATED,
        )
        if found.verdict == REPLICATED and p >= SIZE
        else found
        for (_, found), p in zip(told, ps, strict=True)
    ]


def judge_goal(bound: float, ours: Number, sense: str, unit: str = "", failed: bool = False) -> Verdict:
    """Judge a goal of our own by the measured value; an interval that holds the bound is named."""
    if failed or not ours:
        word = MISSED if failed else NOT_MEASURED
        return Verdict(f"{word}: a line has no time" if failed else word, "", word)
    beyond = ours.value - bound if sense == "at_most" else bound - ours.value
    doubt = ", but the interval holds the bound" if ours.low <= bound <= ours.high else ""
    if beyond <= 0:
        return Verdict(MET + doubt, "", MET)
    short = f"{100 * beyond:.2g} points" if unit == "%" else f"{beyond:.2g} {unit}".strip()
    return Verdict(f"{MISSED} by {short}{doubt}", "", MISSED)


def on_cpu(found: Verdict, of_time: bool, model: str) -> Verdict:
    """A time or memory of a CPU judges no claim about a GPU; a count or an accuracy does, and says where."""
    where = f"on CPU, {model} backbone"
    if not of_time or found.verdict == NOT_TESTABLE:
        return replace(found, why=f"{where}: {found.why}", before="")
    why = f"{where}: needs a GPU; here the rule gives “{found.verdict}”: {found.why}"
    return replace(found, verdict=NOT_TESTABLE, why=why, before="")


def digest(groups: Iterable[dict[str, Any]]) -> str:
    """SHA-256 over the rules, but for white space: the functions that judge claims, their constants, and by which rule
    each claim in the `groups` of claims.yaml is judged.
    """
    judging = (
        judge_ratio,
        judge_order,
        judge_cost,
        judge_difference,
        judge_family,
        holm,
        not_worse,
        on_cpu,
        _in_part,
    )
    constants = (LEVEL, SIZE, CLOSE, PART, WIDE, CLOSE_MEMORY, COST_PARAMS, MIN_SEEDS, MARGIN)
    ruled = [(claim["id"], claim["kind"], claim["rule"]) for group in groups for claim in group["claims"]]
    text = json.dumps([[" ".join(inspect.getsource(one).split()) for one in judging], constants, ruled])
    return hashlib.sha256(text.encode()).hexdigest()


def _in_part(excess: float) -> str:
    return IN_PART if 1 / PART <= excess <= PART else NOT_REPLICATED


def _seeds_text(ours: Difference) -> str:
    """How many seeds would decide as often as not, if difference and spread were just those seen."""
    above = ours.value + MARGIN / 100
    # above the margin the 90 % interval has to end before it; below it the 95 % interval before 0
    half, level = (above, 1 - 2 * SIZE) if above > 0 else (-ours.value, LEVEL)
    count = seeds_needed(ours.spread, half, level)
    many = f"about {count} seeds" if count else f"only more than {MOST_SEEDS:,} seeds"
    seen = f"{100 * ours.value:+.1f} points and seeds go on differing by {100 * ours.spread:.1f} points"
    return f"{many} would give even odds if the difference is {seen}"
