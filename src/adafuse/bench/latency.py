"""One latency cell: all arms on one backbone in one process, checked first, then timed in interleaved rounds.

In: a `Config`, the backbone, a record to write to. Out: calibration, check, cost, memory and block lines. An arm that
fails a check is recorded and not timed. Next: report/.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from adafuse import identity
from adafuse.adapters import store
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.bench import cost, device
from adafuse.bench.checks import run_checks
from adafuse.bench.rounds import Block, run_rounds
from adafuse.config import Arm, Config
from adafuse.engine.decode import decode_n_tokens, decoding, prefill
from adafuse.records import Recorder


def run(config: Config, model: nn.Module, where: str, record: Recorder) -> None:
    """Measure the cell and write its lines to `record`; `where` is the device."""
    bandwidth = device.calibrate(where)
    record.write("calibration", **bandwidth)
    prompt = prompts(config, model, where)
    adapters = _adapters(config, model)
    arms: dict[str, DecodeArm] = {}
    for name in config.arms.run:
        arm = config.arms.table[name]
        adapter = adapters.get(arm.method)
        try:
            if _check(name, arm, model, adapter, prompt, config, record):
                _account(name, arm, model, adapter, prompt, bandwidth["read_gbps"], record)
                arms[name] = DecodeArm(model, adapter, arm, prompt, config)
        except Exception as error:  # an arm's failure is a record; the other arms go on
            record.fail(f"arm {name}", error)
            if adapter is not None and adapter.installed:
                adapter.remove()
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
    """A timed arm: greedy decode of one block from a fresh prefill."""

    def __init__(
        self, model: nn.Module, adapter: Adapter | None, arm: Arm, prompt: Tensor, config: Config
    ) -> None:
        self.model, self.adapter, self.arm, self.prompt = model, adapter, arm, prompt
        self.tokens, self.settle = config.latency.block_tokens, config.latency.settle_tokens
        self._stack = ExitStack()

    def enter(self) -> None:
        """Install, prefill, and decode a few untimed tokens, so that caches and allocator have settled."""
        self._stack = ExitStack()
        if self.adapter is not None:
            self.adapter.install(self.arm.strategy)
            self._stack.callback(self.adapter.remove)
        self._cache = DynamicCache()
        token = prefill(self.model, self.prompt, None, self._cache).argmax(-1, keepdim=True)
        self._stack.enter_context(decoding(self.adapter))
        self._token = decode_n_tokens(self.model, token, self.settle, self._cache)[:, -1:]

    def block(self) -> None:
        decode_n_tokens(self.model, self._token, self.tokens, self._cache)

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
    arm: Arm,
    model: nn.Module,
    adapter: Adapter | None,
    prompt: Tensor,
    config: Config,
    record: Recorder,
) -> bool:
    results = run_checks(model, adapter, arm.strategy, prompt, config.latency.check_tokens)
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
