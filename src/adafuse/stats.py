"""Intervals: how large a ratio of latencies or a difference of accuracies is, and how well it is known.

In: rounds of paired times, one pair of arrays for each process, with its host; or items right and wrong, per seed and
task. Out: an `Interval` of the ratio or a `Difference`, each with a word on what varied; whether a difference is small
enough to be none. Next: tracking.py.

Times are compared inside a round, because machines drift. Hosts are the units of the interval: another GPU of the same
kind gives another ratio, by more than its processes differ. Of one host alone processes are, because a process can be a
few per cent slower than its twin for its whole life; that says nothing of the next host.

Accuracies are compared item by item, and seeds are the units: each seed has trained an adapter of its
own and has drawn items of its own, so the differences between seeds hold both what training and what items vary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import special

LEVEL = 0.95
# of the equivalence test; its interval is that of 1 - 2 * SIZE
SIZE = 0.05
RESAMPLES = 2000
MOST_SEEDS = 1000


@dataclass(frozen=True)
class Interval:
    """A ratio with its 95 % interval; `low` and `high` are nan where nothing varied.

    Of two hosts or more that is for the mean over hosts; `predict_low` and `predict_high` are where the next host's
    ratio would lie (measured with as many processes); `within_low` and `within_high` are for the mean of these very
    hosts, as their processes vary, where one has more than one.
    """

    ratio: float
    low: float
    high: float
    n_processes: int
    n_rounds: int
    method: str
    n_hosts: int = 1
    predict_low: float = math.nan
    predict_high: float = math.nan
    within_low: float = math.nan
    within_high: float = math.nan


@dataclass(frozen=True)
class Difference:
    """A mean difference with its 95 % interval, in the unit of the input."""

    value: float
    low: float
    high: float
    n_seeds: int
    n_items: int
    method: str
    by_seed: tuple[float, ...] = ()

    @property
    def spread(self) -> float:
        """The standard deviation between seeds; nan for one."""
        return float(np.std(self.by_seed, ddof=1)) if len(self.by_seed) > 1 else math.nan


@dataclass(frozen=True)
class Equivalence:
    """Two one-sided t-tests against a margin: the larger p, and the interval that lies within it if p < SIZE."""

    p: float
    low: float
    high: float


def paired_ratio(processes: Sequence[tuple[ArrayLike, ArrayLike]], hosts: Sequence[object] = ()) -> Interval:
    """The ratio arm / base from `(arm_ms, base_ms)` of each process, both indexed by round.

    Per process: the median over rounds of the log ratio. `hosts`: what tells the host of each process; all are of one
    if it is left out. Two or more hosts: a t interval over the means of their processes. One with two or more
    processes: over these medians. One process: a bootstrap over rounds, which says nothing about the next process.
    Raises ValueError without any round.
    """
    logs = [np.log(np.asarray(arm, float)) - np.log(np.asarray(base, float)) for arm, base in processes]
    of_host: dict[object, list[float]] = {}
    for host, process in zip(hosts or [None] * len(logs), logs, strict=True):
        if process.size:
            of_host.setdefault(host, []).append(float(np.median(process)))
    logs = [process for process in logs if process.size]
    if not logs:
        raise ValueError("no round holds both arms: nothing to compare")
    n_rounds, medians = sum(process.size for process in logs), [*of_host.values()]
    if len(medians) > 1:
        means = [np.mean(own) for own in medians]
        ends = (*mean_interval(means)[1:], *prediction_interval(means), *_within(medians))
        low, high, *more = map(math.exp, ends)
        method, ratio = f"t over {len(means)} hosts", math.exp(np.mean(means))
        return Interval(ratio, low, high, len(logs), n_rounds, method, len(means), *more)
    if len(logs) > 1:
        centre, low, high = mean_interval(medians[0])
        method = f"t over {len(logs)} processes of one host"
    elif logs[0].size > 1:
        centre, (low, high) = medians[0][0], _bootstrap_median(logs[0])
        method = "one process: rounds only"
    else:
        centre, low, high, method = medians[0][0], math.nan, math.nan, "one process, one round: no interval"
    return Interval(math.exp(centre), math.exp(low), math.exp(high), len(logs), n_rounds, method)


def resolution(again: Interval) -> float:
    """The smallest log ratio that can be told from none, by the A/A arm: the far end of its interval."""
    ends = [abs(math.log(end)) for end in (again.ratio, again.low, again.high) if not math.isnan(end)]
    return max(ends)


def paired_difference(
    correct_a: Sequence[Sequence[ArrayLike]], correct_b: Sequence[Sequence[ArrayLike]]
) -> Difference:
    """The mean accuracy of `a` minus that of `b`, both as `[seed][task][item]` with the items in the same
    order.

    Tasks count equally. Two or more seeds: a t interval over the seeds' differences; items are nested in seeds, so
    this spread holds theirs too, and the interval needs no term for items. One: a normal interval over items, which
    says nothing about the next training run. Raises ValueError if the items do not match.
    """
    if len(correct_a) != len(correct_b) or not correct_a:
        raise ValueError("both sides need the same seeds, at least one")
    pairs = list(zip(correct_a, correct_b, strict=True))
    by_seed = [
        [_item_differences(a, b) for a, b in zip(tasks_a, tasks_b, strict=True)] for tasks_a, tasks_b in pairs
    ]
    values = tuple(float(np.mean([task.mean() for task in tasks])) for tasks in by_seed)
    count, n_items = len(values), sum(task.size for task in by_seed[0])
    if count > 1:
        centre, low, high = mean_interval(values)
        return Difference(centre, low, high, count, n_items, f"t over {count} seeds", values)
    half, value = float(special.ndtri((1 + LEVEL) / 2)) * _items_error(by_seed[0]), values[0]
    return Difference(value, value - half, value + half, 1, n_items, "one seed: items only", values)


def equivalence(by_seed: ArrayLike, margin: float) -> Equivalence:
    """Test that the mean difference lies within ± `margin`, from one difference a seed; at least two."""
    values = np.asarray(by_seed, float)
    centre, low, high = mean_interval(values, 1 - 2 * SIZE)
    if low == high:
        # no spread: a t-test would divide by nothing
        return Equivalence(0.0 if abs(centre) < margin else 1.0, low, high)
    # the larger of the two p is that of the nearer margin
    error = values.std(ddof=1) / math.sqrt(len(values))
    return Equivalence(float(special.stdtr(len(values) - 1, (abs(centre) - margin) / error)), low, high)


def not_worse(value: float, low90: float, n: int, margin: float) -> float:
    """p of a t-test over `n` seeds against a mean difference of -`margin` or below, from the mean and the lower end of
    its 90 % interval.
    """
    error = (value - low90) / float(special.stdtrit(n - 1, 1 - SIZE))
    if error == 0:
        return 0.0 if value > -margin else 1.0
    return float(special.stdtr(n - 1, -(value + margin) / error))


def holm(ps: Sequence[float]) -> list[float]:
    """Each p as Holm's procedure corrects it for standing among these."""
    found, most = [0.0] * len(ps), 0.0
    for place, i in enumerate(sorted(range(len(ps)), key=ps.__getitem__)):
        most = max(most, min(1.0, (len(ps) - place) * ps[i]))
        found[i] = most
    return found


def seeds_needed(spread: float, half: float, level: float) -> int | None:
    """How many seeds a t interval takes to reach no further than `half`; None if MOST_SEEDS are too few."""
    for count in range(2, MOST_SEEDS + 1):
        if special.stdtrit(count - 1, (1 + level) / 2) * spread / math.sqrt(count) <= half:
            return count
    return None


def mean_interval(values: ArrayLike, level: float = LEVEL) -> tuple[float, float, float]:
    """The mean of at least two values, and the ends of its t interval."""
    known = np.asarray(values, float)
    centre = float(known.mean())
    error = float(known.std(ddof=1)) / math.sqrt(len(known))
    half = float(special.stdtrit(len(known) - 1, (1 + level) / 2)) * error
    return centre, centre - half, centre + half


def prediction_interval(values: ArrayLike, level: float = LEVEL) -> tuple[float, float]:
    """Where the next value lies as often as `level` says, drawn as these were; at least two, normally distributed."""
    known = np.asarray(values, float)
    centre, spread = float(known.mean()), float(known.std(ddof=1)) * math.sqrt(1 + 1 / len(known))
    half = float(special.stdtrit(len(known) - 1, (1 + level) / 2)) * spread
    return centre - half, centre + half


def share_interval(share: float, n: int) -> tuple[float, float, float]:
    """A share of `n` items and the ends of its Wilson interval, which has a width where all or none are right."""
    z = float(special.ndtri((1 + LEVEL) / 2))
    centre, scale = share + z * z / (2 * n), 1 + z * z / n
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return share, max(0.0, (centre - half) / scale), min(1.0, (centre + half) / scale)


def _within(hosts: Sequence[Sequence[float]]) -> tuple[float, float]:
    """A t interval for the mean over these very hosts, from how processes of one differ; nan where each has but one."""
    freedom = sum(map(len, hosts)) - len(hosts)
    if not freedom:
        return math.nan, math.nan
    variance = sum(float(np.var(own)) * len(own) for own in hosts) / freedom
    error = math.sqrt(variance * sum(1 / len(own) for own in hosts)) / len(hosts)
    centre, half = (
        float(np.mean([np.mean(own) for own in hosts])),
        float(special.stdtrit(freedom, (1 + LEVEL) / 2)),
    )
    return centre - half * error, centre + half * error


def _items_error(tasks: Sequence[NDArray[np.float64]]) -> float:
    """Of one seed's mean over tasks: tasks are fixed, items are drawn, so the variances of the tasks' means add up."""
    variances = [task.var(ddof=1) / task.size if task.size > 1 else math.nan for task in tasks]
    return math.sqrt(sum(variances) / len(tasks) ** 2)


def _bootstrap_median(values: NDArray[np.float64]) -> tuple[float, float]:
    # A fixed seed: the same records must draw the same tables.
    draws = np.random.default_rng(0).choice(values, size=(RESAMPLES, values.size))
    low, high = np.quantile(np.median(draws, axis=1), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def _item_differences(a: ArrayLike, b: ArrayLike) -> NDArray[np.float64]:
    left, right = np.asarray(a, float), np.asarray(b, float)
    if left.shape != right.shape or not left.size:
        raise ValueError(f"items do not match: {left.shape} and {right.shape}")
    difference: NDArray[np.float64] = left - right
    return difference
