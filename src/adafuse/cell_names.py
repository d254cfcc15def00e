"""A readable name for every cell, which its files bear in front of the hash that makes them unique.

In: a checked `Config`, a task, a method. Out: a slug of at most 80 characters. Next: identity.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from adafuse.config import Config, Method, Task

SLUG_CHARACTERS = 80


def cell_id(config: Config, task: Task | None = None, method: Method | None = None) -> str:
    """A readable name of at most 80 characters, safe as a file name; the hash beside it makes it unique."""
    parts = _NAMES[task or config.task](config, method or config.method)
    slug = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", str(part)) for part in parts)
    return slug[:SLUG_CHARACTERS]


_NAMES: dict[Task, Callable[[Config, Method], list[Any]]] = {
    Task.pretrain: lambda c, m: [c.model.name, f"s{c.model.seed}"],
    Task.train: lambda c, m: [_model(c), _geometry(c), m.name, c.data.name, f"s{c.seed}"],
    Task.evaluate: lambda c, m: [
        *([_model(c), _geometry(c)] if m.has_experts else [_model(c)]),
        *(m.name, c.data.name, c.suite.name, c.evaluate_strategy.name, f"s{c.seed}"),
    ],
    Task.latency: lambda c, m: _arms_name(c, c.arms.name),
    Task.memory: lambda c, m: _arms_name(c, c.arms.run[0]),
    Task.trace: lambda c, m: _arms_name(c, c.arms.name),
    Task.layer: lambda c, m: [c.model.name, f"{c.experts.count}x", f"s{c.seed}", f"r{c.replicate}"],
    Task.kernel: lambda c, m: [c.model.name, f"{c.experts.count}x", f"s{c.seed}", f"r{c.replicate}"],
    Task.drift: lambda c, m: [
        *(_model(c), _geometry(c), m.name, c.drift.dtype.name),
        *(f"c{c.context}", f"s{c.seed}", f"r{c.replicate}"),
    ],
}


def _arms_name(config: Config, arms: str) -> list[Any]:
    workload = f"b{config.batch}", f"c{config.context}", f"s{config.seed}", f"r{config.replicate}"
    return [_model(config), _geometry(config), arms, *workload]


def _model(config: Config) -> str:
    return config.model.name if config.model.path is None else Path(config.model.path).resolve().name


def _geometry(config: Config) -> str:
    return f"{config.experts.count}x{config.experts.rank}"
