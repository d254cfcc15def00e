"""Every strategy is the same function as the fp32 reference, for every method; what cannot work is refused."""

import pytest
import torch

from adafuse import strategies
from adafuse.adapters import reference
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.router import Gates, Router
from adafuse.bench.checks import Check, _rows, run_checks
from adafuse.config import Config, ExpertKind, Routing, Runtime, StrategyName
from adafuse.engine.decode import forward_logits, generate
from adafuse.engine.make import make
from adafuse.model.projections import join
from adafuse.refusals import MERGING, PEFT, refuse_strategy
from adafuse.strategies import merge
from adafuse.strategies.joined import Extended, make_room
from synthetic.adapters import adapted, one_selection, prompt
from synthetic.configurations import GEOMETRY, compose

# PEFT's own code is no strategy of ours: test_peft.py
OURS = [s for s in StrategyName if s not in PEFT]


def checks_of(
    adapter: Adapter,
    strategy: StrategyName,
    ids: torch.Tensor,
    tokens: int,
    runtime: Runtime = Runtime.eager,
) -> list[Check]:
    """Off a GPU the static runtimes run the step that they would capture."""
    oracle = reference.float_view(adapter.model)
    decoder = make(adapter.model, adapter, strategy, runtime, ids.shape[1] + tokens + 8)
    return run_checks(decoder, oracle, ids, tokens).checks


def refused(config: Config, strategy: StrategyName) -> bool:
    """What a merge cannot do: experts behind a non-linearity, or one launch before all gates are known."""
    if strategy is StrategyName.fused:
        return config.method.routing in (Routing.layerwise, Routing.blockwise)
    at_once = strategy in (StrategyName.switch, StrategyName.rebase)
    late = config.method.routing is Routing.layerwise or config.method.blocks_per_decision > 0
    return strategy in MERGING and (config.method.expert_kind is not ExpertKind.lora or (at_once and late))


@pytest.mark.parametrize("strategy", OURS, ids=lambda s: s.name)
def test_every_strategy_passes_every_check(variant: Config, strategy: StrategyName, tiny_llama) -> None:
    if refused(variant, strategy):
        with pytest.raises(ValueError, match=f"{variant.method.name} cannot use strategy {strategy.name}"):
            refuse_strategy(variant.method, strategy)
        return
    model = tiny_llama()
    checks = checks_of(adapted(model, variant), strategy, prompt(), tokens=8)
    routed = variant.method.routing is not Routing.none
    ways = [
        name
        for way in ("logits", "whole", "padding")
        for name in ([way, f"routing_{way}"] if routed else [way])
    ]
    merged = ["merged", "merged_first"] if strategy in MERGING else []
    assert sorted(c.check for c in checks) == sorted(["finite", "greedy", "restored", *ways, *merged])
    assert all(c.passed for c in checks), [c for c in checks if not c.passed]


@pytest.mark.parametrize("strategy", [s for s in OURS if s is not StrategyName.loop], ids=lambda s: s.name)
def test_the_static_step_passes_every_check(variant: Config, strategy: StrategyName, tiny_llama) -> None:
    """Joined projections, one shared position, padding, and merged state that goes on from token to token."""
    if refused(variant, strategy):
        return
    checks = checks_of(adapted(tiny_llama(), variant), strategy, prompt(), 8, Runtime.graph)
    assert all(c.passed for c in checks), [c for c in checks if not c.passed]


def test_the_adapter_changes_the_output(variant: Config, tiny_llama) -> None:
    model = tiny_llama()
    plain = forward_logits(model, prompt())
    with_adapter = reference.Reference(reference.float_view(model), adapted(model, variant))(prompt())
    assert (plain - with_adapter).abs().max() > 0.1


@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_every_backbone_family(model_type: str, tiny_llama) -> None:
    model = tiny_llama(model_type)
    config = compose(*GEOMETRY, "method=adafuse")
    for strategy in (StrategyName.gather, StrategyName.switch):
        checks = checks_of(adapted(model, config), strategy, prompt(), tokens=8)
        assert all(c.passed for c in checks), [c for c in checks if not c.passed]


@pytest.mark.parametrize(
    "strategy",
    [StrategyName.loop, StrategyName.masked_loop, StrategyName.dense, StrategyName.gather],
    ids=lambda s: s.name,
)
def test_a_batch_whose_tokens_choose_differently(variant: Config, strategy: StrategyName, tiny_llama) -> None:
    model = tiny_llama()
    checks = checks_of(adapted(model, variant), strategy, prompt(rows=3), tokens=8)
    assert all(c.passed for c in checks), [c for c in checks if not c.passed]


def test_the_reference_sees_the_ends_of_a_large_batch() -> None:
    """Where a kernel's last tile ends is where it goes wrong first."""
    assert _rows(prompt(rows=3)).tolist() == [0, 1, 2]
    assert _rows(prompt(rows=64)).tolist() == [0, 21, 42, 63]


@pytest.mark.parametrize("strategy", [StrategyName.dense, StrategyName.gather], ids=lambda s: s.name)
@pytest.mark.parametrize("method", ["adafuse", "adafuse_layerwise", "mola"])
@pytest.mark.parametrize("rank", [4, 3])
@pytest.mark.parametrize("where", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_of_joined_products_are_whole_loads(
    where: str, rank: int, method: str, strategy: StrategyName, tiny_llama, monkeypatch
) -> None:
    """4 experts with a router each leave an odd multiple of 4; what fills up is zero, whoever wrote there before."""
    config, products = compose(*GEOMETRY, f"method={method}", f"experts.rank={rank}"), []
    product = Extended.product
    monkeypatch.setattr(
        Extended, "product", lambda self, x: (products.append((self, product(self, x))), products[-1][1])[1]
    )
    model = tiny_llama().to(where)
    adapter = adapted(model, config)
    make_room(adapter)
    for projection in join(model):
        projection.storage_OI[sum(projection.widths) :].fill_(torch.nan)
    for runtime in (Runtime.eager, Runtime.graph):
        checks = checks_of(adapter, strategy, prompt(rows=3).to(where), 8, runtime)
        assert all(c.passed for c in checks), [c for c in checks if not c.passed]
    assert products and all(y.stride(0) == y.shape[1] and y.shape[1] % 8 == 0 for _, y in products)
    needs = 4 * (rank + (method != "adafuse"))
    filling = [e.rows_OI[len(e.rows_OI) - (len(e.rows_OI) - e.outputs) % needs :] for e, _ in products]
    assert not any(rows_OI.any() for rows_OI in filling)
    # 20 or 12 rows a linear need some behind them, 16 do not
    assert any(len(rows_OI) for rows_OI in filling) is (needs % 8 > 0)


@pytest.mark.parametrize("strategy", MERGING, ids=lambda s: s.name)
def test_merging_refuses_a_batch_whose_gates_differ(strategy: StrategyName, tiny_llama) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse")
    adapter = adapted(model, config)
    adapter.install(strategies.make(strategy))
    with pytest.raises(ValueError, match="gates of this batch differ: use batch=1"):
        generate(model, adapter, prompt(rows=3), None, max_new_tokens=4)
    adapter.remove()


@pytest.mark.parametrize("strategy", MERGING, ids=lambda s: s.name)
def test_merging_serves_a_batch_that_shares_its_gates(strategy: StrategyName, tiny_llama) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse")
    same = prompt().expand(3, -1)
    checks = checks_of(adapted(model, config), strategy, same, tokens=8)
    assert all(c.passed for c in checks), [c for c in checks if not c.passed]


def test_rebase_is_bit_identical_after_any_number_of_tokens(tiny_llama) -> None:
    """The weights that serve a token depend on that token alone, not on those before it."""
    model, config = tiny_llama(dtype=torch.float32), compose(*GEOMETRY, "method=adafuse")
    model = model.bfloat16()
    adapter = adapted(model, config).to_dtype(torch.bfloat16)
    site = next(iter(adapter.adapted().values()))
    selections = [one_selection(seed) for seed in range(50)]
    for strategy, identical in ((StrategyName.rebase, True), (StrategyName.switch, False)):
        adapter.install(strategies.make(strategy))
        adapter.context.decode.decide(selections[-1])
        fresh = site.base.weight.clone()
        for gates in selections:
            adapter.context.decode.decide(gates)
        assert torch.equal(site.base.weight, fresh) is identical
        adapter.remove()


def test_static_lora_comes_out_of_a_weight_that_a_strategy_has_moved(tiny_llama) -> None:
    """Room for the experts behind q, k and v moves their weight after static LoRA was merged into it."""
    static = ["method.static_targets=[q_proj]", "method.static_rank=4", "method.static_alpha=8"]
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse", *static)
    adapter, weight = adapted(model, config), model.model.layers[0].self_attn.q_proj.weight
    clean, before = weight.clone(), weight.data_ptr()
    adapter.install(strategies.make(StrategyName.gather))
    assert weight.data_ptr() != before and not torch.equal(weight, clean)
    adapter.remove()
    assert torch.equal(weight, clean)


def test_plain_lora_merges_once_per_sequence(tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=lora")
    adapter, merges = adapted(model, config), []
    write = merge.Rebase._write
    monkeypatch.setattr(merge.Rebase, "_write", lambda self: (merges.append(1), write(self)))
    adapter.install(strategies.make(StrategyName.rebase))
    generate(model, adapter, prompt(), None, max_new_tokens=8)
    adapter.remove()
    assert len(merges) == 1


def test_the_checks_catch_a_router_that_picks_the_wrong_experts(
    tiny_llama, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference follows an arm's choices, so a wrong choice must show by itself."""
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse")
    forward = Router.forward

    def worst_first(self: Router, x: torch.Tensor) -> Gates:
        gates = forward(self, x)
        index = gates.probs_TE.topk(2, largest=False).indices
        weight = gates.probs_TE.gather(-1, index)
        return Gates(index, weight / weight.sum(-1, keepdim=True), gates.probs_TE)

    monkeypatch.setattr(Router, "forward", worst_first)
    found = checks_of(adapted(model, config), StrategyName.loop, prompt(), tokens=8)
    checks = {check.check: check for check in found}
    assert checks["logits"].passed and not checks["routing_logits"].passed


Factors = tuple[torch.Tensor, torch.Tensor]


def flip_sign(up: torch.Tensor, down: torch.Tensor, index: torch.Tensor, gate: torch.Tensor) -> Factors:
    return ORIGINAL(up, down, index, gate.abs())


def forget_gate(up: torch.Tensor, down: torch.Tensor, index: torch.Tensor, gate: torch.Tensor) -> Factors:
    return ORIGINAL(up, down, index, gate.sign())


def swap_expert(up: torch.Tensor, down: torch.Tensor, index: torch.Tensor, gate: torch.Tensor) -> Factors:
    return ORIGINAL(up, down, (index + 1) % 4, gate)


ORIGINAL = merge.factors


@pytest.mark.parametrize("mutation", [flip_sign, forget_gate, swap_expert])
def test_the_checks_catch_a_wrong_merge(mutation, tiny_llama, monkeypatch: pytest.MonkeyPatch) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse")
    monkeypatch.setattr(merge, "factors", mutation)
    checks = checks_of(adapted(model, config), StrategyName.switch, prompt(), tokens=16)
    assert not next(c for c in checks if c.check == "logits").passed
