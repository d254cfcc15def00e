"""Weights that are no numbers are named, in the backbone, in experts and in routers; logits without use are found."""

import pytest
import torch

from adafuse.adapters.adapter import Adapter
from adafuse.model.finite import require_finite, useless
from synthetic.configurations import GEOMETRY, compose


def test_a_healthy_model_passes(tiny_llama) -> None:
    require_finite(tiny_llama(), "copy it again")


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("model.layers.2.mlp.up_proj.base.weight", float("nan")),
        ("model.layers.1.self_attn.q_proj.experts.lora_B", float("nan")),
        ("model.layers.0.self_attn.k_proj.router.weight", float("inf")),
        ("model.rotary_emb.inv_freq", float("-inf")),
    ],
)
def test_one_number_that_is_none_is_named(tensor: str, value: float, tiny_llama) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=mola")
    adapter = Adapter(model, config.method, config.experts, 0)
    with adapter.installing():
        found = dict([*model.named_parameters(), *model.named_buffers()])[tensor]
        found.data.view(-1)[1] = value
        with pytest.raises(ValueError) as refusal:
            require_finite(model, "copy it again")
    assert str(refusal.value) == f"{tensor}: 1 of {found.numel()} numbers are NaN or infinite: copy it again"


def test_logits_without_use_are_those_that_tell_nothing() -> None:
    nan, inf = float("nan"), float("inf")
    rows = [
        [1.0, 2.0, 3.0],
        [1.0, nan, 3.0],
        [1.0, inf, 3.0],
        [-inf, 0.0, 1.0],
        [0.0, 0.0, 0.0],
        [-7.0, -7.0, -6.0],
    ]
    assert useless(torch.tensor(rows)).tolist() == [False, True, True, True, True, False]
