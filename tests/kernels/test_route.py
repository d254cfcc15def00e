"""route against naive.py: odd sizes, ties, NaN, and weights that need not sum to one."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from adafuse.kernels import naive
from adafuse.kernels.route import route
from synthetic.gather import TYPES


def operands(
    tokens: int, groups: int, experts: int, inputs: int, device: str, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """x with rows longer than they look, and routers in fp32."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        x = torch.randn(tokens, inputs + 8).to(device, dtype)[:, :inputs]
        return x, (torch.randn(groups, experts, inputs) / inputs**0.5).to(device)


@pytest.mark.parametrize("raw", [False, True], ids=["renormalised", "raw"])
@pytest.mark.parametrize("device,dtype", TYPES)
@pytest.mark.parametrize("size", [(1, 1, 2, 16, 1), (5, 3, 5, 301, 2), (2, 1, 16, 18944, 16)], ids=str)
def test_route(size, device, dtype, raw):
    tokens, groups, experts, inputs, top_k = size
    x, router = operands(tokens, groups, experts, inputs, device, dtype)
    index, weight, probs = route(x, router, top_k, raw)
    wanted = naive.route(x, router, top_k, raw)
    assert torch.equal(index, wanted[0]) and index.dtype == torch.int64
    # logits are fp32 sums of up to 18944 terms in another order: they differ by less than 1e-5
    torch.testing.assert_close(weight, wanted[1], rtol=2e-5, atol=2e-6)
    torch.testing.assert_close(probs, wanted[2], rtol=2e-5, atol=2e-6)
    mutated = naive.route(x, -router, top_k, raw)
    assert not torch.equal(index, mutated[0])
    assert not torch.allclose(probs, mutated[2], rtol=2e-5, atol=2e-6)
    if groups > 1:
        assert not torch.equal(index, naive.route(x, router.roll(1, 0), top_k, raw)[0])
    if top_k < experts and top_k > 1:
        assert not torch.allclose(weight, naive.route(x, router, top_k, not raw)[1], rtol=2e-5, atol=2e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("fill", [0.0, float("nan")], ids=["equal", "nan"])
def test_indices_are_distinct_and_valid_whatever_the_logits(fill):
    x, _ = operands(3, 1, 5, 32, "cpu", torch.float32)
    index, weight, _ = route(x, torch.full((2, 5, 32), fill), 4, False)
    assert all(len(set(row)) == 4 and max(row) < 5 and min(row) >= 0 for row in index.flatten(0, 1).tolist())
    assert weight.isnan().all() if fill != fill else torch.allclose(weight, torch.full_like(weight, 0.25))


@pytest.mark.parametrize("device,dtype", TYPES)
def test_nothing_is_written_behind_what_is_chosen(device, dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Experts that are no power of two, fewer slots than experts: the last token's next slot is somebody else's."""
    x, router = operands(3, 2, 5, 40, device, dtype)
    empty, rooms = torch.empty, []

    def with_room(*size: int, **how: object) -> Tensor:
        whole = empty(math.prod(size) + 8, **how).fill_(7)
        rooms.append((whole, math.prod(size)))
        return whole[: math.prod(size)].view(size)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", with_room)
        route(x, router, 2, False)
    assert len(rooms) >= 3 and all((whole[size:] == 7).all() for whole, size in rooms)
