"""What one arm holds on the device while it decodes: a process of its own, so that nothing else is in the peak.

In: a `Config` of exactly one arm, the backbone, a record to write to. Out: one memory line. There is no fp32
reference here and no other arm's adapter; that the arm is correct is said by the latency cell that holds its checks.
Two peaks: with the load (random weights, or weights on the move, may hold more for a moment), and of inference alone,
which is what the paper prints. Next: report/memory.py.
"""

from __future__ import annotations

import gc
import os
import resource
from dataclasses import asdict, dataclass

import torch
from torch import nn

from adafuse.bench import cost, device, workload
from adafuse.config import Arm, Config
from adafuse.engine.make import make
from adafuse.model.clean import kept_on_host
from adafuse.records import Recorder

GIB = 2**30
OF_TORCH = "peaks are of torch's allocator, peak_gib from the installed adapter on: prefill and decode"
ON_CPU = "no peak without a CUDA device; process_gib is the peak resident set, libraries and load included"


@dataclass(frozen=True)
class Held:
    """GiB; None where the device cannot tell, and `note` says why."""

    peak_gib: float | None
    peak_load_gib: float | None
    reserved_gib: float | None
    process_gib: float | None
    note: str


def run(config: Config, model: nn.Module, where: str, record: Recorder) -> None:
    """Measure the arm and write its line to `record`; one that does not fit leaves an error of one line."""
    ((name, arm),) = config.arms.chosen.items()
    try:
        weights_gib, held = _decode(config, arm, model, where)
    except (torch.cuda.OutOfMemoryError, MemoryError) as error:
        record.fail(f"arm {name}", does_not_fit(name, model, where, error))
        return
    record.write("memory", arm=name, weights_gib=weights_gib, **asdict(held))


def _decode(config: Config, arm: Arm, model: nn.Module, where: str) -> tuple[float, Held]:
    """The prompt and one block of tokens, as a latency cell decodes them; what counting and measuring say."""
    prompt, tokens = workload.prompts(config, model, where), config.latency.block_tokens
    # A latency cell makes room behind the weights for all of its adapters at once, because captured arms keep
    # addresses. One arm alone needs none: a strategy that uses such rows moves the weights as it is installed, and
    # any other must not carry empty ones.
    adapter = workload.adapters(config, model).get(arm.method)
    decoder = make(model, adapter, arm.strategy, arm.runtime, config.context + tokens)
    with kept_on_host(), decoder.installed():
        load_gib = _forget_load(where)
        decoder.start(prompt)
        with decoder.decoding():
            decoder.run(tokens)
            held = _held(where, load_gib)
    return cost.weights_gib(model, adapter, arm.strategy), held


def _forget_load(where: str) -> float:
    """The peak until now; afterwards peaks, and what the allocator keeps for itself, are of inference."""
    if where != "cuda":
        return 0.0
    torch.cuda.synchronize()
    load_gib = torch.cuda.max_memory_allocated() / GIB
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return load_gib


def _held(where: str, load_gib: float) -> Held:
    if where != "cuda":
        # in KiB on Linux
        resident_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        return Held(None, None, None, resident_gib, ON_CPU)
    torch.cuda.synchronize()
    peak_gib = torch.cuda.max_memory_allocated() / GIB
    process_gib, said = _of_process()
    reserved_gib = torch.cuda.max_memory_reserved() / GIB
    return Held(peak_gib, max(load_gib, peak_gib), reserved_gib, process_gib, f"{OF_TORCH}; {said}")


def _of_process() -> tuple[float | None, str]:
    """What the driver counts for this process, CUDA's context included, and how that was found out."""
    listed = _listed_gib()
    if os.getpid() in listed:
        return listed[os.getpid()], "process_gib is what the driver counts for this process"
    if len(listed) == 1:
        # a container gives processes numbers of its own
        return next(iter(listed.values())), "process_gib is that of the device's only process"
    if listed:
        return None, "no process_gib: the driver lists several processes and none under this one's number"
    # The backbone is on the device before this file is asked: what was in use before its context is not known here.
    free, total = torch.cuda.mem_get_info()
    used_gib = (total - free) / GIB
    return used_gib, "the driver lists no process: process_gib is all that is in use on the device"


def _listed_gib() -> dict[int, float]:
    """GiB of each process on this device that the driver names and counts; empty where it tells nothing."""
    found = device.driver()
    if found is None:
        return {}
    nvml, gpu = found
    try:
        processes = nvml.nvmlDeviceGetComputeRunningProcesses(gpu)
    except nvml.NVMLError:
        return {}
    return {one.pid: one.usedGpuMemory / GIB for one in processes if one.usedGpuMemory is not None}


def does_not_fit(name: str, model: nn.Module, where: str, error: BaseException) -> MemoryError:
    """One line in place of the allocator's paragraph."""
    backbone_gib = sum(p.nbytes for p in model.parameters()) / GIB
    on_gpu = where == "cuda"
    place = f"a device of {torch.cuda.mem_get_info()[1] / GIB:.1f} GiB" if on_gpu else "this machine"
    clear = MemoryError(f"{name} does not fit {place} (the backbone alone holds {backbone_gib:.1f} GiB)")
    return clear.with_traceback(error.__traceback__)
