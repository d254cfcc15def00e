"""Records of a GPU from made-up numbers: the shape of Llama-2-7B in every runtime, kernels, drift."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from adafuse.config import LINEARS
from adafuse.records import open_record
from adafuse.report.goals_measured import SHAPE
from synthetic import config, run_fields, write_latency

GPU = {
    "name": "h200",
    "cpu": "Test CPU",
    "cores": 16,
    "memory_gib": 128.0,
    "gpu": "NVIDIA H200",
    "driver": "1",
}
LLAMA = {"name": "llama2_7b", "dtype": "bfloat16", "path": None, "shape": {**SHAPE, "vocab_size": 32000}}
SWITCHES = (1, 10, 100, 1000)


def experts(rank: int = 16) -> dict[str, Any]:
    return {"targets": list(LINEARS), "rank": rank, "count": 8, "top_k": 2, "alpha": 2 * rank}


def write_gpu_latency(
    folder: Path,
    arms: str,
    rank: int = 16,
    batch: int = 1,
    processes: int = 3,
    context: int = 128,
    **changes: Any,
) -> None:
    """Latency records on a GPU."""
    plain = {"model": LLAMA, "experts": experts(rank), "batch": batch, "context": context}
    plain |= changes.pop("plain", {})
    for replicate in range(processes):
        write_latency(folder, replicate, arms, name=f"{arms}-rank{rank}", plain=plain, machine=GPU, **changes)


def kernel_line(kernel: str = "switch", ms: float | None = 6.9, **changes: Any) -> dict[str, Any]:
    """A line as bench/kernel.py writes it; without a time the check failed."""
    floor_ms = 6.2
    line = {
        "kernel": kernel,
        "model": "llama2_7b",
        "targets": "all",
        "rank": 16,
        "tokens": None if kernel in ("switch", "rebase") else 1,
        "shape": "32 x [q: 4096 -> 4096]",
        "dtype": "bfloat16",
        "error": 0.002 if ms else 0.5,
        "bound": 0.01,
        "passed": ms is not None,
        "ms": ms,
        "naive_ms": 40.0,
        "bytes": 26_000_000_000,
        "floor_ms": floor_ms,
        "gbps": 26e9 / ms / 1e6 if ms else None,
        "share": floor_ms / ms if ms else None,
    }
    return line | changes


def write_kernels(
    folder: Path,
    lines: list[dict[str, Any]],
    name: str = "llama2_7b",
    failed: Sequence[str] = (),
    **changes: Any,
) -> Path:
    """One kernel record; each of `failed` is a case that raised."""
    plain = config(model=LLAMA | {"name": name}, experts=experts(), **changes.pop("plain", {}))
    path = folder / "kernel" / f"{name}.jsonl"
    fields = {"machine": GPU, "experiment": "kernels"} | changes
    with open_record(path, run_fields("kernel", name, plain, **fields)) as record:
        record.write("calibration", read_gbps=4300.0, copy_gbps=4200.0)
        for line in lines:
            record.write("kernel", **line)
        for where in failed:
            record.fail(where, RuntimeError("out of memory"))
    return path


def write_drift(folder: Path, dtype: str = "bfloat16", **changes: Any) -> Path:
    """One drift record: errors of switch grow as the root of the switches, a refresh bounds them, rebase has none."""
    plain = config(model=LLAMA, experts=experts(), drift={"dtype": dtype})
    path = folder / "drift" / f"{dtype}.jsonl"
    unit = {"bfloat16": 2e-3, "float16": 2.5e-4}[dtype]
    with open_record(path, run_fields("drift", dtype, plain, **({"machine": GPU} | changes))) as record:
        for strategy in ("switch", "rebase", "switch_refresh"):
            for count in SWITCHES:
                grown = {"switch": count, "rebase": 1, "switch_refresh": min(count, 20)}[strategy] ** 0.5
                record.write(
                    "drift",
                    strategy=strategy,
                    dtype=dtype,
                    switches=count,
                    weight_error=unit * grown,
                    delta_error=10 * unit * grown,
                    logit_error=3 * unit * grown,
                    agreement=max(0.0, 1 - 4 * unit * grown),
                    identical=strategy == "rebase" or count == 1,
                    delta_share=0.1,
                )
    return path


def write_gpu(folder: Path) -> Path:
    """A whole GPU profile: every runtime, rank and batch of the goals, kernels and drift."""
    for arms in ("paper", "controls"):
        write_gpu_latency(folder, arms, context=64)
    for rank in (16, 64):
        for arms, batches in (("graph", (1, 8, 32)), ("compiled", (1,))):
            for batch in batches:
                write_gpu_latency(folder, arms, rank, batch)
    sizes = [kernel_line(targets=targets, rank=rank) for targets in ("qv", "all") for rank in (16, 64)]
    write_kernels(folder, [*sizes, kernel_line("rebase", 6.5), kernel_line("gather", 0.31, naive_ms=3.1)])
    write_kernels(folder, [kernel_line(model="qwen2_5_7b", ms=7.0)], "qwen2_5_7b")
    for dtype in ("bfloat16", "float16"):
        write_drift(folder, dtype)
    return folder
