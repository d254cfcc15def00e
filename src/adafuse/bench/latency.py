"""One latency cell: all arms on one backbone in one process, checked first, then timed in interleaved rounds.

In: a `Config`, the backbone, a record to write to. Out: calibration, check, cost, memory and block lines. An arm that
fails a check is recorded and not timed. Next: report/.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict

import torch
from torch import Tensor, nn

from adafuse import identity
from adafuse.adapters import store
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.adapters.reference import float_copy
from adafuse.bench import cost, device
from adafuse.bench.checks import PADDING, run_checks
from adafuse.bench.rounds import Block, run_rounds
from adafuse.config import Arm, Config
from adafuse.engine import decoders
from adafuse.engine.decoders import Decoder
from adafuse.engine.strategies.joined import make_room
from adafuse.records import Recorder


def run(config: Config, model: nn.Module, where: str, record: Recorder) -> None:
    """Measure the cell and write its lines to `record`; `where` is the device."""
    bandwidth = device.calibrate(where)
    record.write("calibration", **bandwidth)
    prompt = prompts(config, model, where)
    adapters = _adapters(config, model)
    arms: dict[str, DecodeArm] = {}
    length = (
        config.context
        + PADDING
        + config.latency.settle_tokens
        + max(config.latency.block_tokens, config.latency.check_tokens)
    )
    for own in adapters.values():
        make_room(own)
    float_model = float_copy(model)
    for name in config.arms.run:
        arm = config.arms.table[name]
        adapter = adapters.get(arm.method)
        try:
            decoder = decoders.make(model, adapter, arm.strategy, arm.runtime, length)
            if _check(name, decoder, float_model, prompt, config, record):
                _account(name, arm, model, adapter, prompt, bandwidth["read_gbps"], record)
                arms[name] = DecodeArm(decoder, prompt, config)
        except Exception as error:  # an arm's failure is a record; the other arms go on
            record.fail(f"arm {name}", error)
    # checks are done; 27 GB that the timed passes need not share the device with
    del float_model
    run_rounds(
        arms,
        rounds=config.latency.rounds,
        tokens=config.latency.block_tokens * config.batch,
        seed=config.seed + 1000 * config.replicate,
        device=where,
        on_block=lambda block: _write_block(record, block),
        on_error=lambda name, error: record.fail(f"arm {name}", error),
    )


class DecodeArm:
    """A timed arm: greedy decode of one block from the end of the prompt."""

    def __init__(self, decoder: Decoder, prompt: Tensor, config: Config) -> None:
        self.decoder, self.prompt = decoder, prompt
        self.tokens, self.settle = config.latency.block_tokens, config.latency.settle_tokens
        self._stack, self._started = ExitStack(), False

    def enter(self) -> None:
        """Install, go to the end of the prompt, and decode a few untimed tokens: caches and allocator settle."""
        self._stack = ExitStack()
        self._stack.enter_context(self.decoder.installed())
        (self.decoder.again if self._started else self.decoder.start)(self.prompt)
        self._started = True
        self._stack.enter_context(self.decoder.decoding())
        self.decoder.run(self.settle)

    def block(self) -> None:
        self.decoder.run(self.tokens)

    def leave(self) -> None:
        self._stack.close()


def prompts(config: Config, model: nn.Module, where: str) -> Tensor:
    """Seeded ids [batch, context], a different row for each sequence; the first four ids are often special."""
    generator = torch.Generator().manual_seed(config.seed)
    vocabulary = model.config.vocab_size
    return torch.randint(4, vocabulary, (config.batch, config.context), generator=generator).to(where)


def _adapters(config: Config, model: nn.Module) -> dict[str, Adapter]:
    """One adapter per method in use, trained or with seeded random factors; `base` has none."""
    dtype = next(model.parameters()).dtype
    adapters = {}
    for name in dict.fromkeys(config.arms.table[arm].method for arm in config.arms.run):
        method = config.methods[name]
        if not method.has_experts:
            continue
        adapter = Adapter(model, method, config.experts, config.seed)
        if config.latency.trained_adapters:
            store.load(adapter, identity.adapter_dir(config, method))
        else:
            randomise(adapter, config.seed)
        adapters[name] = adapter.to_dtype(dtype)
    return adapters


def _check(
    name: str,
    decoder: Decoder,
    float_model: nn.Module,
    prompt: Tensor,
    config: Config,
    record: Recorder,
) -> bool:
    results = run_checks(decoder, float_model, prompt, config.latency.check_tokens)
    for result in results:
        record.write("check", arm=name, **asdict(result))
    return all(result.passed for result in results)


def _account(
    name: str,
    arm: Arm,
    model: nn.Module,
    adapter: Adapter | None,
    prompt: Tensor,
    read_gbps: float,
    record: Recorder,
) -> None:
    record.write("cost", arm=name, **cost.cost(model, adapter, arm.strategy, prompt, read_gbps))
    record.write(
        "memory",
        arm=name,
        weights_gib=cost.weights_gib(model, adapter, arm.strategy),
        peak_gib=None,
        note="weights counted; a peak needs a CUDA device and one arm per process",
    )
    if adapter is not None and adapter.routers():
        record.write("routing", arm=name, **cost.routing_changes(adapter, model, prompt[:1], 32))


def _write_block(record: Recorder, block: Block) -> None:
    record.write("block", **asdict(block))
