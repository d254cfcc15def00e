"""bench/routing.py: what is said of the experts in use is what a batch used."""

import pytest
import torch

from adafuse.adapters import gate_table
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.bench import cost, routing
from adafuse.config import GateSource, StrategyName
from conftest import GEOMETRY, compose


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
    seen = routing.watch(adapter, model, prompts(rows))
    assert seen == {
        "changed_share": changed,
        "distinct_experts": distinct,
        "touched_share": distinct / 4,
        "routers": 1.0,
    }


def test_routers_of_many_layers_are_told_together(tiny_llama) -> None:
    model = tiny_llama()
    seen = routing.watch(adapter_of(model, "method=mola"), model, prompts(2))
    assert seen["routers"] == 28 and 0 < seen["changed_share"] <= 1 and 2 <= seen["distinct_experts"] <= 4


def test_the_floor_counts_the_experts_that_were_seen(tiny_llama) -> None:
    model = tiny_llama()
    adapter = adapter_of(model, "method=adafuse")
    none, half, full = (
        cost.adapter_bytes(adapter, StrategyName.gather, 4, share) for share in (0.0, 0.5, 1.0)
    )
    experts = sum(p.numel() * p.element_size() for s in adapter.linears() for p in s.experts.parameters())
    assert full - none == pytest.approx(experts, abs=28) and half - none == pytest.approx(experts / 2, abs=28)
    assert cost.adapter_bytes(adapter, StrategyName.dense, 4, 0.5) == full, "dense reads all of them"
