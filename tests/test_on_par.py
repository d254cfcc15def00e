"""On par is shown, not assumed: the rule at its edges, and reasons with numbers."""

import numpy as np
import pytest

from adafuse.report.on_par import difference_text, is_not_worse, judge_difference
from adafuse.report.verdicts import NOT_DECIDED, NOT_REPLICATED, NOT_TESTABLE, REPLICATED
from adafuse.stats import LEVEL, Difference, mean_interval, seeds_needed

# five values of mean 0 and standard deviation 1
SHAPE = np.array([-1.265, -0.632, 0.0, 0.632, 1.265])


def difference(mean_points: float, spread_points: float, seeds: int = 5) -> Difference:
    by_seed = (mean_points + spread_points * SHAPE[:seeds] / SHAPE[:seeds].std(ddof=1)) / 100
    centre, low, high = mean_interval(by_seed)
    return Difference(centre, low, high, seeds, 100, f"t over {seeds} seeds", tuple(by_seed), 0.004)


# 90 %: ± 0.95 of the spread, 95 %: ± 1.24
@pytest.mark.parametrize(
    ("mean", "spread", "verdict", "said"),
    [
        (0.0, 1.0, REPLICATED, "90 % interval [-1.0, +1.0] lies within ± 2 points (p = 0.0055)"),
        (1.0, 1.0, REPLICATED, "within"),
        (-1.0, 1.0, REPLICATED, "within"),
        (-0.8, 0.5, REPLICATED, "[-1.3, -0.3] lies within"),
        (1.5, 1.0, REPLICATED, "better: the 90 % interval"),
        (1.2, 1.0, REPLICATED, "not worse"),
        (6.0, 1.0, REPLICATED, "better: the 90 % interval [+5.0, +7.0] lies above -2"),
        (-1.5, 1.0, NOT_REPLICATED, "worse: the 95 % interval [-2.7, -0.3] lies below 0"),
        (-6.0, 1.0, NOT_REPLICATED, "worse"),
        (-1.1, 1.0, NOT_DECIDED, "too wide to tell"),
        (0.0, 3.0, NOT_DECIDED, "[-2.9, +2.9] is too wide to tell; about 9 seeds would give even odds if"),
        (-3.0, 3.0, NOT_DECIDED, "about 7 seeds would give even odds if the difference is -3.0 points and"),
        (-3.0, 3.0, NOT_DECIDED, "seeds go on differing by 3.0 points"),
        (-2.01, 1.9, NOT_DECIDED, "about 6 seeds"),
        (-1.999, 3.0, NOT_DECIDED, "only more than 1,000 seeds would give even odds"),
    ],
)
def test_the_rule(mean, spread, verdict, said):
    found = judge_difference(difference(mean, spread), "")
    assert found[0] == verdict and said in found[1], found


def test_few_seeds_are_never_a_proof():
    verdict, why = judge_difference(difference(0.0, 0.1, 4), "")
    assert verdict == NOT_TESTABLE and "only 4 of 5 seeds" in why
    assert judge_difference(None, "not run for mola") == (NOT_TESTABLE, "not run for mola")


def test_the_seeds_it_would_take_are_those_of_the_nearer_end():
    assert seeds_needed(0.03, 0.02, 0.90) == 9
    assert seeds_needed(0.03, 0.03, LEVEL) == 7


def test_no_difference_beyond_the_margin_needs_no_test_of_equality():
    assert is_not_worse(difference(5.0, 1.0)) and not is_not_worse(difference(-1.5, 1.0))
    assert not is_not_worse(Difference(-0.01, -0.03, 0.01, 1, 100, "one seed: items only", (-0.01,), 0.01))


def test_one_line_says_difference_test_and_noise():
    said = difference_text(difference(0.5, 1.0))
    assert said == (
        "+0.5 [-0.7, +1.7] points (t over 5 seeds; equivalent within ± 2: p = 0.014; "
        "between seeds 1.0 points, items of a seed 0.4 points)"
    )
