"""The machine under test: its measured bandwidth, its state during a block, and a clock.

In: `cpu` or `cuda`. Out: GB/s (1e9 bytes), milliseconds, and a small dict of state per block. Floors use the bandwidth
measured here, never a data sheet. Next: checks.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

# large against any cache; the GPU's 60 MB of L2 would otherwise answer
BUFFER_MIB = {"cpu": 256, "cuda": 4096}
REPEATS = 5
# an idle GPU takes this long to raise its clocks
WARMUP_MS = 500.0
# A block whose process had a CPU for less than half of the time was preempted. Not stricter: on a busy machine every
# block loses some time, alike for all arms of a round, and pairing takes that out.
MIN_CPU_SHARE = 0.5


def timed_ms(device: str, work: Callable[[], object]) -> float:
    """Milliseconds of `work`, the device's queue drained before and after."""
    if device == "cuda":
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        start.record()
        work()
        end.record()
        torch.cuda.synchronize()
        return start.elapsed_time(end)
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e3


def calibrate(device: str) -> dict[str, float]:
    """Read and copy bandwidth in GB/s, and the cost in microseconds of launching one tiny operation.

    On a GPU by kernels of our own: torch's copy belongs to the copy engines (kernels/stream.py).
    """
    count = BUFFER_MIB[device] * 2**20 // 4
    source, target = (torch.ones(count, device=device) for _ in range(2))
    tiny = torch.ones(1, device=device)
    size_gb = count * 4 / 1e9
    reads, copies = _streams(device, source, target)
    read_ms, copy_ms = (min(_median_ms(device, work) for work in works) for works in (reads, copies))
    launch_ms = _median_ms(device, lambda: [tiny.add_(1.0) for _ in range(1000)])
    return {
        "read_gbps": size_gb / read_ms * 1e3,
        "copy_gbps": 2 * size_gb / copy_ms * 1e3,
        "launch_us": launch_ms,
        "threads": float(torch.get_num_threads()),
    }


def _streams(
    device: str, source: Tensor, target: Tensor
) -> tuple[list[Callable[[], object]], list[Callable[[], object]]]:
    """Ways to read `source` once, and ways to copy it; a GPU is busy for a while first, on numbers of all kinds."""
    if device != "cuda":
        return [source.sum], [lambda: target.copy_(source)]
    from adafuse.kernels import stream

    source.normal_()
    begin = time.perf_counter()
    while (time.perf_counter() - begin) * 1e3 < WARMUP_MS:
        timed_ms(device, lambda: stream.copy_(target, source, stream.BLOCKS[0]))
    reads = [partial(stream.read, source, block) for block in stream.BLOCKS]
    return [*reads], [partial(stream.copy_, target, source, block) for block in stream.BLOCKS]


def _median_ms(device: str, work: Callable[[], object]) -> float:
    work()
    return median(timed_ms(device, work) for _ in range(REPEATS))


def state(device: str) -> dict[str, float]:
    """What may explain an odd block: load, and on a GPU clocks (MHz), power (W), temperature (C), throttle bits."""
    seen = {"load_1min": os.getloadavg()[0]}
    if device == "cuda":
        import pynvml

        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByIndex(torch.cuda.current_device())
        seen |= {
            "sm_mhz": float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM)),
            "memory_mhz": float(pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM)),
            "power_w": pynvml.nvmlDeviceGetPowerUsage(handle) / 1e3,
            "temperature_c": float(pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU)),
            "throttle_bits": float(pynvml.nvmlDeviceGetCurrentClocksEventReasons(handle)),
        }
    return seen


def exclusion(device: str, cpu_share: float) -> str | None:
    """Why a block must not count, decided before looking at its time; None if it counts."""
    if device == "cpu" and cpu_share < MIN_CPU_SHARE:
        return f"preempted: the process had the CPU for {cpu_share:.0%} of the block"
    return None
