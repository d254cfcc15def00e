"""What is said of routers after a fit: loads and shares by family, and what one layer's choice tells of another's."""

import pytest
import torch

from adafuse.adapters.adapter import Adapter
from adafuse.training.validation import normalised_information, validate
from synthetic.configurations import GEOMETRY, compose
from synthetic.training import rows

BY_FAMILY = {"first": rows(10), "second": rows(6)}


def joint(table: list[list[float]]) -> torch.Tensor:
    return torch.tensor(table, dtype=torch.double)[None, None]


def test_information_is_one_for_a_renaming_and_none_for_independence() -> None:
    assert normalised_information(joint([[0, 5], [5, 0]])).item() == pytest.approx(1)
    assert normalised_information(joint([[4, 4], [4, 4]])).item() == pytest.approx(0, abs=1e-9)
    assert 0.1 < normalised_information(joint([[6, 2], [2, 6]])).item() < 0.9


def test_a_choice_that_never_varies_tells_nothing() -> None:
    assert normalised_information(joint([[9, 0], [0, 0]])).item() == 0


def test_every_router_is_described_for_every_family(tiny_llama) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse_layerwise")
    adapter = Adapter(model, config.method, config.experts, 0)
    found = validate(model, adapter, BY_FAMILY, batch=4)
    assert found.rows == 16
    routers = list(adapter.routers())
    assert [(line["router"], line["family"]) for line in found.routing] == [
        (router, family) for family in BY_FAMILY for router in routers
    ]
    assert all(sum(line["load"]) == pytest.approx(1, abs=1e-3) for line in found.routing)
    assert all(line["bypassed"] == 0 and line["entropy_nats"] > 0 for line in found.routing)
    matrix = torch.tensor(found.agreement["information"])
    assert found.agreement["routers"] == routers and matrix.shape == (len(routers),) * 2
    assert torch.equal(matrix, matrix.T)


def test_two_routers_that_are_one_agree_entirely(tiny_llama) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse_layerwise")
    adapter = Adapter(model, config.method, config.experts, 0)
    # q, k and v of a block see the same input
    routers = adapter.routers()
    first, second = (routers[f"model.layers.1.self_attn.{name}_proj"] for name in "qk")
    second.weight.data.copy_(first.weight.flip(0))
    found = validate(model, adapter, BY_FAMILY, batch=4)
    names = found.agreement["routers"]
    at = [names.index(f"model.layers.1.self_attn.{name}_proj") for name in "qkv"]
    matrix = found.agreement["information"]
    assert matrix[at[0]][at[1]] == pytest.approx(1, abs=2e-3)
    assert matrix[at[0]][at[2]] < 0.9


def test_tokens_without_experts_are_counted_and_have_no_load(tiny_llama) -> None:
    model = tiny_llama()
    config = compose(*GEOMETRY, "method=adafuse", "method.null_expert=true")
    adapter = Adapter(model, config.method, config.experts, 0)
    found = validate(model, adapter, BY_FAMILY, batch=4)
    assert any(0 < line["bypassed"] < 1 for line in found.routing)
    assert found.agreement is None, "one router has nobody to agree with"
    adapter.token_router.weight.data.zero_()
    adapter.token_router.weight.data[-1] = 0.0
    none = validate(model, adapter, BY_FAMILY, batch=4)
    assert all(line["bypassed"] == 1 and sum(line["load"]) == 0 for line in none.routing), (
        "a tie is the backbone's"
    )


def test_full_fine_tuning_has_a_loss_and_no_routers(tiny_llama) -> None:
    found = validate(tiny_llama(), None, BY_FAMILY, batch=4)
    assert found.loss > 0 and not found.routing and found.agreement is None


@pytest.mark.parametrize("factor", [float("nan"), float("inf"), 1e25], ids=["nan", "inf", "overflow"])
def test_logits_without_use_are_an_error_that_names_the_rows(factor: float, tiny_llama) -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data.mul_(factor)
    with pytest.raises(ValueError, match="validation, first: no loss can be told for rows 0 to 3"):
        validate(model, None, BY_FAMILY, batch=4)
