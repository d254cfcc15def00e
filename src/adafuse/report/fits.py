"""Which training run stands behind an evaluation, and what it says of itself.

In: train and evaluate records. Out: the train records of an adapter, found by configuration and seed. Next:
held_out.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np

from adafuse.identity import without_unused
from adafuse.records import Record
from adafuse.report.older import entry

# what an adapter is made of
MADE_OF = ("model", "experts", "method", "pretrain", "train", "data")
Fits = dict[str, Record]


def fits(records: Iterable[Record]) -> Fits:
    """The finished train records by what they trained."""
    own = [r for r in records if r.run.get("task") == "train" and r.status != "unfinished"]
    return {fit_key(record): record for record in own}


def behind(evaluated: Iterable[Record], known: Fits) -> list[Record]:
    """The train records whose adapters these evaluations used."""
    keys = dict.fromkeys(fit_key(record) for record in evaluated)
    return [known[key] for key in keys if key in known]


def fit_key(record: Record) -> str:
    """What an adapter is made of, as text; the same for its training and for its evaluations."""
    parts = {name: entry(record.run["config"], name) for name in MADE_OF}
    return json.dumps([without_unused(parts), record.run.get("seed", 0)], sort_keys=True)


def validation_loss(trained: Iterable[Record]) -> float | None:
    """The mean loss over held-out items, in nats a token."""
    lines = [line for record in trained for line in record.of("metric") if line["metric"] == "loss"]
    values = [line["value"] for line in lines if line["value"] is not None]
    return float(np.mean(values)) if values else None
