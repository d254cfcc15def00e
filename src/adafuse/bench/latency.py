"""One latency cell: all arms on one backbone in one process, checked first, then timed in interleaved rounds.

In: a `Config`, the backbone, a record to write to. Out: calibration, check, cost, memory and block lines. An arm that
fails a check is recorded and not timed. One block of an arm is tokens after a prompt that is already there, or a whole
query as the paper times it. Next: report/.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict

from torch import Tensor, nn

from adafuse.adapters.reference import float_view
from adafuse.bench import calibration, cost, routing
from adafuse.bench.checks import PADDING, run_checks
from adafuse.bench.rounds import TimedArm, run_rounds
from adafuse.bench.workload import adapters, prompts
from adafuse.config import Config
from adafuse.engine.decoders import Decoder
from adafuse.engine.make import make
from adafuse.records import Recorder
from adafuse.strategies.joined import make_room

# what routing.py saw of the experts in use, by its name
Shares = dict[str, float]


def run(config: Config, model: nn.Module, where: str, record: Recorder) -> None:
    """Measure the cell and write its lines to `record`; `where` is the device."""
    bandwidth = calibration.calibrate(where)
    record.write("calibration", **bandwidth)
    prompt = prompts(config, model, where)
    own_adapters = adapters(config, model)
    arms: dict[str, TimedArm] = {}
    # by method: arms of one adapter choose alike
    seen: dict[str, Shares] = {}
    knobs = config.latency
    length = config.context + PADDING + knobs.settle_tokens + max(knobs.block_tokens, knobs.check_tokens)
    for own in own_adapters.values():
        make_room(own)
    float_model = float_view(model)
    for name in config.arms.run:
        arm = config.arms.table[name]
        adapter = own_adapters.get(arm.method)
        try:
            decoder = make(model, adapter, arm.strategy, arm.runtime, length)
            checked = run_checks(decoder, float_model, prompt, knobs.check_tokens)
            for check in checked.checks:
                record.write("check", arm=name, **asdict(check))
            if checked.passed:
                if adapter is not None and adapter.routers() and arm.method not in seen:
                    seen[arm.method] = routing.shares(adapter, checked.choices)
                _account(record, name, decoder, prompt, bandwidth["read_gbps"], seen.get(arm.method))
                arms[name] = _timed(decoder, config, model, where)
        except Exception as error:  # an arm's failure is a record; the other arms go on
            record.fail(f"arm {name}", error)
    run_rounds(
        arms,
        rounds=knobs.rounds,
        tokens=knobs.block_tokens * config.batch,
        seed=config.seed + 1000 * config.replicate,
        where=where,
        on_block=lambda block: record.write("block", **asdict(block)),
        on_error=lambda name, error: record.fail(f"arm {name}", error),
        on_flag=lambda flag: record.write("flag", **asdict(flag)),
    )


def _timed(decoder: Decoder, config: Config, model: nn.Module, where: str) -> TimedArm:
    if config.latency.queries:
        return QueryArm(decoder, lambda query: prompts(config, model, where, query), config)
    return DecodeArm(decoder, prompts(config, model, where), config)


def _account(
    record: Recorder, name: str, decoder: Decoder, prompt: Tensor, read_gbps: float, seen: Shares | None
) -> None:
    """What the arm costs on paper, given what was seen of its routing."""
    if seen is not None:
        record.write("routing", arm=name, **seen)
    model, adapter, strategy = decoder.model, decoder.adapter, decoder.strategy
    record.write("cost", arm=name, **cost.cost(model, adapter, strategy, prompt, read_gbps, seen))
    record.write(
        "memory",
        arm=name,
        weights_gib=cost.weights_gib(model, adapter, strategy),
        peak_gib=None,
        note="weights counted; peaks are measured one arm a process: experiment=table5",
    )


class DecodeArm:
    """Greedy decode of one block from the end of the prompt."""

    def __init__(self, decoder: Decoder, prompt: Tensor, config: Config) -> None:
        self.decoder, self.prompt = decoder, prompt
        self.tokens, self.settle = config.latency.block_tokens, config.latency.settle_tokens
        self._stack, self._started = ExitStack(), False

    def enter(self, number: int) -> None:
        """Install, go to the end of the prompt, and decode a few untimed tokens: caches and allocator settle."""
        self._stack = ExitStack()
        self._stack.enter_context(self.decoder.installed())
        (self.decoder.again if self._started else self.decoder.start)(self.prompt)
        self._started = True
        self._stack.enter_context(self.decoder.decoding())
        restart_gates(self.decoder)
        self.decoder.run(self.settle)
        # the block's rows are the first ones, whatever settled: routing.py tells of those
        restart_gates(self.decoder)

    def block(self) -> None:
        self.decoder.run(self.tokens)

    def leave(self) -> None:
        self._stack.close()


class QueryArm:
    """One query after the other, each with a prompt of its own: its prefill and all its new tokens are timed, and
    whatever the arm has to put right before the next query.
    """

    def __init__(self, decoder: Decoder, prompts: Callable[[int], Tensor], config: Config) -> None:
        self.decoder, self.prompts = decoder, prompts
        self.tokens, self.settle = config.latency.block_tokens, config.latency.settle_tokens
        self._stack, self._ids = ExitStack(), prompts(0)

    def enter(self, number: int) -> None:
        """Install, settle on a few untimed tokens of the query before, and fetch that of this round."""
        self._stack, self._ids = ExitStack(), self.prompts(number)
        self._stack.enter_context(self.decoder.installed())
        self._answer(self.settle)
        self._ids = self.prompts(number + 1)

    def block(self) -> None:
        self._answer(self.tokens)

    def _answer(self, tokens: int) -> None:
        """The first new token is prefill's."""
        self.decoder.start(self._ids)
        with self.decoder.decoding():
            restart_gates(self.decoder)
            self.decoder.run(tokens - 1)

    def leave(self) -> None:
        self._stack.close()


def restart_gates(decoder: Decoder) -> None:
    """Every block begins at the first row of its table of gates, where it has one."""
    if decoder.adapter is not None and decoder.adapter.context.gate_table is not None:
        decoder.adapter.context.gate_table.restart()
