"""Records as the stages write them, from made-up numbers: the report's tests measure nothing."""

from pathlib import Path
from typing import Any

import numpy as np

from adafuse.records import open_record, partial_path
from synthetic.arms import ARMS, ROUTING, RUNS, runtime

CHANCE = {"base": 0.35, "lora": 0.70, "mola": 0.74, "moral": 0.73, "pesc": 0.72, "mixlora": 0.74}
FAMILIES = ["copy", "sort", "lookup", "cloze"]


def config(arms: str = "paper", /, about: str = "base", **changes: Any) -> dict[str, Any]:
    """A resolved configuration as it stands in a record; `changes` replace whole entries."""
    names = RUNS[arms]
    table = {
        name: {"label": label, "method": own, "strategy": strategy, "runtime": runtime(name)}
        for name, (label, own, strategy, _) in ARMS.items()
    }
    plain = {
        "task": "latency",
        "model": {"name": "tiny", "dtype": "float32", "shape": {"model_type": "llama", "hidden_size": 128}},
        "experts": {"targets": ["q_proj", "v_proj"], "rank": 8, "count": 8, "top_k": 2, "alpha": 16},
        "method": {"name": about, "routing": ROUTING[about]},
        "methods": {name: {"name": name, "routing": routing} for name, routing in ROUTING.items()},
        "arms": {"name": arms, "table": table, "run": names},
        "data": {"name": "mixture", "families": FAMILIES, "path": None},
        "suite": {"name": "families", "tasks": FAMILIES},
        "latency": {"rounds": 8, "block_tokens": 64, "trained_adapters": False},
        "layer": {"ranks": [4, 32], "sequence_lengths": [100, 1]},
        "batch": 1,
        "context": 64,
        "runs_dir": "runs",
    }
    return plain | changes


def run_fields(task: str, name: str, plain: dict[str, Any], **changes: Any) -> dict[str, Any]:
    """A header as machine.py makes it."""
    fields = {
        "task": task,
        "cell_id": name,
        "config_hash": f"{name}-hash",
        "experiment": task,
        "profile": "cpu",
        "commit": "0123456789abcdef",
        "dirty": False,
        "seed": 0,
        "replicate": 0,
        "versions": {"torch": "2.13.0"},
        "machine": {
            "name": "cpu",
            "cpu": "Test CPU",
            "cores": 2,
            "memory_gib": 8.0,
            "gpu": None,
            "driver": None,
        },
        "command": "run.py",
        "started_utc": "2026-01-01T00:00:00+00:00",
        "config": plain,
    }
    return fields | changes


def write_latency(
    folder: Path,
    replicate: int = 0,
    arms: str = "paper",
    failed: tuple[str, ...] = (),
    broken: tuple[str, ...] = (),
    rounds: int = 8,
    factors: dict[str, float] | None = None,
    name: str = "",
    counted: int = 1_500_000,
    state: dict[str, Any] | None = None,
    flags: tuple[tuple[str, int, str], ...] = (),
    calibration: dict[str, float] | None = None,
    **changes: Any,
) -> Path:
    """One latency record; `failed` arms miss a check, `broken` arms raise, `factors` scale an arm's time; `name`
    tells files of equal arms apart. `state` is that of every block; a flag is arm, round and reason; `calibration`
    adds to what older records have.
    """
    plain = config(arms, **changes.pop("plain", {}))
    name = f"{name or arms}-{plain['model']['name']}-b{plain['batch']}-r{replicate}"
    path = folder / "latency" / f"{name}.jsonl"
    rng = np.random.default_rng(replicate + 10 * plain["batch"])
    offset = rng.normal(1, 0.02)
    with open_record(path, run_fields("latency", name, plain, replicate=replicate, **changes)) as record:
        record.write("calibration", **({"read_gbps": 20.0, "copy_gbps": 18.0} | (calibration or {})))
        for arm in plain["arms"]["run"]:
            bad = arm in failed
            record.write(
                "check",
                arm=arm,
                check="logits",
                value=0.5 if bad else 1e-6,
                bound=1e-3,
                passed=not bad,
                detail="",
            )
            record.write("check", arm=arm, check="restored", value=0.0, bound=0.0, passed=True, detail="")
            if bad:
                continue
            if arm in broken:
                record.fail(f"arm {arm}", RuntimeError("out of memory"))
                continue
            extra = 0 if arm.startswith("base") else 120_000
            record.write(
                "cost",
                arm=arm,
                params=counted + extra,
                macs=1_400_000 + extra // 4,
                bytes_per_token=6e6,
                floor_ms=0.3,
                adapter_params=extra,
            )
            record.write("memory", arm=arm, weights_gib=0.006, peak_gib=None, note="needs a CUDA device")
        for number in range(rounds):
            drift = offset * (1 + 0.05 * number / rounds)
            for position, arm in enumerate(rng.permutation(plain["arms"]["run"])):
                if arm not in failed and arm not in broken:
                    ms = 64 * ARMS[arm][3] * (factors or {}).get(arm, 1.0) * drift * rng.normal(1, 0.01)
                    odd = "preempted: test" if number == 3 and arm == "base" else None
                    record.write(
                        "block",
                        arm=arm,
                        round=number,
                        position=position,
                        tokens=64,
                        block_ms=ms,
                        excluded=odd,
                        state=state or {},
                    )
        for arm, number, reason in flags:
            record.write("flag", arm=arm, round=number, reason=reason)
    return path


def write_accuracy(folder: Path, method: str, seed: int = 0, items: int = 60, **changes: Any) -> Path:
    """One evaluate record over the families, with its items."""
    plain = config(about=method, **changes.pop("plain", {}))
    name = f"{method}-s{seed}-{plain['data']['name']}-{'-'.join(plain['suite']['tasks'])}"
    path = folder / "evaluate" / f"{name}.jsonl"
    rng = np.random.default_rng(seed)
    with open_record(path, run_fields("evaluate", name, plain, seed=seed, **changes)) as record:
        for task in plain["suite"]["tasks"]:
            # the same items are hard for every method
            hardness = rng.random(items)
            correct = (hardness + rng.normal(0, 0.05, items) < CHANCE.get(method, 0.73)).astype(float)
            stderr = float(correct.std(ddof=1) / np.sqrt(items))
            record.write(
                "metric", suite_task=task, metric="acc", value=correct.mean(), stderr=stderr, n=items
            )
            record.write("items", suite_task=task, metric="acc", correct=correct)
    return path


def write_layer(folder: Path, replicate: int = 0, experiment: str = "figure2", **changes: Any) -> Path:
    """One layer record: prefill and decode, low and high rank (figure1: decode at one rank)."""
    plain = config(about="moral", **changes.pop("plain", {}))
    if experiment == "figure1":
        plain["layer"] = {"ranks": [8], "sequence_lengths": [1]}
    name = f"layer-{experiment}-r{replicate}"
    path = folder / "layer" / f"{name}.jsonl"
    rng = np.random.default_rng(replicate)
    with open_record(
        path, run_fields("layer", name, plain, experiment=experiment, replicate=replicate, **changes)
    ) as record:
        for length in plain["layer"]["sequence_lengths"]:
            for rank in plain["layer"]["ranks"]:
                backbone_ms = 0.01 + 0.0004 * length
                times = {"backbone": backbone_ms, "adapters": 0.08 + 0.0005 * rank * length / 4}
                times["both"] = sum(times.values())
                for block in range(6):
                    for part, ms in times.items():
                        record.write(
                            "layer",
                            sequence_length=length,
                            rank=rank,
                            phase="decode" if length == 1 else "prefill",
                            part=part,
                            block=block,
                            ms=ms * rng.normal(1, 0.02),
                        )
    return path


def write_training(folder: Path, method: str, seed: int = 0, task: str = "train") -> Path:
    """One training record: a loss that falls."""
    name = f"{task}-{method}-s{seed}"
    path = folder / task / f"{name}.jsonl"
    rng = np.random.default_rng(seed)
    with open_record(path, run_fields(task, name, config(about=method), seed=seed)) as record:
        for step in range(5, 205, 5):
            floor = 1.2 - 0.5 * CHANCE.get(method, 0.73)
            loss = floor + 3.5 * np.exp(-step / 40) + rng.normal(0, 0.03)
            record.write("loss", step=step, loss=loss, balance_loss=1.0, learning_rate=1e-3)
    return path


def write_unfinished(path: Path, task: str = "latency", **changes: Any) -> Path:
    """What a killed process leaves: a header, and half a line."""
    done = (
        write_latency(path.parent, replicate=99, **changes)
        if task == "latency"
        else write_accuracy(path.parent, "lora", 99)
    )
    data = done.read_bytes()
    done.unlink()
    path.parent.mkdir(parents=True, exist_ok=True)
    partial_path(path).write_bytes(data[: len(data) // 2])
    return partial_path(path)


def write_all(folder: Path, seeds: int = 3) -> Path:
    """A whole profile: every task, three replicates or seeds."""
    for replicate in range(3):
        write_latency(folder, replicate)
        write_latency(folder, replicate, "controls")
        write_layer(folder, replicate)
        write_layer(folder, replicate, "figure1")
    for seed in range(seeds):
        write_training(folder, "base", seed, "pretrain")
        for method in ROUTING:
            write_accuracy(folder, method, seed)
            if method != "base":
                write_training(folder, method, seed)
    return folder
