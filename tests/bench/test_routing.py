"""bench/routing.py: what is said of the experts in use is what a batch used."""

from itertools import pairwise
from statistics import mean

import pytest
import torch

from adafuse.adapters import gate_table
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.adapters.reference import float_view
from adafuse.bench import cost, routing
from adafuse.bench.checks import run_checks
from adafuse.config import GateSource, Runtime, StrategyName
from adafuse.engine.make import make
from synthetic.configurations import GEOMETRY, compose


def prompts(rows: int) -> torch.Tensor:
    return torch.randint(4, 260, (rows, 8), generator=torch.Generator().manual_seed(0))


def adapter_of(model, *overrides: str) -> Adapter:
    config = compose(*GEOMETRY, *overrides)
    adapter = Adapter(model, config.method, config.experts, seed=0)
    randomise(adapter, seed=1)
    return adapter


@pytest.mark.parametrize(
    ("source", "rows", "changed", "distinct"),
    [(GateSource.same, 3, 0.0, 2.0), (GateSource.distinct, 1, 1.0, 2.0), (GateSource.distinct, 3, 1.0, 4.0)],
)
def test_a_table_is_seen_as_it_is(source, rows, changed, distinct, tiny_llama) -> None:
    model = tiny_llama()
    adapter = adapter_of(model, "method=adafuse")
    adapter.context.gate_table = gate_table.make(source, adapter.geometry, rows, 0, "cpu")
    seen = routing.shares(adapter, {})
    assert seen == {
        "changed_share": changed,
        "distinct_experts": distinct,
        "touched_share": distinct / 4,
        "used_share": 1.0,
        "merged_share": 1.0,
        "routers": 1.0,
    }


def test_a_selection_lasts_until_its_experts_change(tiny_llama) -> None:
    adapter = adapter_of(tiny_llama(), "method=mola")
    names = list(adapter.routers())
    stays = torch.tensor([[0, 1], [1, 0], [0, 1], [1, 0]]).expand(
        2, -1, -1
    )  # two sequences, the same two experts
    once = torch.tensor([[0, 1], [0, 1], [0, 2], [0, 2]]).expand(2, -1, -1)
    half = torch.stack([stays[0], torch.tensor([[0, 1], [2, 3], [0, 1], [2, 3]])])
    chosen = dict.fromkeys(names, stays) | {names[1]: once, names[2]: half}
    seen = routing.selections(adapter, chosen)
    assert seen["routers"] == names
    assert seen["changed_share"][:4] == pytest.approx([0, 1 / 3, 1 / 2, 0], abs=1e-3)
    assert seen["lasts_tokens"][:4] == pytest.approx([4, 2, 4 / 2.5, 4], abs=1e-3)


def test_tokens_that_are_left_to_the_backbone_use_no_expert(tiny_llama) -> None:
    model = tiny_llama()
    adapter = adapter_of(model, "method=adafuse", "method.null_expert=true")
    for share in (0.25, 1.0):
        made = gate_table.make(GateSource.same, adapter.geometry, 1, 0, "cpu", share)
        adapter.context.gate_table, used = made, made.used_NB[: routing.STEPS, 0]
        seen = routing.shares(adapter, {})
        assert seen["used_share"] == 1 - share == pytest.approx(float(used.float().mean()))
        assert seen["distinct_experts"] == 2 * seen["used_share"] and seen["touched_share"] == (1 - share) / 2
        assert seen["merged_share"] == pytest.approx(float((used[1:] | used[:-1]).float().mean()))
        assert seen["changed_share"] == pytest.approx(float((used[1:] != used[:-1]).float().mean()))


def test_the_floor_of_a_merge_counts_the_weights_that_must_be_written(tiny_llama) -> None:
    adapter = adapter_of(tiny_llama(), "method=adafuse", "method.null_expert=true")
    weights = sum(s.base.weight.numel() * s.base.weight.element_size() for s in adapter.adapted().values())
    experts = (
        sum(p.numel() * p.element_size() for s in adapter.adapted().values() for p in s.experts.parameters())
        / 4
    )
    none = {"touched_share": 0.0, "used_share": 0.0, "merged_share": 0.0}
    half = {"touched_share": 0.25, "used_share": 0.5, "merged_share": 0.75}
    of = {s: [cost.adapter_bytes(adapter, s, 1, seen) for seen in (none, half, None)] for s in StrategyName}
    for strategy, chosen in ((StrategyName.switch, 4), (StrategyName.rebase, 2)):
        idle, mixed, busy = of[strategy]
        assert busy - idle == pytest.approx(2 * weights + chosen * experts, abs=28)
        assert mixed - idle == pytest.approx(1.5 * weights + chosen * experts / 2, abs=28)
    assert of[StrategyName.gather][0] == of[StrategyName.rebase][0], "the router is read all the same"
    # their products run whatever the gates are
    assert len(set(of[StrategyName.simple_merge])) == 1


def test_macs_are_those_of_a_token_with_experts(tiny_llama) -> None:
    model = tiny_llama()
    adapter = adapter_of(model, "method=adafuse", "method.null_expert=true")
    for strategy in (StrategyName.switch, StrategyName.rebase, StrategyName.gather):
        counted = []
        for share in (0.0, 1.0):
            adapter.context.gate_table = gate_table.make(
                GateSource.same, adapter.geometry, 1, 0, "cpu", share
            )
            own = adapter.context.gate_table
            counted.append(cost.count_macs(model, adapter, strategy, prompts(1)))
            assert adapter.context.gate_table is own
        assert counted[0] == counted[1] > cost.count_macs(model, None, strategy, prompts(1))


def decoded(model, adapter: Adapter, rows: int, tokens: int = 24) -> dict[str, torch.Tensor]:
    decoder = make(model, adapter, StrategyName.gather, Runtime.eager, 8 + tokens)
    return run_checks(decoder, float_view(model), prompts(rows), tokens).choices


def test_routers_of_many_layers_are_told_together(tiny_llama) -> None:
    model = tiny_llama()
    adapter = adapter_of(model, "method=mola")
    choices = decoded(model, adapter, 2)
    assert {index.shape for index in choices.values()} == {(2, 23, 2)}
    seen = routing.shares(adapter, choices)
    assert seen["routers"] == 28 and 0 < seen["changed_share"] <= 1 and 2 <= seen["distinct_experts"] <= 4


def test_what_was_decoded_is_counted_as_by_hand(tiny_llama) -> None:
    model = tiny_llama()
    adapter = adapter_of(model, "method=adafuse", "method.null_expert=true")
    choices = decoded(model, adapter, 3)
    (index_BNK,) = choices.values()
    steps = [[frozenset(chosen) - {-1} for chosen in step] for step in index_BNK.transpose(0, 1).tolist()]
    pairs = [pair for last, now in pairwise(steps) for pair in zip(last, now, strict=True)]
    distinct = mean(len(frozenset.union(*step)) for step in steps)
    assert routing.shares(adapter, choices) == pytest.approx(
        {
            "changed_share": mean(last != now for last, now in pairs),
            "distinct_experts": distinct,
            "touched_share": distinct / 4,
            "used_share": mean(bool(chosen) for step in steps for chosen in step),
            "merged_share": mean(bool(last or now) for last, now in pairs),
            "routers": 1.0,
        }
    )


def test_a_router_of_fewer_experts_than_the_others_choose_is_told_with_them(tiny_llama) -> None:
    adapter = adapter_of(tiny_llama(), "method=mola")
    one, many = torch.tensor([[[0], [0]]]), torch.tensor([[[0, 1], [1, 0]]])
    names = list(adapter.routers())
    seen = routing.shares(adapter, {name: one if name == names[0] else many for name in names})
    assert seen["changed_share"] == 0.0 and seen["distinct_experts"] == pytest.approx(2 - 1 / 28)


def test_the_floor_counts_the_experts_that_were_seen(tiny_llama) -> None:
    model = tiny_llama()
    adapter = adapter_of(model, "method=adafuse")
    none, half, full = (
        cost.adapter_bytes(adapter, StrategyName.gather, 4, {"touched_share": share})
        for share in (0.0, 0.5, 1.0)
    )
    experts = sum(
        p.numel() * p.element_size() for s in adapter.adapted().values() for p in s.experts.parameters()
    )
    assert full - none == pytest.approx(experts, abs=28) and half - none == pytest.approx(experts / 2, abs=28)
    assert cost.adapter_bytes(adapter, StrategyName.dense, 4, {"touched_share": 0.5}) == full, (
        "dense reads all of them"
    )
