"""Memory records from made-up numbers: one arm a file, as bench/memory.py writes them."""

from pathlib import Path
from typing import Any

from adafuse.records import open_record
from synthetic.runs import config, run_fields, write_latency

GPU = {"name": "h100", "cpu": "C", "cores": 8, "memory_gib": 100.0, "gpu": "NVIDIA H100", "driver": "1"}
# over the backbone: AdaFuse at 1.06 and PESC at 1.02 as printed, MoLA and MoRAL larger than it and not as printed
PEAKS = {"base": 13.0, "mola_loop": 14.0, "pesc_loop": 13.26, "moral_loop": 14.3, "adafuse_switch": 13.8}
NEEDS_GPU = "no peak without a CUDA device; process_gib is the peak resident set"


def write_memory(
    folder: Path, arm: str, peak_gib: float | None, plain: dict[str, Any] | None = None, **changes: Any
) -> Path:
    """One memory record; without a peak it is a CPU's."""
    full = config(**(plain or {})) | {"task": "memory"}
    full["arms"] = full["arms"] | {"run": [arm]}
    path = folder / "memory" / f"{arm}-b{full['batch']}-t{full['latency']['block_tokens']}.jsonl"
    machine = {} if peak_gib is None else {"machine": GPU}
    with open_record(path, run_fields("memory", arm, full, **(machine | changes))) as record:
        on_gpu = peak_gib is not None
        record.write(
            "memory",
            arm=arm,
            weights_gib=12.6,
            peak_gib=peak_gib,
            peak_load_gib=peak_gib + 2 if on_gpu else None,
            reserved_gib=peak_gib + 0.5 if on_gpu else None,
            process_gib=peak_gib + 1 if on_gpu else 0.4,
            note="peaks of the allocator" if on_gpu else NEEDS_GPU,
        )
    return path


def write_peaks(folder: Path, peaks: dict[str, float] | None = None, **changes: Any) -> None:
    """Table 5's memory, one record an arm."""
    for arm, peak_gib in (peaks or PEAKS).items():
        write_memory(folder, arm, peak_gib, **changes)


def write_both(folder: Path, peaks: dict[str, float] | None = None) -> None:
    """A latency cell of a GPU, and the memory of its arms."""
    write_latency(folder, machine=GPU)
    write_peaks(folder, peaks)


def write_failed_memory(folder: Path, arm: str) -> None:
    """An arm that did not fit."""
    full = config() | {"task": "memory"}
    full["arms"] = full["arms"] | {"run": [arm]}
    path = folder / "memory" / f"{arm}-failed.jsonl"
    with open_record(path, run_fields("memory", arm, full, machine=GPU)) as record:
        record.fail(f"arm {arm}", MemoryError(f"{arm} does not fit a device of 80.0 GiB"))
