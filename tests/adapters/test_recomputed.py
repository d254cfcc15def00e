"""Gradients of a fit whose blocks are computed again in its backward pass are those of one that keeps them."""

import pytest
import torch
from torch import Tensor

from adafuse.adapters.adapter import Adapter, randomise
from synthetic.configurations import GEOMETRY, METHODS, compose

IDS = torch.arange(4, 36).view(2, 16)
# one decision; one every two blocks, one a block; one taken elsewhere
TOKEN_ROUTING = [["method=adafuse", f"method.blocks_per_decision={blocks}"] for blocks in (0, 1, 2)]
TOKEN_ROUTING += [
    ["method=adafuse", f"method.router_input={point}"] for point in ("embedding", "block0_output")
]


def gradients(model: torch.nn.Module, overrides: list[str], forwards: int) -> list[Tensor | None]:
    config = compose(*GEOMETRY, "method.dropout=0", *overrides)
    adapter = Adapter(model, config.method, config.experts, 0)
    randomise(adapter, 0)
    with adapter.installing():
        texts = (IDS, IDS.flip(1))[:forwards]
        sum(model(input_ids=ids, labels=ids, use_cache=False).loss for ids in texts).backward()
    return [parameter.grad for parameter in adapter.parameters()]


@pytest.mark.parametrize("forwards", [1, 2])
@pytest.mark.parametrize(
    "overrides",
    [*TOKEN_ROUTING, *([f"method={name}"] for name in METHODS if name != "adafuse")],
    ids=" ".join,
)
def test_gates_are_those_of_the_same_forward(overrides: list[str], forwards: int, tiny_llama) -> None:
    """Of two forwards before one backward pass, as preference losses have them, too."""
    found = []
    for recomputes in (False, True):
        model = tiny_llama(num_hidden_layers=4).train()
        if recomputes:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        found.append(gradients(model, overrides, forwards))
    for kept, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(kept, recomputed)


def test_compiled_blocks_have_their_gates_too(tiny_llama) -> None:
    found = []
    for compiles in (False, True):
        model = tiny_llama(num_hidden_layers=2).train()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if compiles:
            model.compile(backend="eager")
        found.append(gradients(model, ["method=adafuse", "experts.targets=[q_proj]"], 2))
    torch._dynamo.reset()
    torch.testing.assert_close(*found)


def test_token_routing_refuses_what_would_leave_its_router_without_a_gradient(tiny_llama) -> None:
    model = tiny_llama().train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": True})
    with pytest.raises(ValueError, match="say use_reentrant=False"):
        gradients(model, ["method=adafuse"], 1)
