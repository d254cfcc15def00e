"""One latency cell: all arms on one backbone in one process, checked first, then timed in interleaved rounds.

In: a `Config`, the backbone, a record to write to. Out: calibration, check, cost, memory and block lines. An arm that
fails a check is recorded and not timed; a cell of which nothing counts is an error. One block of an arm is tokens after
a prompt that is already there, or a whole query as the paper times it. Next: report/.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import chain, repeat

from torch import Tensor, nn

from adafuse.adapters.adapter import Adapter
from adafuse.adapters.reference import float_view
from adafuse.bench import calibration, cost, routing
from adafuse.bench.checks import PADDING, run_checks
from adafuse.bench.left_out import say_dropped, say_set_aside
from adafuse.bench.rounds import TimedArm, run_rounds
from adafuse.bench.workload import adapters, prompter
from adafuse.config import Config, Latency, Runtime, StrategyName
from adafuse.engine.decoders import Decoder
from adafuse.engine.make import make
from adafuse.records import Recorder
from adafuse.strategies.joined import make_room

# of a cell of which nothing counts, by whether every arm was dropped
NOTHING = {
    True: "every arm is dropped",
    False: "every block is set aside: run it again when the machine is idle",
}
# what routing.py saw of the experts in use, by its name
Shares = dict[str, float]


@dataclass(frozen=True)
class Made:
    """An arm whose adapter is there; None is the plain backbone."""

    adapter: Adapter | None
    strategy: StrategyName
    runtime: Runtime


def run(config: Config, model: nn.Module, where: str, record: Recorder) -> None:
    """Measure the cell and write its lines to `record`; `where` is the device."""
    bandwidth = calibration.calibrate(where)
    record.write("calibration", **bandwidth)
    own = adapters(config, model)
    arms = {
        name: Made(own.get(arm.method), arm.strategy, arm.runtime) for name, arm in config.arms.chosen.items()
    }
    seed = config.seed + 1000 * config.replicate
    counted = time_arms(
        model, arms, prompter(config, model, where), config.latency, seed, bandwidth["read_gbps"], record
    )
    if not counted:
        record.fail("latency", ValueError(f"nothing of this cell counts: {NOTHING[counted is None]}"))


def time_arms(
    model: nn.Module,
    arms: Mapping[str, Made],
    ask: Callable[[int], Tensor],
    knobs: Latency,
    seed: int,
    read_gbps: float,
    record: Recorder,
) -> int | None:
    """Check every arm, then time those that passed in interleaved rounds; `ask` gives the ids of a query [B, S].

    What is found is written to `record`. How many blocks count; None where every arm is dropped.
    """
    prompt, where = ask(0), model.device.type
    length = prompt.shape[1] + tokens_behind(knobs)
    ready: dict[str, TimedArm] = {}
    # by adapter: its arms choose alike
    seen: dict[str, Shares] = {}
    for adapter in {id(arm.adapter): arm.adapter for arm in arms.values()}.values():
        if adapter is not None:
            make_room(adapter)
    float_model = float_view(model)
    for name, arm in arms.items():
        adapter = arm.adapter
        try:
            decoder = make(model, adapter, arm.strategy, arm.runtime, length)
            checked = run_checks(decoder, float_model, prompt, knobs.check_tokens)
            for check in checked.checks:
                record.write("check", arm=name, **asdict(check))
            say_dropped(name, checked.checks)
            if checked.passed:
                method = "" if adapter is None else adapter.method.name
                if adapter is not None and adapter.routers() and method not in seen:
                    seen[method] = routing.shares(adapter, checked.choices)
                    if adapter.context.gate_table is None:
                        stood = routing.selections(adapter, checked.choices)
                        record.write("selections", method=method, **stood)
                _account(record, name, decoder, prompt, read_gbps, seen.get(method))
                ready[name] = (
                    query_arm(decoder, ask, knobs) if knobs.queries else decode_arm(decoder, prompt, knobs)
                )
        except Exception as error:  # an arm's failure is a record; the other arms go on
            record.fail(f"arm {name}", error)
    blocks, flags = run_rounds(ready, knobs.rounds, knobs.block_tokens * len(prompt), seed, where, record)
    counted = say_set_aside(blocks, flags)
    return counted if blocks else None


def tokens_behind(knobs: Latency) -> int:
    """How many tokens an arm may hold beside its prompt: padding, and the longest decode."""
    return PADDING + knobs.settle_tokens + max(knobs.block_tokens, knobs.check_tokens)


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
