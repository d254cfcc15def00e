"""One latency cell: all arms on one backbone in one process, checked first, then timed in interleaved rounds.

In: a `Config`, the backbone, a record to write to. Out: calibration, check, cost, memory and block lines. An arm that
fails a check is recorded and not timed. Next: report/.
"""

from __future__ import annotations

from dataclasses import asdict

from torch import Tensor, nn

from adafuse.adapters.reference import float_view
from adafuse.bench import calibration, cost, routing
from adafuse.bench.checks import PADDING, Checked, run_checks
from adafuse.bench.rounds import Block, TimedArm, run_rounds
from adafuse.bench.timed_arms import DecodeArm, QueryArm
from adafuse.bench.workload import adapters, prompts
from adafuse.config import Config
from adafuse.engine.decoders import Decoder
from adafuse.engine.make import make
from adafuse.records import Recorder
from adafuse.strategies.joined import make_room


def run(config: Config, model: nn.Module, where: str, record: Recorder) -> None:
    """Measure the cell and write its lines to `record`; `where` is the device."""
    bandwidth = calibration.calibrate(where)
    record.write("calibration", **bandwidth)
    prompt = prompts(config, model, where)
    own_adapters = adapters(config, model)
    arms: dict[str, TimedArm] = {}
    # by method: arms of one adapter choose alike
    seen: dict[str, dict[str, float]] = {}
    length = (
        config.context
        + PADDING
        + config.latency.settle_tokens
        + max(config.latency.block_tokens, config.latency.check_tokens)
    )
    for own in own_adapters.values():
        make_room(own)
    float_model = float_view(model)
    for name in config.arms.run:
        arm = config.arms.table[name]
        adapter = own_adapters.get(arm.method)
        try:
            decoder = make(model, adapter, arm.strategy, arm.runtime, length)
            checked = _check(name, decoder, float_model, prompt, config, record)
            if checked.passed:
                if adapter is not None and adapter.routers() and arm.method not in seen:
                    seen[arm.method] = routing.shares(adapter, checked.choices)
                _account(record, name, decoder, prompt, bandwidth["read_gbps"], seen.get(arm.method))
                arms[name] = _timed(decoder, config, model, where)
        except Exception as error:  # an arm's failure is a record; the other arms go on
            record.fail(f"arm {name}", error)
    run_rounds(
        arms,
        rounds=config.latency.rounds,
        tokens=config.latency.block_tokens * config.batch,
        seed=config.seed + 1000 * config.replicate,
        device=where,
        on_block=lambda block: _write_block(record, block),
        on_error=lambda name, error: record.fail(f"arm {name}", error),
        on_flag=lambda flag: record.write("flag", **asdict(flag)),
    )


def _timed(decoder: Decoder, config: Config, model: nn.Module, where: str) -> TimedArm:
    if config.latency.queries:
        return QueryArm(decoder, lambda query: prompts(config, model, where, query), config)
    return DecodeArm(decoder, prompts(config, model, where), config)


def _check(
    name: str,
    decoder: Decoder,
    float_model: nn.Module,
    prompt: Tensor,
    config: Config,
    record: Recorder,
) -> Checked:
    checked = run_checks(decoder, float_model, prompt, config.latency.check_tokens)
    for check in checked.checks:
        record.write("check", arm=name, **asdict(check))
    return checked


def _account(
    record: Recorder,
    name: str,
    decoder: Decoder,
    prompt: Tensor,
    read_gbps: float,
    seen: dict[str, float] | None,
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


def _write_block(record: Recorder, block: Block) -> None:
    record.write("block", **asdict(block))
