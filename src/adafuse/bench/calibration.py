"""What this machine can do, measured before anything is judged by it: bandwidths, and the cost of a launch.

In: `cpu` or `cuda`. Out: a dict of numbers, each a median of several, with its unit in its name. Floors use these and
never a data sheet. Bandwidths count 1e9 bytes. Next: kernels/stream.py.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from statistics import median

import torch
from torch import Tensor

from adafuse.bench import device
from adafuse.kernels.config import STREAM_BLOCKS

REPEATS = 5
# an idle GPU takes this long to raise its clocks
WARMUP_MS = 500.0
LAUNCHES = 1000
NODES = 1000
# Fewer than the driver's queue takes: the host must not wait for the GPU while it is timed.
REPLAYS = 200
# A sign that flips: written values differ from those read, and their size never changes.
FACTOR = -1.0
# passes over the buffer's bytes in each kind of stream
# large enough for the full rate; below a second on a CPU
MATRIX_SIDE = {"cpu": 512, "cuda": 8192}
PASSES = {"read": 1, "copy": 2, "rmw": 2}

Work = Callable[[], object]


def calibrate(where: str) -> dict[str, float]:
    """Measure this machine; the buffers are given back before it returns.

    - `read_gbps`: bytes read, by a pass that only reads.
    - `copy_gbps`: bytes read plus bytes written, from one buffer to another.
    - `rmw_gbps`: bytes read plus bytes written, of one buffer in place (read, modify, write).
    - `launch_us`: one tiny operation of torch among many: the host's launch, or the device where that is slower.
    - `threads`: of torch on the CPU.

    On a GPU also those of `graph_costs`. There the bandwidths are of kernels of our own, in the fastest of several
    cuts: torch's copy belongs to the copy engines (kernels/stream.py).
    """
    found = _bandwidths(where)
    tiny = torch.ones(1, device=where)
    # milliseconds of a thousand launches are microseconds of one
    found["launch_us"] = _median_ms(where, lambda: [tiny.add_(1.0) for _ in range(LAUNCHES)]) * 1e3 / LAUNCHES
    found["threads"] = float(torch.get_num_threads())
    if where == "cuda":
        found |= graph_costs()
        # the allocator would keep 8 GiB that the timed arms, or a neighbour, may need
        torch.cuda.empty_cache()
    return found


def matrix_tflops(where: str, dtype: torch.dtype) -> float:
    """1e12 FLOP a second of a large square product in `dtype`, by the library: what training is held against.

    On a GPU as in training, when it has been at it for a while: the power cap gives short bursts a higher clock.
    """
    side = MATRIX_SIDE[where]
    a, b = (torch.randn(side, side, device=where).to(dtype) for _ in range(2))
    if where == "cuda":
        _be_busy(lambda: torch.mm(a, b))
    return 2 * side**3 / _median_ms(where, lambda: [torch.mm(a, b) for _ in range(REPEATS)]) * REPEATS / 1e9


def graph_costs() -> dict[str, float]:
    """What a captured CUDA graph costs by itself. Nodes come from one stream: each waits for the one before.

    - `empty_node_us`: a node whose kernel has one program that does nothing.
    - `tiny_node_us`: a node that reads and writes one element, which the node before has written.
    - `graph_launch_us`: the host's time for a replay of a graph with one empty node.
    """
    from adafuse.kernels import stream

    value = torch.zeros(1, device="cuda")
    return {
        "empty_node_us": _node_us(partial(stream.empty, value)),
        "tiny_node_us": _node_us(partial(stream.tiny_, value)),
        "graph_launch_us": _host_us(device.captured(partial(stream.empty, value))),
    }


def _bandwidths(where: str) -> dict[str, float]:
    count = device.BUFFER_MIB[where] * 2**20 // 4
    source, target = (torch.ones(count, device=where) for _ in range(2))
    streams = _streams(where, source, target)
    size_gb = count * 4 / 1e9
    best_ms = {name: min(_median_ms(where, work) for work in cuts) for name, cuts in streams.items()}
    return {f"{name}_gbps": PASSES[name] * size_gb / ms * 1e3 for name, ms in best_ms.items()}


def _streams(where: str, source: Tensor, target: Tensor) -> dict[str, list[Work]]:
    """Ways to read `source`, to copy it, to rewrite it; a GPU is busy for a while first, on numbers of all kinds."""
    if where != "cuda":
        return {
            "read": [source.sum],
            "copy": [lambda: target.copy_(source)],
            "rmw": [lambda: source.mul_(FACTOR)],
        }
    from adafuse.kernels import stream

    source.normal_()
    _be_busy(lambda: stream.copy_(target, source, STREAM_BLOCKS[0]))
    return {
        "read": [partial(stream.read, source, block) for block in STREAM_BLOCKS],
        "copy": [partial(stream.copy_, target, source, block) for block in STREAM_BLOCKS],
        "rmw": [partial(stream.scale_, source, FACTOR, block) for block in STREAM_BLOCKS],
    }


def _be_busy(work: Work) -> None:
    begin = time.perf_counter()
    while (time.perf_counter() - begin) * 1e3 < WARMUP_MS:
        device.timed_ms("cuda", work)


def _median_ms(where: str, work: Work) -> float:
    work()
    return median(device.timed_ms(where, work) for _ in range(REPEATS))


def _node_us(launch: Work) -> float:
    """Microseconds of a node: a long graph's time over its nodes, so that the graph's own launch is spread thin."""
    replay = device.captured(lambda: [launch() for _ in range(NODES)])
    replay()
    return median(device.queued_ms(replay, REPEATS)) * 1e3 / NODES


def _host_us(replay: Callable[[], None]) -> float:
    """Microseconds that the host spends on one replay, the GPU following at its own pace."""
    samples = []
    replay()
    for _ in range(REPEATS):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for _ in range(REPLAYS):
            replay()
        samples.append((time.perf_counter() - begin) * 1e6 / REPLAYS)
    torch.cuda.synchronize()
    return median(samples)
