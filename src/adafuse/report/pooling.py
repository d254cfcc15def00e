"""Which records may be pooled: what two of them must agree in to be replicates of one cell.

In: records. Out: keys as text; equal keys are one cell. Next: cells.py.
"""

from __future__ import annotations

import json
from typing import Any

from adafuse.identity import without_unused
from adafuse.records import Record
from adafuse.report.older import BEFORE, entry

# What may differ between records of one cell: how often and how long, never what.
REPEATS = ("rounds", "settle_tokens", "check_tokens", "warmup", "runs", "replays", "save_every_steps")


def pooling_key(record: Record, with_arms: bool = True) -> str:
    """What must agree for two records to be pooled, as text."""
    config, task = record.run["config"], record.run["task"]
    same = _same(record, "model", "experts")
    if task in ("latency", "trace"):
        trained = config.get("latency", {}).get("trained_adapters")
        same |= _same(
            record, "batch", "context", "latency", *(("pretrain", "train", "data") if trained else ())
        )
        same |= _arms(config) if with_arms else {}
    else:
        names = {
            "layer": ("layer",),
            "kernel": ("kernel",),
            "memory": ("methods", "batch", "context"),
            "drift": ("method", "drift", "latency"),
            "pretrain": ("pretrain",),
            "train": ("pretrain", "train", "data", "budget"),
            "evaluate": ("pretrain", "train", "data", "suite", *BEFORE),
        }
        same |= _same(record, *names.get(task, ()))
    if task == "drift":
        # Dtypes are lines of one table and one figure.
        same["drift"] = {k: v for k, v in (same["drift"] or {}).items() if k != "dtype"}
    return json.dumps(without_unused(same), sort_keys=True)


def backbone_key(record: Record) -> str:
    """What must agree for a backbone's record to belong to an adapter's."""
    same = _same(record, "model", "pretrain", "data", "suite")
    same["data"] = {k: v for k, v in same["data"].items() if k not in ("train_items", "validation_items")}
    return json.dumps(same, sort_keys=True)


def workload_key(record: Record) -> str:
    """What a memory record and a latency cell must agree in to be of one workload; arms are looked at one by one."""
    return json.dumps(_same(record, "model", "experts", "batch", "context"), sort_keys=True)


def arm_key(config: dict[str, Any], arm: str) -> str:
    """What an arm is, whatever it is called in tables: strategy, runtime, and its method's own settings."""
    known = config["arms"].get("table", {}).get(arm, {})
    method = _untrained(config.get("methods", {})).get(known.get("method"))
    what = {"strategy": known.get("strategy"), "runtime": known.get("runtime", "eager"), "method": method}
    return json.dumps(without_unused(what), sort_keys=True)


def is_domain(record: Record) -> bool:
    """True for an adapter trained on one domain by itself, as in the paper's Tables 3 and 4."""
    return str(record.run["config"].get("data", {}).get("name")) == "domain"


def _same(record: Record, *names: str) -> dict[str, Any]:
    config, machine = record.run["config"], record.run["machine"]
    same: dict[str, Any] = {"machine": {name: machine.get(name) for name in ("name", "cpu", "gpu")}}
    for name in names:
        value = _untrained(config[name]) if name == "methods" else entry(config, name)
        same[name] = (
            {k: v for k, v in value.items() if k not in REPEATS} if isinstance(value, dict) else value
        )
    if is_domain(record):
        # One adapter for each domain: together they are one study.
        drop = {"data": ("families", "path"), "suite": ("name", "tasks")}
        for name in drop.keys() & same.keys():
            same[name] = {k: v for k, v in same[name].items() if k not in drop[name]}
    return same


def _arms(config: dict[str, Any]) -> dict[str, Any]:
    """Arms and methods of a latency cell; a label is prose and may change."""
    arms = config.get("arms", {})
    table = {name: arms.get("table", {}).get(name, {}) for name in arms.get("run", [])}
    what = {name: [arm.get(k) for k in ("method", "strategy", "runtime")] for name, arm in table.items()}
    methods = _untrained(config.get("methods", {}))
    return {
        "arms": what,
        "methods": {str(arm.get("method")): methods.get(arm.get("method")) for arm in table.values()},
    }


def _untrained(methods: dict[str, Any]) -> dict[str, Any]:
    """Methods that arms have, without the rate at which they are trained: both came after arms had been measured."""
    arms = {name: own for name, own in methods.items() if not own.get("full")}
    return {name: {k: v for k, v in own.items() if k != "learning_rate_factor"} for name, own in arms.items()}
