"""Intervals hold the truth as often as they say, under drift and under processes that differ."""

import math
import re

import numpy as np
import pytest
import scipy.stats

from adafuse import stats
from adafuse.stats import (
    Interval,
    equivalence,
    mean_interval,
    paired_difference,
    paired_ratio,
    prediction_interval,
    resolution,
    seeds_needed,
    share_interval,
)
from synthetic.configurations import ROOT

TRUE_RATIO = 2.4


def processes(rng, count: int, rounds: int = 20, spread: float = 0.0, drift: float = 0.0):
    """Paired times of `count` processes: common drift inside each, a ratio offset of its own for each."""
    made = []
    for _ in range(count):
        machine = 1 + drift * np.cumsum(rng.normal(0, 1, rounds)) / math.sqrt(rounds)
        base = 2.0 * machine * rng.normal(1, 0.01, rounds)
        arm = 2.0 * TRUE_RATIO * math.exp(rng.normal(0, spread)) * machine * rng.normal(1, 0.01, rounds)
        made.append((arm, base))
    return made


def coverage(count: int, trials: int = 300, **how) -> float:
    rng = np.random.default_rng(1)
    found = [paired_ratio(processes(rng, count, **how)) for _ in range(trials)]
    return float(np.mean([i.low <= TRUE_RATIO <= i.high for i in found]))


def test_several_processes_cover_offsets_and_drift():
    assert 0.92 <= coverage(3, spread=0.02, drift=0.06) <= 0.98


def hosts(rng, count: int, spread: float, each: int = 2):
    """Ratios of `count` hosts, each the mean of its processes, which differ by less than hosts do."""
    return rng.normal(math.log(TRUE_RATIO), spread, count) + rng.normal(0, spread / 4, (each, count)).mean(0)


@pytest.mark.parametrize("count", [2, 3, 4, 5, 6])
def test_the_next_host_lies_where_it_is_predicted_to_lie(count):
    rng = np.random.default_rng(8)
    seen = []
    for _ in range(4000):
        *known, new = hosts(rng, count + 1, 0.02)
        low, high = prediction_interval(known)
        seen.append(low <= new <= high)
    assert 0.93 <= np.mean(seen) <= 0.97


@pytest.mark.parametrize("count", [2, 4])
def test_over_hosts_the_truth_and_the_next_host_are_covered_and_within_one_neither_is(count):
    rng, trials, every = np.random.default_rng(9), 400, []
    for _ in range(trials):
        offsets = rng.normal(0, 0.02, count + 1)
        made = [[processes(rng, 1, 9, 0.002)[0] for _ in range(3)] for _ in offsets[:-1]]
        moved = [
            (arm * math.exp(own), base)
            for own, host in zip(offsets, made, strict=False)
            for arm, base in host
        ]
        found = paired_ratio(moved, [number for number in range(count) for _ in range(3)])
        next_one = TRUE_RATIO * math.exp(offsets[-1])
        every.append(
            [
                found.low <= TRUE_RATIO <= found.high,
                found.predict_low <= next_one <= found.predict_high,
                found.within_low <= TRUE_RATIO <= found.within_high,
            ]
        )
    truth, following, within = np.mean(every, axis=0)
    assert 0.92 <= truth <= 0.98 and 0.92 <= following <= 0.98
    assert within <= 0.5, "why an interval of one host is called so"


def test_hosts_count_alike_and_what_varies_within_them_stands_beside():
    one = [1.0, 1.0]
    pairs = [([2.0] * 2, one), ([2.2] * 2, one), ([3.0] * 2, one)]
    found = paired_ratio(pairs, ["a", "a", "b"])
    assert found.ratio == pytest.approx(math.sqrt(math.sqrt(2.0 * 2.2) * 3.0))
    assert (found.n_hosts, found.n_processes, found.method) == (2, 3, "t over 2 hosts")
    # by hand: t(1) is 12.706, and the variance within is half the square of log 1.1, over 2 processes and over 1
    error = math.log(1.1) * math.sqrt(0.75) / 2
    assert math.log(found.within_high / found.ratio) == pytest.approx(12.7062 * error, rel=1e-4)
    half = 12.7062 * abs(math.log(3.0 / math.sqrt(4.4))) / 2
    assert math.log(found.high / found.ratio) == pytest.approx(half, rel=1e-4)
    assert math.log(found.predict_high / found.ratio) == pytest.approx(half * math.sqrt(3), rel=1e-4)
    alone = paired_ratio(pairs[1:], ["a", "b"])
    assert math.isnan(alone.within_low) and math.isnan(paired_ratio(pairs).predict_low)


def test_one_process_covers_drift_but_not_offsets():
    assert coverage(1, drift=0.06) >= 0.90
    # why the method says "rounds only", and why claims want more processes
    assert coverage(1, spread=0.02) <= 0.5


def test_ratio_is_the_median_of_paired_rounds():
    base = np.array([1.0, 2.0, 4.0, 8.0, 16.0])
    arm = base * [2, 2, 2, 2, 50]
    found = paired_ratio([(arm, base), (arm, base)])
    assert (
        found.ratio == pytest.approx(2) and found.low == pytest.approx(2) and found.high == pytest.approx(2)
    )
    assert (found.n_processes, found.n_rounds, found.method) == (2, 10, "t over 2 processes of one host")


def test_one_process_says_so():
    assert paired_ratio(processes(np.random.default_rng(0), 1)).method == "one process: rounds only"
    single = paired_ratio([([2.0], [1.0])])
    assert single.ratio == 2 and math.isnan(single.low) and "no interval" in single.method
    assert not math.isnan(paired_ratio([([2.0, 3.0], [1.0, 1.0])]).low)


def test_the_interval_of_one_process_holds_95_percent():
    found = paired_ratio([(np.exp(np.arange(-50, 51) / 100), np.ones(101))])
    # of 101 values that lie evenly the median strays by half a root of 101 of their distances
    for end in (-math.log(found.low), math.log(found.high)):
        assert end == pytest.approx(1.96 * math.sqrt(101) / 2 / 100, abs=0.01)


def test_same_records_give_the_same_interval():
    made = processes(np.random.default_rng(3), 1)
    assert paired_ratio(made) == paired_ratio(made)


def test_nothing_in_common_is_refused():
    with pytest.raises(ValueError, match="nothing to compare"):
        paired_ratio([([], [])])


def test_the_noise_reaches_to_the_far_end_of_the_a_a_interval():
    noise = Interval(1.01, 0.97, 1.03, 3, 60, "")
    assert resolution(noise) == pytest.approx(-math.log(0.97))


def test_paired_difference_covers_over_seeds():
    rng = np.random.default_rng(2)
    hits = []
    for _ in range(300):
        effects = 0.05 + rng.normal(0, 0.03, 3)
        a, b = [], []
        for effect in effects:
            hard = rng.random(200)
            a.append([(hard < 0.6 + effect).astype(float)])
            b.append([(hard < 0.6).astype(float)])
        found = paired_difference(a, b)
        hits.append(found.low <= 0.05 <= found.high)
    assert found.n_seeds == 3 and found.method == "t over 3 seeds"
    assert 0.9 <= np.mean(hits) <= 0.99


def test_paired_difference_of_one_seed_is_tighter_than_unpaired():
    rng = np.random.default_rng(0)
    hard = rng.random(500)
    found = paired_difference([[(hard < 0.65) * 1.0]], [[(hard < 0.6) * 1.0]])
    unpaired = 1.96 * math.sqrt(2 * 0.24 / 500)
    assert found.method == "one seed: items only" and found.n_items == 500
    assert found.low <= 0.05 <= found.high and (found.high - found.low) / 2 < 0.5 * unpaired


def test_one_seed_has_the_normal_interval_of_its_items():
    tasks = [[1.0, 0.0, 1.0, 0.0], [1.0, 1.0, 1.0, 0.0, 1.0]]
    found = paired_difference([tasks], [[[0.0] * 4, [0.0] * 5]])
    error = math.sqrt(sum(np.var(task, ddof=1) / len(task) for task in tasks)) / 2
    for half in (found.high - found.value, found.value - found.low):
        assert half == pytest.approx(1.959964 * error)


@pytest.mark.filterwarnings("error")
def test_one_item_has_no_interval():
    assert math.isnan(paired_difference([[[1.0]]], [[[0.0]]]).low)


def test_tasks_count_equally():
    found = paired_difference([[[1.0] * 10, [0.0] * 1000]], [[[0.0] * 10, [0.0] * 1000]])
    assert found.value == pytest.approx(0.5)


@pytest.mark.parametrize(
    "b", [[], [[[1.0, 0.0]]], [[[1.0]], [[1.0]]]], ids=["none", "more items", "more seeds"]
)
def test_items_that_do_not_match_are_refused(b):
    with pytest.raises(ValueError):
        paired_difference([[[1.0]]], b)


def nested(rng, seeds: int, offset: float, items: int = 100, truth: float = 0.05):
    """Each seed shifts the difference by an offset of its own, and draws its own items."""
    shifts = truth + rng.normal(0, offset, seeds)
    hard = rng.random((seeds, items))
    left, right = hard < 0.5 + shifts[:, None], hard < 0.5
    return paired_difference([[row] for row in left], [[row] for row in right])


@pytest.mark.parametrize("offset", [0.0, 0.04])
def test_items_nested_in_seeds_are_covered_by_seeds_alone(offset):
    rng = np.random.default_rng(4)
    found = [nested(rng, 5, offset) for _ in range(1000)]
    over_seeds = np.mean([f.low <= 0.05 <= f.high for f in found])
    assert 0.93 <= over_seeds <= 0.98
    # an interval that knows the items only: as wide whatever the seeds do
    # of one item the difference has variance 0.05 * 0.95
    error = math.sqrt(0.05 * 0.95 / 100 / 5)
    over_items = np.mean([abs(f.value - 0.05) <= 1.96 * error for f in found])
    assert over_items <= 0.85 if offset else over_items >= 0.9


def test_the_spread_is_that_of_items_and_of_what_seeds_add():
    rng = np.random.default_rng(5)
    alike, apart = ([nested(rng, 20, offset) for _ in range(50)] for offset in (0.0, 0.1))
    # of one item the difference has variance 0.05 * 0.95
    expected = math.sqrt(0.05 * 0.95 / 100)
    assert np.mean([f.spread for f in alike]) == pytest.approx(expected, rel=0.05)
    assert np.mean([f.spread for f in apart]) > 2 * expected


@pytest.mark.parametrize("truth", [-2.0, 2.0])
def test_a_difference_as_large_as_the_margin_is_seldom_called_none(truth):
    rng = np.random.default_rng(6)
    found = [equivalence(rng.normal(truth, 1.0, 5), 2.0) for _ in range(2000)]
    # 5 % and three standard errors of 2,000 trials
    assert 0.02 <= np.mean([f.p < 0.05 for f in found]) <= 0.065


def test_no_difference_is_found_to_be_none():
    rng = np.random.default_rng(7)
    found = [equivalence(rng.normal(0.0, 1.0, 5), 2.0) for _ in range(500)]
    assert np.mean([f.p < 0.05 for f in found]) >= 0.85
    # the test and its 90 % interval are one statement
    assert all((f.p < 0.05) == (f.low > -2 and f.high < 2) for f in found)


def test_seeds_without_any_spread_are_judged_by_their_mean():
    assert equivalence([0.5, 0.5], 2.0).p == 0 and equivalence([2.5, 2.5], 2.0).p == 1


@pytest.mark.parametrize("wanted", [0.5, 1.5])
def test_seeds_needed_is_the_first_number_that_does(wanted, monkeypatch):
    count = seeds_needed(1.0, wanted, 0.95)

    def half(seeds):
        values = np.array([-1.0, 1.0] * 50)[:seeds]
        values = (values - values.mean()) / values.std(ddof=1)
        centre, _, high = mean_interval(values)
        return high - centre

    assert half(count) <= wanted < half(count - 1)
    assert seeds_needed(1.0, 0.0, 0.95) is None
    for most, found in ((count, count), (count - 1, None)):
        monkeypatch.setattr(stats, "MOST_SEEDS", most)
        assert seeds_needed(1.0, wanted, 0.95) == found


def test_a_share_has_an_interval_that_knows_its_ends() -> None:
    """Wilson's, against values from the literature (Newcombe 1998, Table I: 81 of 263, 15 of 148, 0 of 20)."""
    for right, n, low, high in ((81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611)):
        share, *ends = share_interval(right / n, n)
        assert share == right / n and ends == pytest.approx([low, high], abs=5e-5)


def test_a_difference_that_is_not_worse_has_the_p_of_its_own_interval():
    values = np.array([0.5, -1.0, 0.2, -0.4, 0.9])
    low90 = stats.mean_interval(values, 0.90)[1]
    wanted = scipy.stats.ttest_1samp(values, -2.0, alternative="greater").pvalue
    assert stats.not_worse(values.mean(), low90, 5, 2.0) == pytest.approx(wanted)
    # where the interval ends at the margin, p is the size of the test
    assert stats.not_worse(values.mean(), low90, 5, -low90) == pytest.approx(stats.SIZE)
    assert stats.not_worse(1.0, 1.0, 5, 2.0) == 0 and stats.not_worse(-3.0, -3.0, 5, 2.0) == 1


def test_holm_multiplies_the_smallest_by_all_and_keeps_the_order():
    assert stats.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert stats.holm([0.6, 0.5]) == [1.0, 1.0] and stats.holm([0.2]) == [0.2] and stats.holm([]) == []


def test_the_power_in_docs_method_is_that_of_the_rule():
    text = (ROOT / "docs/method.md").read_text().partition("| seeds differ by |")[2]
    rows = re.findall(r"^\| ([\d.]+) points \|(.*)\|$", text, re.MULTILINE)
    assert len(rows) == 4
    for spread, cells in rows:
        for count, cell in zip((5, 10, 15), cells.split("|"), strict=True):
            printed = [float(one) for one in re.findall(r"[\d.]+", cell)]
            away = 2.0 * math.sqrt(count) / float(spread)
            limits = (scipy.stats.t.ppf(1 - stats.SIZE / claims, count - 1) for claims in (1, 3))
            wanted = [scipy.stats.nct.sf(limit, count - 1, away) for limit in limits]
            assert printed == pytest.approx(wanted, abs=0.006), (spread, count)
