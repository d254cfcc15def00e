"""One latency cell: all arms on one backbone in one process, checked first, then timed in interleaved rounds.

In: a `Config`, the backbone, a record to write to. Out: calibration, check, cost, memory and block lines. An arm that
fails a check is recorded and not timed; a cell of which nothing counts is an error. One block of an arm is tokens after
a prompt that is already there, or a whole query as the paper times it. Next: report/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from itertools import chain, repeat

from torch import Tensor, nn

from adafuse.adapters.reference import float_view
from adafuse.bench import calibration, cost, routing
from adafuse.bench.checks import PADDING, run_checks
from adafuse.bench.left_out import say_dropped, say_set_aside
from adafuse.bench.rounds import TimedArm, run_rounds
from adafuse.bench.workload import adapters, prompter
from adafuse.config import Config, Latency
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
    ask = prompter(config, model, where)
    prompt = ask(0)
    own_adapters = adapters(config, model)
    arms: dict[str, TimedArm] = {}
    # by method: arms of one adapter choose alike
    seen: dict[str, Shares] = {}
    knobs = config.latency
    length = config.context + PADDING + knobs.settle_tokens + max(knobs.block_tokens, knobs.check_tokens)
    for own in own_adapters.values():
        make_room(own)
    float_model = float_view(model)
    for name, arm in config.arms.chosen.items():
        adapter = own_adapters.get(arm.method)
        try:
            decoder = make(model, adapter, arm.strategy, arm.runtime, length)
            checked = run_checks(decoder, float_model, prompt, knobs.check_tokens)
            for check in checked.checks:
                record.write("check", arm=name, **asdict(check))
            say_dropped(name, checked.checks)
            if checked.passed:
                if adapter is not None and adapter.routers() and arm.method not in seen:
                    seen[arm.method] = routing.shares(adapter, checked.choices)
                    if adapter.context.gate_table is None:
                        stood = routing.selections(adapter, checked.choices)
                        record.write("selections", method=arm.method, **stood)
                _account(record, name, decoder, prompt, bandwidth["read_gbps"], seen.get(arm.method))
                arms[name] = (
                    query_arm(decoder, ask, knobs) if knobs.queries else decode_arm(decoder, prompt, knobs)
                )
        except Exception as error:  # an arm's failure is a record; the other arms go on
            record.fail(f"arm {name}", error)
    seed = config.seed + 1000 * config.replicate
    blocks, flags = run_rounds(arms, knobs.rounds, knobs.block_tokens * config.batch, seed, where, record)
    if not say_set_aside(blocks, flags):
        why = (
            "every block is set aside: run it again when the machine is idle"
            if blocks
            else "every arm is dropped"
        )
        record.fail("latency", ValueError(f"nothing of this cell counts: {why}"))


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


def decode_arm(decoder: Decoder, prompt: Tensor, knobs: Latency) -> TimedArm:
    """Greedy decode of one block from the end of the prompt."""
    starts = chain([decoder.start], repeat(decoder.again))

    @contextmanager
    def entered(number: int) -> Iterator[Callable[[], object]]:
        """Install, go to the end of the prompt, and decode a few untimed tokens: caches and allocator settle."""
        with decoder.installed():
            next(starts)(prompt)
            with decoder.decoding():
                restart_gates(decoder)
                decoder.run(knobs.settle_tokens)
                # the block's rows are the first ones, whatever settled: routing.py tells of those
                restart_gates(decoder)
                yield lambda: decoder.run(knobs.block_tokens)

    return entered


def query_arm(decoder: Decoder, prompts: Callable[[int], Tensor], knobs: Latency) -> TimedArm:
    """One query after the other, each with a prompt of its own: its prefill and all its new tokens are timed, and
    whatever the arm has to put right before the next query.
    """

    def answer(ids_BS: Tensor, tokens: int) -> None:
        """The first new token is prefill's."""
        decoder.start(ids_BS)
        with decoder.decoding():
            restart_gates(decoder)
            decoder.run(tokens - 1)

    @contextmanager
    def entered(number: int) -> Iterator[Callable[[], object]]:
        """Install, settle on a few untimed tokens of the query before, and fetch that of this round."""
        with decoder.installed():
            answer(prompts(number), knobs.settle_tokens)
            ids_BS = prompts(number + 1)
            yield lambda: answer(ids_BS, knobs.block_tokens)

    return entered


def restart_gates(decoder: Decoder) -> None:
    """Every block begins at the first row of its table of gates, where it has one."""
    if decoder.adapter is not None and decoder.adapter.context.gate_table is not None:
        decoder.adapter.context.gate_table.restart()
