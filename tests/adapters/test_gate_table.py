"""A table of gates says which experts a decode step uses: under every strategy, in order, and again from the start."""

from itertools import pairwise

import pytest
import torch

from adafuse.adapters import gate_table, reference
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.bench.checks import run_checks
from adafuse.bench.latency import restart_gates
from adafuse.config import Config, Experts, GateSource, Runtime, StrategyName
from adafuse.engine.make import make
from synthetic.configurations import GEOMETRY, compose

GEOMETRY_8 = Experts(targets=["q_proj"], rank=4, count=8, top_k=2, alpha=8.0)
TABLES = [source for source in GateSource if source is not GateSource.router]


def table(
    source: GateSource, batch: int = 2, experts: Experts = GEOMETRY_8, share: float = 0.0
) -> gate_table.GateTable:
    made = gate_table.make(source, experts, batch, 0, "cpu", share)
    assert made is not None
    return made


def with_table(model, config: Config, source: GateSource, batch: int = 1, share: float = 0.0) -> Adapter:
    adapter = Adapter(model, config.method, config.experts, seed=0)
    randomise(adapter, seed=1, scale=0.3)
    adapter.context.gate_table = table(source, batch, config.experts, share)
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
    decoder = make(model, adapter, strategy, runtime, 40)
    checks = run_checks(decoder, reference.float_view(model), prompt, 8).checks
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


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("share", [0.25, 0.3, 0.5, 1.0])
def test_exactly_the_share_is_left_to_the_backbone_everywhere_in_the_table(share: float, batch: int) -> None:
    made, all_used = table(GateSource.uniform, batch, share=share), table(GateSource.uniform, batch)
    used_NB = made.used_NB
    assert used_NB is not None and used_NB.shape == (gate_table.STEPS, batch) and all_used.used_NB is None
    assert int((~used_NB).sum()) == round(share * used_NB.numel())
    # a block of 64 tokens has the share too, but for a token in each of the 16 steps that it begins and ends within
    blocks = (~used_NB).float().unfold(0, 64, 1).sum((1, 2))
    assert (blocks - 64 * batch * share).abs().max() <= 16 * batch
    assert torch.equal(made.index_NBK, all_used.index_NBK), "the same experts, for fewer tokens"
    assert torch.equal(used_NB, table(GateSource.uniform, batch, share=share).used_NB)
    assert share == 1.0 or not torch.equal(used_NB[:64], used_NB[64:128]), "drawn, not a pattern"


def test_a_token_that_is_left_to_the_backbone_has_no_weight_at_all() -> None:
    from adafuse.adapters.router import Gates

    made = table(GateSource.uniform, batch=3, share=0.5)
    said = Gates(torch.zeros(2, 2, dtype=torch.int64), torch.ones(2, 2), torch.full((2, 8), 0.125))
    for raw, whole in ((False, 1.0), (True, 0.25)):
        made.restart()
        for step in range(40):
            gates, used_B = made.replace(said, raw), made.used_NB[step, :2]
            assert torch.equal(gates.index_TK, made.index_NBK[step, :2])
            assert torch.equal(gates.weight_TK.any(-1), used_B)
            assert torch.equal(gates.weight_TK.sum(-1), whole * used_B)


NULL = [*GEOMETRY, "method=adafuse", "method.null_expert=true"]
BYPASSED = [
    *(StrategyName.loop, StrategyName.dense, StrategyName.gather, StrategyName.fused),
    *(StrategyName.simple_merge, StrategyName.switch, StrategyName.rebase),
]


@pytest.mark.parametrize("share", [0.5, 1.0])
def test_all_strategies_agree_where_tokens_are_left_to_the_backbone(share: float, tiny_llama) -> None:
    """Each is held to the reference, as in a timed cell, and all to one another over the same greedy tokens."""
    found, prompt = {}, torch.randint(4, 260, (1, 9), generator=torch.Generator().manual_seed(0))
    for strategy in BYPASSED:
        model, config = tiny_llama(num_hidden_layers=2), compose(*NULL)
        adapter = with_table(model, config, GateSource.uniform, share=share)
        runtime = Runtime.eager if strategy is StrategyName.loop else Runtime.graph
        decoder = make(model, adapter, strategy, runtime, 64)
        checks = run_checks(decoder, reference.float_view(model), prompt, 12).checks
        assert all(c.passed for c in checks), (strategy, [c for c in checks if not c.passed])
        with decoder.installed(), decoder.watching():
            token = decoder.start(prompt).argmax(-1, keepdim=True)
            with decoder.decoding():
                restart_gates(decoder)
                steps = []
                for step in range(20):
                    steps.append(decoder.step(token))
                    (choice,) = decoder.choices().values()
                    used = bool(adapter.context.gate_table.used_NB[step])
                    assert (choice[:, -1] >= 0).all() if used else (choice[:, -1] == -1).all()
                    token = steps[-1].argmax(-1, keepdim=True)
        found[strategy] = torch.stack(steps)
    for strategy, logits in found.items():
        torch.testing.assert_close(logits, found[StrategyName.loop], msg=lambda m, s=strategy: f"{s}: {m}")


@pytest.mark.gpu
@pytest.mark.parametrize(
    "strategy", [s for s in BYPASSED if s is not StrategyName.loop], ids=lambda s: s.name
)
def test_a_captured_step_leaves_the_tokens_of_its_table_to_the_backbone(strategy, tiny_llama) -> None:
    """One graph for tokens with experts and without; after one without, a rebase has left clean bits."""
    model, config = tiny_llama().to("cuda", torch.bfloat16), compose(*NULL)
    adapter = Adapter(model, config.method, config.experts, seed=0)
    randomise(adapter, seed=1)
    adapter.to_dtype(torch.bfloat16)
    made = gate_table.make(GateSource.uniform, config.experts, 1, 0, "cuda", 0.5)
    adapter.context.gate_table = made
    prompt = torch.randint(4, 260, (1, 9), generator=torch.Generator().manual_seed(0)).cuda()
    decoder = make(model, adapter, strategy, Runtime.graph, 64)
    checks = run_checks(decoder, reference.float_view(model), prompt, 12).checks
    assert all(c.passed for c in checks), [c for c in checks if not c.passed]
    weight = next(iter(adapter.adapted().values())).base.weight
    clean = weight.clone()
    with decoder.installed():
        token = decoder.start(prompt).argmax(-1, keepdim=True)
        with decoder.decoding():
            restart_gates(decoder)
            for used in made.used_NB[:20, 0].tolist():
                token = decoder.step(token).argmax(-1, keepdim=True)
                (choice,) = decoder.choices().values()
                assert bool((choice >= 0).all()) is used
                if strategy is StrategyName.rebase:
                    assert torch.equal(weight, clean) is not used


def test_a_bypassed_table_is_not_the_same_as_a_full_one(tiny_llama) -> None:
    """Whatever agrees above agrees about something."""
    logits, prompt = [], torch.randint(4, 260, (1, 9), generator=torch.Generator().manual_seed(0))
    for share in (0.0, 1.0):
        model, config = tiny_llama(), compose(*NULL)
        adapter = with_table(model, config, GateSource.uniform, share=share)
        decoder = make(model, adapter, StrategyName.gather, Runtime.eager, 64)
        with decoder.installed():
            decoder.start(prompt)
            with decoder.decoding():
                logits.append(decoder.step(prompt[:, :1]))
    assert (logits[0] - logits[1]).abs().max() > 0.1


def test_shares_that_mean_nothing_are_refused() -> None:
    arms = ["task=latency", "arms.run=[base,lora_dense,adafuse_gather]", "method.null_expert=true"]
    uniform = [*arms, "latency.gates=uniform"]
    for share in (0.0, 0.25, 1.0):
        assert compose(*uniform, f"latency.bypass_share={share}").latency.bypass_share == share
    for wrong in (
        ("must be between 0 and 1", [*uniform, "latency.bypass_share=1.5"]),
        ("must be between 0 and 1", [*uniform, "latency.bypass_share=-0.1"]),
        ("use latency.gates=uniform", [*arms, "latency.bypass_share=0.5"]),
        ("use task=latency", [*uniform, "task=trace", "latency.bypass_share=0.5"]),
        (
            "use method=adafuse method.null_expert=true",
            [*uniform, "method.null_expert=false", "latency.bypass_share=0.5"],
        ),
    ):
        message, overrides = wrong
        with pytest.raises(ValueError, match=message) as caught:
            compose(*overrides)
        assert "\n" not in str(caught.value) and "latency.bypass_share=" in str(caught.value)


def test_a_decision_per_layer_is_refused() -> None:
    with pytest.raises(
        ValueError, match="arm mola_loop: latency.gates=zipf replaces one decision for all layers"
    ):
        compose("arms=paper", "latency.gates=zipf")
    with pytest.raises(ValueError, match="twice as many experts"):
        compose("arms.run=[base,adafuse_gather]", "latency.gates=distinct", "experts.count=3")
