"""The held-out loss of two methods, paired by seed: the quantity by which learning rates were chosen.

In: evaluate records by seed and the train records behind them. Out: a `Difference` in nats a token, and how it is
printed. Next: routing.py.
"""

from __future__ import annotations

import math

import numpy as np

from adafuse.report.accuracy import Seeds, backbones
from adafuse.report.fits import Fits, behind, validation_loss
from adafuse.stats import Difference, mean_interval

Losses = dict[str, float]


def loss_difference(left: Seeds, right: Seeds, known: Fits) -> Difference | None:
    """Held-out loss of `left` minus that of `right`, better downwards: one value a seed, the mean over its domains.

    A seed counts if both learnt the same domains on one backbone, and every training run is known; None without one.
    """
    values = []
    for seed in sorted(set(left) & set(right)):
        one, two = losses(left, seed, known), losses(right, seed, known)
        if one and one.keys() == two.keys() and len(backbones([*left[seed], *right[seed]])) < 2:
            values.append(float(np.mean([one[name] - two[name] for name in one])))
    if not values:
        return None
    single = (values[0], math.nan, math.nan)
    centre, low, high = mean_interval(values) if len(values) > 1 else single
    method = f"t over {len(values)} seeds" if len(values) > 1 else "one seed: no interval"
    return Difference(centre, low, high, len(values), 0, method, tuple(values))


def losses(seeds: Seeds, seed: int, known: Fits) -> Losses:
    """The held-out loss of each training run behind the evaluations of one seed, by what it learnt; empty if the loss
    of one of them is not known.
    """
    found: dict[str, float | None] = {}
    for record in seeds.get(seed, []):
        found[_learnt(record.run["config"]["data"])] = validation_loss(behind([record], known))
    whole = {name: loss for name, loss in found.items() if loss is not None}
    return whole if len(whole) == len(found) else {}


def mean_loss(seeds: Seeds, known: Fits) -> float | None:
    """The mean over all training runs behind these evaluations."""
    return validation_loss(behind([record for records in seeds.values() for record in records], known))


def loss_text(found: Difference) -> str:
    """+0.110 [+0.085, +0.136], in nats."""
    if math.isnan(found.low):
        return f"{found.value:+.3f} (no interval)"
    return f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"


def _learnt(data: dict[str, object]) -> str:
    return f"{data.get('families')} {data.get('path')}"
