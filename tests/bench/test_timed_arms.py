"""A block begins where it says, decodes as many tokens as it says, and leaves the model plain."""

import pytest
import torch

from adafuse import strategies
from adafuse.adapters import gate_table
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.bench import routing
from adafuse.bench.latency import decode_arm, query_arm
from adafuse.config import Config, GateSource, Runtime, StrategyName
from adafuse.engine.decode import generate
from adafuse.engine.decoders import Decoder
from adafuse.engine.make import make
from synthetic.configurations import GEOMETRY, compose

LATENCY = ["latency.block_tokens=64", "latency.settle_tokens=3"]


def prompts(query: int) -> torch.Tensor:
    return torch.randint(4, 260, (1, 10), generator=torch.Generator().manual_seed(query))


def made(config: Config, model, strategy: StrategyName, runtime: Runtime) -> Decoder:
    adapter = Adapter(model, config.method, config.experts, seed=0)
    randomise(adapter, seed=1, scale=0.3)
    return make(model, adapter, strategy, runtime, 10 + 64 + 8)


@pytest.mark.parametrize("runtime", [Runtime.eager, Runtime.graph], ids=lambda r: r.name)
@pytest.mark.parametrize("strategy", [StrategyName.dense, StrategyName.switch], ids=lambda s: s.name)
def test_every_query_is_another_and_is_answered_whole(strategy, runtime, tiny_llama, monkeypatch) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse", *LATENCY)
    decoder = made(config, model, strategy, runtime)
    clean = [p.clone() for p in model.parameters()]
    counts, run = [], decoder.run
    asked, start = [], decoder.start
    monkeypatch.setattr(decoder, "run", lambda count: counts.append(count) or run(count), raising=False)
    monkeypatch.setattr(decoder, "start", lambda ids: asked.append(ids) or start(ids), raising=False)
    arm = query_arm(decoder, prompts, config.latency)
    for number in (0, 1, 2):
        with arm(number) as block:
            block()
        assert torch.equal(asked[-1], prompts(number + 1)), "all arms answer the same query in a round"
    # the first of 64 new tokens is prefill's
    assert counts == [2, 63] * 3
    assert all(torch.equal(a, b) for a, b in zip(clean, model.parameters(), strict=True))


def test_a_block_of_tokens_goes_on_from_the_same_prompt(tiny_llama) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse", *LATENCY)
    decoder = made(config, model, StrategyName.gather, Runtime.graph)
    arm, seen = decode_arm(decoder, prompts(0), config.latency), []
    for number in range(2):
        with arm(number):
            seen.append(decoder.run(16))
    assert torch.equal(*seen)
    decoder.adapter.install(strategies.make(StrategyName.dense))
    whole = generate(model, decoder.adapter, prompts(0), None, 20)[:, 10:]
    decoder.adapter.remove()
    assert torch.equal(whole[:, 4:], seen[0]), "prefill's token and three that settle, then the block"


@pytest.mark.parametrize("runtime", [Runtime.eager, Runtime.graph], ids=lambda r: r.name)
def test_a_block_uses_the_rows_that_are_told_of_its_table(runtime: Runtime, tiny_llama) -> None:
    """bench/routing.py reads the first rows, whatever the arms before and the tokens that settle have taken."""
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse", *LATENCY)
    decoder = made(config, model, StrategyName.gather, runtime)
    table = gate_table.make(GateSource.uniform, config.experts, 1, 0, "cpu")
    decoder.adapter.context.gate_table = table
    told_BNK, arm = routing._of_table(table), decode_arm(decoder, prompts(0), config.latency)
    for number in range(2):
        used, replace = [], table.replace
        with arm(number) as block, pytest.MonkeyPatch.context() as patch:
            patch.setattr(table, "replace", lambda *a: (used.append(replace(*a)), used[-1])[1])  # noqa: B023
            block()
        assert torch.equal(torch.stack([gates.index_TK for gates in used], dim=1), told_BNK)
