"""A table of gates says which experts a decode step uses: under every strategy, in order, and again from the start."""

from itertools import pairwise

import pytest
import torch

from adafuse.adapters import gate_table, reference
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.bench.checks import run_checks
from adafuse.bench.timed_arms import restart_gates
from adafuse.config import Config, Experts, GateSource, Runtime, StrategyName
from adafuse.engine import decoders
from conftest import GEOMETRY, compose

GEOMETRY_8 = Experts(targets=["q_proj"], rank=4, count=8, top_k=2, alpha=8.0)
TABLES = [source for source in GateSource if source is not GateSource.router]


def table(source: GateSource, batch: int = 2, experts: Experts = GEOMETRY_8) -> gate_table.GateTable:
    made = gate_table.make(source, experts, batch, 0, "cpu")
    assert made is not None
    return made


def with_table(model, config: Config, source: GateSource, batch: int = 1) -> Adapter:
    adapter = Adapter(model, config.method, config.experts, seed=0)
    randomise(adapter, seed=1, scale=0.3)
    adapter.context.gate_table = table(source, batch, config.experts)
    return adapter


def test_the_router_needs_no_table() -> None:
    assert gate_table.make(GateSource.router, GEOMETRY_8, 2, 0, "cpu") is None


@pytest.mark.parametrize("source", TABLES, ids=lambda s: s.name)
def test_a_token_never_has_an_expert_twice(source: GateSource) -> None:
    index_NBK = table(source).index_NBK
    assert index_NBK.shape == (gate_table.STEPS, 2, 2) and index_NBK.min() >= 0 and index_NBK.max() < 8
    assert (index_NBK[..., 0] != index_NBK[..., 1]).all()


def test_each_source_is_what_its_name_says() -> None:
    count = {s: torch.bincount(table(s).index_NBK.flatten(), minlength=8) for s in TABLES}
    even = 2 * 2 * gate_table.STEPS / 8
    assert (count[GateSource.uniform] - even).abs().max() < 5 * even**0.5
    skewed = count[GateSource.zipf]
    assert (skewed[:3].diff() < 0).all() and skewed[0] > 2.5 * skewed[7]
    assert count[GateSource.same].count_nonzero() == 2
    rows = table(GateSource.distinct, batch=4).index_NBK
    for now, after in pairwise(rows):
        assert not (now[:, :, None] == after[:, None, :]).any(), "an expert of the token before"
        assert now.unique().numel() == 8, "four sequences of two experts reach all eight"


@pytest.mark.parametrize("strategy", [StrategyName.loop, StrategyName.gather, StrategyName.switch])
@pytest.mark.parametrize("runtime", [Runtime.eager, Runtime.graph], ids=lambda r: r.name)
def test_an_arm_follows_its_table_and_passes_its_checks(strategy, runtime, tiny_llama) -> None:
    if strategy is StrategyName.loop and runtime is Runtime.graph:
        return
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse")
    adapter = with_table(model, config, GateSource.uniform)
    own, prompt = adapter.context.gate_table, torch.randint(4, 260, (1, 9))
    decoder = decoders.make(model, adapter, strategy, runtime, 40)
    checks = run_checks(decoder, reference.float_view(model), prompt, 8)
    assert all(c.passed for c in checks), [c for c in checks if not c.passed]
    # what is decoded is not routed; what is read as a whole is, and is held to it
    assert [c.check for c in checks if c.check.startswith("routing")] == ["routing_whole"]
    with decoder.installed(), decoder.watching():
        token = decoder.start(prompt).argmax(-1, keepdim=True)
        with decoder.decoding():
            for _ in range(2):
                restart_gates(decoder)
                for step in range(3):
                    decoder.step(token)
                    (choice,) = decoder.choices().values()
                    assert torch.equal(choice[:, -1], own.index_NBK[step])


def test_weights_are_the_routers_of_the_named_experts() -> None:
    from adafuse.adapters.router import Gates

    probs = torch.softmax(torch.arange(8.0), 0).expand(2, 8)
    said = Gates(torch.tensor([[7, 6], [7, 6]]), torch.ones(2, 2), probs)
    made, index = table(GateSource.distinct), torch.tensor([[0, 1], [2, 3]])
    gates = made.replace(said, raw=False)
    assert torch.equal(gates.index_TK, index)
    torch.testing.assert_close(gates.weight_TK, torch.softmax(index.float(), -1))
    raw = made.replace(said, raw=True)
    torch.testing.assert_close(raw.weight_TK, probs.gather(1, index + 2))


def test_a_decision_per_layer_is_refused() -> None:
    with pytest.raises(
        ValueError, match="arm mola_loop: latency.gates=zipf replaces one decision for all layers"
    ):
        compose("arms=paper", "latency.gates=zipf")
    with pytest.raises(ValueError, match="twice as many experts"):
        compose("arms.run=[base,adafuse_gather]", "latency.gates=distinct", "experts.count=3")
