"""One adapted linear by itself: what its frozen product takes, and what its router and experts take beside it.

In: a `Config` (shape of the backbone, a layer-wise method, ranks, sequence lengths). Out: `layer` lines, the data of
the paper's Figures 1 and 2. Backbone, adapters and both are timed in turn, each measured, none subtracted.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random

import torch
from torch import nn
from tqdm import tqdm

from adafuse import strategies
from adafuse.adapters.experts import LoraExperts
from adafuse.adapters.router import Router
from adafuse.bench import calibration, device
from adafuse.config import Config, StrategyName
from adafuse.records import Recorder
from adafuse.shape import shape_of

BLOCK_RUNS = 10


@torch.no_grad()
def run(config: Config, where: str, record: Recorder) -> None:
    """Time the up projection of one block for every rank and sequence length."""
    record.write("calibration", **calibration.calibrate(where))
    cases = [(length, rank) for length in config.layer.sequence_lengths for rank in config.layer.ranks]
    for length, rank in tqdm(cases, desc="layer cases", unit="case"):
        _time_case(config, where, length, rank, record)


def _time_case(config: Config, where: str, length: int, rank: int, record: Recorder) -> None:
    parts = _parts(config, where, length, rank)
    for work in parts.values():
        for _ in range(config.layer.warmup):
            work()
    order, rng = list(parts), Random(config.seed + config.replicate)
    for block in range(max(1, config.layer.runs // BLOCK_RUNS)):
        rng.shuffle(order)
        for part in order:
            block_ms = device.timed_ms(where, _repeated(parts[part]))
            record.write(
                "layer",
                sequence_length=length,
                rank=rank,
                phase="decode" if length == 1 else "prefill",
                part=part,
                block=block,
                ms=block_ms / BLOCK_RUNS,
            )


def _repeated(work: Callable[[], object]) -> Callable[[], object]:
    return lambda: [work() for _ in range(BLOCK_RUNS)]


def _parts(config: Config, where: str, length: int, rank: int) -> dict[str, Callable[[], object]]:
    """Backbone, adapters (router and loop over experts, as published) and both, on the same input."""
    torch.manual_seed(config.seed)
    shape, dtype = shape_of(config.model), getattr(torch, config.model.dtype.name)
    width, inner = int(shape["hidden_size"]), int(shape["intermediate_size"])
    base = nn.Linear(width, inner, bias=False).to(where, dtype)
    experts = LoraExperts(width, inner, config.experts.count, rank, 2.0 * rank).to(where, dtype)
    experts.lora_B.normal_(std=0.02)
    router = Router(width, config.experts.count, config.experts.top_k, config.method.normalisation).to(where)
    x_TI = torch.randn(length, width, device=where, dtype=dtype)
    loop = strategies.make(StrategyName.loop)
    return {
        "backbone": lambda: base(x_TI),
        "adapters": lambda: loop.mix(experts, x_TI, router(x_TI)),
        "both": lambda: base(x_TI) + loop.mix(experts, x_TI, router(x_TI)),
    }
