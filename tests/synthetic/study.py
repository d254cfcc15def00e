"""Made-up accuracy studies: evaluations whose accuracy is known, and the training runs behind them.

A record's header names its experiment and the command with all `changes`, so that membership follows from headers.
"""

import copy
import json
import shlex
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from adafuse.records import open_record
from synthetic.arms import ROUTING
from synthetic.runs import FAMILIES, config, run_fields

GPU = {
    "name": "h200",
    "cpu": "Test CPU",
    "cores": 8,
    "memory_gib": 100.0,
    "gpu": "NVIDIA H200",
    "driver": "1",
}
METHOD = {"router_input": "first_linear", "balance_coefficient": 0.01, "learning_rate_factor": 1.0}
LAYERS = [f"model.layers.{block}.self_attn.{name}" for block in range(4) for name in ("q_proj", "v_proj")]


def study_config(
    method: str, changes: dict[str, Any] | None = None, task: str = "evaluate"
) -> dict[str, Any]:
    """A resolved configuration; `changes` are by dotted name: {"experts.rank": 4}."""
    plain = copy.deepcopy(config(about=method if method in ROUTING else "base"))
    plain |= {
        "task": task,
        "method": {"name": method, "routing": ROUTING.get(method, "none"), **METHOD},
        "pretrain": {"steps": 100},
        "train": {"steps": 100, "learning_rate": 1e-3},
        "evaluate_strategy": "dense",
        "evaluate_dtype": "float32",
        "budget": "published",
    }
    plain["data"]["level"] = 1
    for name, value in (changes or {}).items():
        group, _, entry = name.rpartition(".")
        (plain[group] if group else plain)[entry] = value
    return plain


def write_evaluation(
    folder: Path,
    method: str = "adafuse",
    accuracy: float = 0.7,
    seed: int = 0,
    changes: dict[str, Any] | None = None,
    items: int = 100,
    flips: int = 0,
    trainable: int | None = 1_200_000,
    machine: dict[str, Any] = GPU,
    tilt: dict[str, float] | None = None,
    backbone: str | None = None,
    experiment: str = "table2",
) -> Path:
    """One evaluation: each task's items are right up to `accuracy`, more or less by `tilt`; of them the first `flips`
    are turned around.
    """
    plain = study_config(method, changes)
    path, header = _header(folder, "evaluate", method, seed, changes or {}, machine, experiment)
    rng = np.random.default_rng(seed)
    with open_record(path, header) as record:
        for task in plain["suite"]["tasks"]:
            # the same items are hard for every method
            right = (rng.permutation(items) + 0.5) / items < accuracy + (tilt or {}).get(task, 0.0)
            right[:flips] = ~right[:flips]
            fields = {"suite_task": task, "metric": "acc"}
            hashed = f"{task}-{plain['data']['level']}"
            stderr = float(right.std(ddof=1) / np.sqrt(items))
            record.write("metric", **fields, value=right.mean(), stderr=stderr, n=items, task_hash=hashed)
            record.write("items", **fields, correct=right.astype(float))
        if trainable is not None:
            record.write("parameters", trainable=trainable)
        if backbone is not None:
            record.write("backbone", sha256=backbone)
    return path


def write_fit(
    folder: Path,
    method: str = "adafuse",
    seed: int = 0,
    changes: dict[str, Any] | None = None,
    loss: float = 0.8,
    loads: dict[str, list[float]] | None = None,
    bypassed: float = 0.0,
    entropy: float = 1.5,
    information: float | None = None,
    machine: dict[str, Any] = GPU,
    experiment: str = "table2",
) -> Path:
    """One training run: every router has the same `loads` by family; pairs of routers share `information`."""
    plain = study_config(method, changes, "train")
    path, header = _header(folder, "train", method, seed, changes or {}, machine, experiment)
    names = {"token": ["token"], "none": []}.get(plain["method"]["routing"], LAYERS)
    with open_record(path, header) as record:
        record.write("loss", step=5, loss=loss + 1, balance_loss=1.0, learning_rate=1e-3)
        record.write("metric", suite_task="validation", metric="loss", value=loss, stderr=None, n=10)
        for router in names:
            for family, load in (loads or {family: [0.125] * 8 for family in FAMILIES}).items():
                fields = {"load": load, "entropy_nats": entropy, "bypassed": bypassed}
                record.write("routing", router=router, family=family, **fields)
        if information is not None and len(names) > 1:
            matrix = np.full((len(names), len(names)), information)
            np.fill_diagonal(matrix, 1.0)
            record.write("agreement", routers=names, information=matrix)
    return path


def write_study(
    folder: Path, accuracy: dict[str, float], seeds: int = 5, spread: float = 0.0, **how: Any
) -> Path:
    """An evaluation and a training run for each method and seed; seed s lies `spread` times (s - mean) higher."""
    names = ("loads", "bypassed", "information", "loss", "entropy")
    fit = {name: how.pop(name) for name in names if name in how}
    for method, value in accuracy.items():
        for seed in range(seeds):
            shift = spread * (seed - (seeds - 1) / 2) * (1 if method == "adafuse" else 0)
            write_evaluation(folder, method, value + shift, seed, **how)
            common = {name: how[name] for name in ("changes", "machine", "experiment") if name in how}
            if method != "base":
                write_fit(folder, method, seed, **fit, **common)
    return folder


def write_pretraining(
    folder: Path,
    model: str = "tiny",
    machine: dict[str, Any] = GPU,
    steps: int = 100,
    losses: dict[str, float] | None = None,
    sha256: str = "ab" * 32,
    resumed_from_step: int = 0,
    parameters: int = 1_022_848,
    changes: dict[str, Any] | None = None,
) -> Path:
    """One pre-training run: a loss line, held-out `losses` by text, and what was saved."""
    changes = {"model.name": model, "pretrain.steps": steps} | (changes or {})
    path, header = _header(folder, "pretrain", "base", 0, changes, machine, "")
    with open_record(path, header) as record:
        record.write("loss", step=steps, loss=1.0, balance_loss=0.0, learning_rate=1e-3)
        for name, value in (losses or {}).items():
            record.write("metric", suite_task=name, metric="loss", value=value, stderr=None, n=10)
        record.write("parameters", trainable=parameters)
        record.write("artifact", path="somewhere", sha256=sha256, resumed_from_step=resumed_from_step)
    return path


def _header(
    folder: Path,
    task: str,
    method: str,
    seed: int,
    changes: dict[str, Any],
    machine: dict[str, Any],
    experiment: str,
) -> tuple[Path, dict[str, Any]]:
    plain = study_config(method, changes, task)
    mark = zlib.crc32(json.dumps([task, plain, seed, machine["name"], experiment], sort_keys=True).encode())
    name = f"{method}-s{seed}-{mark:08x}"
    words = [f"{key}={str(value).replace(' ', '')}" for key, value in changes.items()]
    command = " ".join(["run.py", f"seed={seed}", f"method={method}", *map(shlex.quote, words)])
    about = {"experiment": experiment, "command": command, "seed": seed, "machine": machine}
    return folder / task / f"{name}.jsonl", run_fields(task, name, plain, **about)
