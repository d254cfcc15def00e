"""Verdicts follow the written rules, at their edges, in both directions."""

import math
from datetime import date

import numpy as np
import pytest

from adafuse.report import rules, specification
from adafuse.report.rules import (
    BETTER,
    IN_PART,
    MET,
    MISSED,
    NOT_DECIDED,
    NOT_MEASURED,
    NOT_REPLICATED,
    NOT_TESTABLE,
    NOT_WORSE,
    ON_PAR,
    REPLICATED,
    WORSE,
    Difference,
    Number,
    Verdict,
    judge_difference,
    judge_ratio,
)
from adafuse.stats import LEVEL, equivalence, mean_interval, seeds_needed
from synthetic.board import Made

# five values of mean 0 and standard deviation 1
SHAPE = np.array([-1.265, -0.632, 0.0, 0.632, 1.265])


def interval(low, high, processes=3):
    method = f"t over {processes} processes" if processes > 1 else "one process: rounds only"
    return Number(math.sqrt(low * high), low, high, processes, method)


def difference(mean_points, spread_points, seeds=5):
    by_seed = (mean_points + spread_points * SHAPE[:seeds] / SHAPE[:seeds].std(ddof=1)) / 100
    test = equivalence(by_seed, rules.MARGIN / 100)
    spread = float(np.std(by_seed, ddof=1))
    own = Number(*mean_interval(by_seed), seeds, f"t over {seeds} seeds")
    return Difference(**vars(own), low90=test.low, high90=test.high, p=test.p, spread=spread)


@pytest.mark.parametrize(
    ("sense", "paper", "low", "high", "verdict"),
    [
        ("about", 3.5, 3.3, 3.4, REPLICATED),
        ("about", 3.5, 2.0, 2.5, IN_PART),
        ("about", 3.5, 8.0, 9.0, IN_PART),
        ("about", 3.5, 0.8, 0.9, NOT_REPLICATED),
        ("about", 3.5, 0.9, 4.0, NOT_DECIDED),
        # noise does not count for the paper, nor the sign alone
        ("about", 3.5, 2.0, 15.0, NOT_DECIDED),
        # nor against it, but where both ends say the same it does not matter
        ("about", 1.67, 25.0, 45.0, NOT_REPLICATED),
        ("about", 3.5, 4.2, 6.9, IN_PART),
        ("about", 3.5, 3.8, 4.2, IN_PART),
        ("about", 3.5, 15.0, 16.0, NOT_REPLICATED),
        ("about", 3.5, 1.1, 1.2, NOT_REPLICATED),
        ("at_most", 1.29, 0.99, 1.10, REPLICATED),
        ("at_most", 1.29, 1.20, 1.41, REPLICATED),
        ("at_most", 1.29, 1.30, 1.50, IN_PART),
        ("at_most", 1.29, 1.43, 1.50, NOT_REPLICATED),
        ("at_least", 2.4, 2.2, 2.3, REPLICATED),
        ("at_least", 2.4, 1.5, 2.3, IN_PART),
        ("at_least", 2.4, 0.8, 0.9, NOT_REPLICATED),
        ("at_least", 2.4, 0.9, 3.0, NOT_DECIDED),
    ],
)
def test_ratios(sense, paper, low, high, verdict):
    assert judge_ratio(paper, interval(low, high), sense).verdict == verdict


def test_the_rules_are_those_that_were_frozen(monkeypatch):
    """Who changes one on purpose: a new SINCE and SHA256, and the old rule as `before` in claims.yaml."""
    groups = specification("claims")["groups"]
    assert rules.digest(groups) == rules.SHA256
    assert date.fromisoformat(rules.SINCE) == date(2026, 12, 1)
    changed = [{"claims": [{"id": "a", "kind": "time", "rule": "about"}]}]
    assert rules.digest(changed) != rules.digest([{"claims": [changed[0]["claims"][0] | {"rule": "order"}]}])
    monkeypatch.setattr(rules, "CLOSE", 1.11)
    assert rules.digest(groups) != rules.SHA256


def test_a_printed_ratio_is_judged_alike_whoever_it_is_of():
    ruled = [claim for group in specification("claims")["groups"] for claim in group["claims"]]
    ratios = [claim["rule"] for claim in ruled if claim["kind"] in ("time", "memory") and "paper" in claim]
    assert len(ratios) >= 10 and set(ratios) == {"about"}
    # as far below the printed number as above, and a bound's better side is no excuse
    for factor, verdict in ((1.05, REPLICATED), (1.25, IN_PART)):
        for ours in (2.4 * factor, 2.4 / factor):
            assert judge_ratio(2.4, interval(ours * 0.999, ours * 1.001), "about").verdict == verdict


def test_a_wide_interval_decides_only_what_value_and_ends_all_say():
    assert judge_ratio(2.4, interval(1.94, 3.48), "about").verdict == NOT_DECIDED, (
        "ends in part, value replicated"
    )
    assert judge_ratio(2.4, interval(3.0, 5.0), "about").verdict == IN_PART


def test_a_ratio_in_the_noise_is_not_replicated():
    found = judge_ratio(3.5, interval(1.005, 1.01), "about", seen=False)
    assert found.verdict == NOT_REPLICATED and "A/A" in found.why
    assert judge_ratio(1.29, interval(0.99, 1.01), "at_most", seen=False).verdict == REPLICATED


def test_what_the_pair_resolves():
    made = Made()
    place = made.cell("table1")
    made.row(place, "mola_loop", {"ratio": 2.0})
    assert made.cells[0].resolved("mola_loop", Number(1.0001)), "no A/A arm"
    made.numbers(place, "eager", {"resolution": 0.04})
    ratios = (1.05, 1.03, 1 / 1.03)
    assert [made.cells[0].resolved("mola_loop", Number(own)) for own in ratios] == [True, False, False]


def test_what_is_missing_or_thin_says_so():
    found = judge_ratio(3.5, Number(reason="check failed: logits"), "about")
    assert found == Verdict(NOT_TESTABLE, "check failed: logits")
    assert "one process" in judge_ratio(3.5, interval(3.4, 3.6, 1), "about").why


def test_a_value_without_an_interval_is_called_a_value():
    single = Number(1.05, 1.05, 1.05, 1, "one process each")
    assert judge_ratio(1.07, single, "at_most", close=1.02).why.startswith("our value lies below 1.09")
    assert judge_ratio(1.05, single, "about").why.startswith("our value lies within")
    assert "our interval ends below" in judge_ratio(1.29, interval(1.1, 1.2), "at_most").why


@pytest.mark.parametrize(
    ("low", "high", "verdict"), [(1.1, 2, REPLICATED), (0.5, 0.9, NOT_REPLICATED), (0.9, 1.1, NOT_DECIDED)]
)
def test_more_than_one(low, high, verdict):
    assert judge_ratio(math.nan, interval(low, high), "above_one").verdict == verdict


def test_order():
    step = ("A > B", True, "")
    assert rules.judge_order([step, step]).verdict == REPLICATED
    assert rules.judge_order([step, ("B > C", False, "")]) == Verdict(IN_PART, "does not hold: B > C")
    assert rules.judge_order([step, ("B > C", None, "no memory")]).why == "not timed: B > C (no memory)"
    assert rules.judge_order([("A > B", False, "")]).verdict == NOT_REPLICATED
    alike = ("B > C", False, "not told apart")
    assert rules.judge_order([alike]) == Verdict(NOT_DECIDED, "not told apart: B > C")
    assert rules.judge_order([("A > B", False, ""), alike]).verdict == NOT_REPLICATED
    assert rules.judge_order([step, alike]).verdict == IN_PART
    assert rules.judge_order([("A > B", None, "not run")]).verdict == NOT_TESTABLE


def test_costs_need_a_real_backbone():
    def judged(ours, base=7e9):
        return rules.judge_cost(1.05, Number(ours, ours, ours, 1, "counted"), Number(base)).verdict

    assert [judged(own) for own in (1.05, 1.10, 1.25)] == [REPLICATED, IN_PART, NOT_REPLICATED]
    assert (
        judged(1.05, 1e6) == NOT_TESTABLE
        and rules.judge_cost(1.05, Number(reason="gone"), Number(7e9)).why == "gone"
    )


# 90 %: ± 0.95 of the spread, 95 %: ± 1.24
@pytest.mark.parametrize(
    ("mean", "spread", "verdict", "word", "said"),
    [
        (0.0, 1.0, REPLICATED, ON_PAR, "90 % interval [-1.0, +1.0] lies within ± 2 points (p = 0.0055)"),
        (1.0, 1.0, REPLICATED, ON_PAR, "within"),
        (-1.0, 1.0, REPLICATED, ON_PAR, "within"),
        (-0.8, 0.5, REPLICATED, ON_PAR, "[-1.3, -0.3] lies within"),
        (1.5, 1.0, REPLICATED, BETTER, "better: the 90 % interval"),
        (1.2, 1.0, REPLICATED, NOT_WORSE, "not worse"),
        (6.0, 1.0, REPLICATED, BETTER, "better: the 90 % interval [+5.0, +7.0] lies above -2"),
        (-1.5, 1.0, NOT_REPLICATED, WORSE, "worse: the 95 % interval [-2.7, -0.3] lies below 0"),
        (-6.0, 1.0, NOT_REPLICATED, WORSE, "worse"),
        (-1.1, 1.0, NOT_DECIDED, NOT_DECIDED, "too wide to tell"),
        (0.0, 3.0, NOT_DECIDED, NOT_DECIDED, "too wide to tell; about 9 seeds would give even odds if"),
        (
            -3.0,
            3.0,
            NOT_DECIDED,
            NOT_DECIDED,
            "about 7 seeds would give even odds if the difference is -3.0 points and",
        ),
        (-3.0, 3.0, NOT_DECIDED, NOT_DECIDED, "seeds go on differing by 3.0 points"),
        (-2.01, 1.9, NOT_DECIDED, NOT_DECIDED, "about 6 seeds"),
        (-1.999, 3.0, NOT_DECIDED, NOT_DECIDED, "only more than 1,000 seeds would give even odds"),
    ],
)
def test_on_par_is_shown_not_assumed(mean, spread, verdict, word, said):
    found = judge_difference(difference(mean, spread))
    assert (found.verdict, found.word) == (verdict, word) and said in found.why, found


def test_few_seeds_are_never_a_proof():
    found = judge_difference(difference(0.0, 0.1, 4))
    assert found.verdict == NOT_TESTABLE and "only 4 of 5 seeds" in found.why
    assert judge_difference(Number(reason="not run for mola")) == Verdict(
        NOT_TESTABLE, "not run for mola", NOT_DECIDED
    )


def test_the_seeds_it_would_take_are_those_of_the_nearer_end():
    assert seeds_needed(0.03, 0.02, 0.90) == 9 and seeds_needed(0.03, 0.03, LEVEL) == 7


@pytest.mark.parametrize(
    ("value", "low", "high", "verdict"),
    [
        (1.10, 1.09, 1.099, "met"),
        (1.05, 1.04, 1.11, "met, but the interval holds the bound"),
        (1.15, 1.09, 1.20, "missed by 0.05, but the interval holds the bound"),
        (1.15, 1.14, 1.16, "missed by 0.05"),
        (1.15, math.nan, math.nan, "missed by 0.05"),
    ],
)
def test_goals_at_the_bound(value, low, high, verdict):
    assert rules.judge_goal(1.10, Number(value, low, high), "at_most").verdict == verdict


def test_goals_at_least_are_the_mirror_image():
    assert rules.judge_goal(0.85, Number(0.86), "at_least", "%").word == MET
    missed = rules.judge_goal(0.85, Number(0.83), "at_least", "%")
    assert missed == Verdict("missed by 2 points", "", MISSED)
    assert rules.judge_goal(0.85, Number(), "at_least").verdict == NOT_MEASURED
    assert rules.judge_goal(0.85, Number(0.9), "at_least", failed=True).word == MISSED


def test_a_time_of_a_cpu_judges_nothing_and_a_count_does():
    found = Verdict(REPLICATED, "why")
    told = rules.on_cpu(found, True, "tiny")
    assert told.verdict == NOT_TESTABLE
    assert told.why == "on CPU, tiny backbone: needs a GPU; here the rule gives “replicated”: why"
    assert rules.on_cpu(found, False, "tiny") == Verdict(REPLICATED, "on CPU, tiny backbone: why")
    absent = Verdict(NOT_TESTABLE, "not run")
    assert rules.on_cpu(absent, True, "tiny").why == "on CPU, tiny backbone: not run"


def test_what_is_replicated_alone_may_not_be_among_others():
    """Two claims just inside the margin: each alone is not worse, together nothing is decided of the weaker one."""
    alone = difference(0.0, 2.0), difference(1.0, 1.0)
    told = [(own, judge_difference(own)) for own in alone]
    assert [found.verdict for _, found in told] == [REPLICATED, REPLICATED]
    assert rules.judge_family(told[:1]) == [told[0][1]], "one is a family of its own"
    weaker, sound = rules.judge_family(told * 2)[:2]
    assert sound == told[1][1]
    assert (weaker.verdict, weaker.before) == (
        NOT_DECIDED,
        REPLICATED,
    ) and "among 4 claims (Holm: p = " in weaker.why
