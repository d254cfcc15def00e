"""The machine under test: its clocks to time by, and what it tells about itself around a block.

In: `cpu` or `cuda`. Out: milliseconds, and a dict of JSON values whose names end in their units; what the driver does
not tell is absent, and no refusal of the driver fails a run. Next: calibration.py, rounds.py.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from typing import Any

import torch

from adafuse.machine import nvml_handle

# large against any cache; the GPU's 60 MB of L2 would otherwise answer
BUFFER_MIB = {"cpu": 256, "cuda": 4096}
# What nvmlDeviceGetCurrentClocksEventReasons says by bits, of the reasons that hold a GPU back.
THROTTLE_NAMES = {
    0x4: "sw_power_cap",
    0x8: "hw_slowdown",
    0x20: "sw_thermal_slowdown",
    0x40: "hw_thermal_slowdown",
    0x80: "hw_power_brake_slowdown",
    0x100: "display_clock_setting",
    0x200: "board_limit",
    0x400: "reliability",
}
# of a block's two samples
WORSE = {"sm_mhz": min, "memory_mhz": min, "foreign_processes": max, "outside_gib": max}
# Idle, clocks that somebody set, and clocks in step with another GPU's: no throttling.
SETTING_BITS = 0x1 | 0x2 | 0x10


def timed_ms(where: str, work: Callable[[], object]) -> float:
    """Milliseconds of `work`, the device's queue drained before and after."""
    if where == "cuda":
        torch.cuda.synchronize()
        return queued_ms(work, 1)[0]
    begin = time.perf_counter()
    work()
    return (time.perf_counter() - begin) * 1e3


def queued_ms(replay: Callable[[], object], times: int) -> list[float]:
    """Milliseconds of each of `times` replays that queue behind each other, so that the host's launch is in none."""
    events = [torch.cuda.Event(enable_timing=True) for _ in range(times + 1)]
    events[0].record()
    for event in events[1:]:
        replay()
        event.record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) for start, end in pairwise(events)]


def captured(work: Callable[[], object]) -> Callable[[], None]:
    """`work` as one CUDA graph; run once before, because first launches load modules, which capture forbids."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        work()
    return graph.replay


def state(where: str) -> dict[str, Any]:
    """One sample: load, and on a GPU clocks, power, temperature, what throttles it, and who else is on it."""
    return {"load_1min": os.getloadavg()[0]} | (_gpu_state() if where == "cuda" else {})


def over_block(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The state of a block between two samples.

    A clock is the lower of the two, a reason to throttle counts if either sample has it, neighbours are the most of
    the two. Power and temperature are the later ones: both follow with a delay, and the earlier belong to the arm
    before. `throttled_ms` is by how much the driver's own counts grew, for power and for heat.
    """
    seen = {name: value for name, value in after.items() if name != "violation_ms"}
    for name, worse in WORSE.items():
        told = [sample[name] for sample in (before, after) if name in sample]
        if told:
            seen[name] = worse(told)
    if "throttle" in before or "throttle" in after:
        seen["throttle"] = sorted({*before.get("throttle", []), *after.get("throttle", [])})
    earlier, later = before.get("violation_ms", {}), after.get("violation_ms", {})
    grown = {name: round(later[name] - earlier[name], 3) for name in later if name in earlier}
    return seen | ({"throttled_ms": grown} if grown else {})


def throttle_names(bits: int) -> list[str]:
    """The reasons that hold the GPU back, by name; a bit that this code does not know is named by its value."""
    single = (1 << place for place in range(bits.bit_length()))
    held = [bit for bit in single if bits & bit and not bit & SETTING_BITS]
    return [THROTTLE_NAMES.get(bit, f"bit_{bit:#x}") for bit in held]


def driver() -> tuple[Any, Any] | None:
    """pynvml and its handle of the current GPU, or None where it cannot be asked."""
    return nvml_handle(str(torch.cuda.get_device_properties(torch.cuda.current_device()).uuid))


def _gpu_state() -> dict[str, Any]:
    found = driver()
    if found is None:
        return {}
    nvml, gpu = found
    calls: dict[str, Callable[[], Any]] = {
        # clocks first: they fall soon after the queue is empty
        "sm_mhz": lambda: float(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_SM)),
        "memory_mhz": lambda: float(nvml.nvmlDeviceGetClockInfo(gpu, nvml.NVML_CLOCK_MEM)),
        "throttle": lambda: throttle_names(nvml.nvmlDeviceGetCurrentClocksEventReasons(gpu)),
        "power_w": lambda: nvml.nvmlDeviceGetPowerUsage(gpu) / 1e3,
        "temperature_c": lambda: float(nvml.nvmlDeviceGetTemperature(gpu, nvml.NVML_TEMPERATURE_GPU)),
        "foreign_processes": lambda: _foreign_processes(nvml.nvmlDeviceGetComputeRunningProcesses(gpu)),
        "outside_gib": lambda: _outside_gib(nvml.nvmlDeviceGetMemoryInfo(gpu).used),
    }
    policies = {"power": nvml.NVML_PERF_POLICY_POWER, "thermal": nvml.NVML_PERF_POLICY_THERMAL}
    counts = {name: partial(_violation_ms, nvml, gpu, policy) for name, policy in policies.items()}
    seen, violation_ms = (_told(asked, nvml.NVMLError) for asked in (calls, counts))
    return seen | ({"violation_ms": violation_ms} if violation_ms else {})


def _violation_ms(nvml: Any, gpu: Any, policy: int) -> float:
    """How long the driver has held the GPU back for this reason, ever; it counts nanoseconds."""
    return nvml.nvmlDeviceGetViolationStatus(gpu, policy).violationTime / 1e6


def _told(calls: Mapping[str, Callable[[], Any]], refusal: type[Exception]) -> dict[str, Any]:
    """The answers; a call that the driver refuses, or answers with nothing, has no key."""
    answers = {}
    for name, call in calls.items():
        try:
            answer = call()
        except refusal:
            continue
        if answer is not None:
            answers[name] = answer
    return answers


def _foreign_processes(listed: list[Any]) -> int | None:
    """How many processes other than ours compute on the GPU; None if the driver shows none at all, since we do.

    Inside a container the numbers listed may be those of the host, where ours is another. Nobody there can be told
    to be us, so one of them is taken to be; the count and the memory used (`outside_gib`) are then compared with
    those at the start of the run (rounds.py), which needs no names.
    """
    if not listed:
        return None
    others = [process for process in listed if process.pid != os.getpid()]
    return min(len(others), len(listed) - 1)


def _outside_gib(used_bytes: int) -> float:
    """Memory in use on the GPU that is not torch's in this process: the driver, our code and graphs, and neighbours."""
    return round((used_bytes - torch.cuda.memory_reserved()) / 2**30, 3)
