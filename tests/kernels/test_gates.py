"""Routers of a fit: against naive.py, and against autograd of what is fitted elsewhere, for every normalisation."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adafuse.adapters.router import Router
from adafuse.config import Normalisation
from adafuse.kernels import gates, naive
from synthetic.gather import _poison  # noqa: F401

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
# routers, tokens, experts, top-k
SIZES = [(1, 1, 2, 1), (3, 37, 5, 5), (2, 130, 8, 2), (1, 300, 3, 1), (2, 3, 33, 4)]
# fp32 sums of a few terms in another order
NEAR = {"rtol": 2e-5, "atol": 2e-6}


def logits(routers: int, tokens: int, experts: int, device: str) -> tuple[Tensor, Tensor]:
    """In three parts, each a 256th of the one before, [T, 3 * G * E], and their sum [G, T, E]."""
    parts = torch.randn(tokens, 3, routers, experts, generator=torch.Generator().manual_seed(0)).to(device)
    parts = parts * torch.tensor([1.0, 2**-8, 2**-16], device=device)[:, None, None]
    return parts.flatten(1), (parts[:, 2] + parts[:, 1] + parts[:, 0]).transpose(0, 1).contiguous()


def plain(logits_GTE: Tensor, top_k: int, normalisation: Normalisation) -> tuple[Tensor, ...]:
    """Index, weights, softmax and weights of all experts from a router that hands its input on."""
    experts = logits_GTE.shape[2]
    router = Router(experts, experts, top_k, normalisation)
    router.weight = torch.nn.Parameter(torch.eye(experts, device=logits_GTE.device))
    found = router(logits_GTE)
    return found.index_TK, found.weight_TK, found.probs_TE, found.dense()


@pytest.mark.parametrize("normalisation", Normalisation)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gates_and_their_gradients(size, device, normalisation):
    routers, tokens, experts, top_k = size
    raw = normalisation is Normalisation.softmax_topk_raw
    parts_TS, logits_GTE = logits(routers, tokens, experts, device)
    wanted = plain(logits_GTE.requires_grad_(), top_k, normalisation)
    with torch.no_grad():
        found, again = (form.gates(parts_TS, routers, top_k, raw) for form in (gates, naive))
    for one, two, three in zip(found, again, wanted, strict=True):
        assert one.dtype == three.dtype
        torch.testing.assert_close(one, three, **NEAR)
        torch.testing.assert_close(two, three, **NEAR)
    index_GTK, _, probs_GTE, dense_GTE = found
    grads = [torch.randn_like(one.detach()) for one in wanted[1:]]
    for used in [(0,), (2,), (1,), (1, 2), (0, 1, 2)]:
        (exact_GTE,) = torch.autograd.grad(
            [wanted[1:][one] for one in used], logits_GTE, [grads[one] for one in used], retain_graph=True
        )
        exact_TS = exact_GTE.transpose(0, 1).flatten(1)
        given = [grads[one] if one in used else None for one in range(3)]
        arguments = (index_GTK, probs_GTE, dense_GTE), raw, torch.float32
        for form in (gates, naive):
            torch.testing.assert_close(form.gates_backward(*given, *arguments), exact_TS, **NEAR)
        if used == (2,) and 1 < top_k < experts:
            swapped = gates.gates_backward(None, None, grads[2].roll(1, 2), *arguments)
            other = gates.gates_backward(*given, arguments[0], not raw, torch.float32)
            assert not torch.allclose(swapped, exact_TS, **NEAR)
            assert not torch.allclose(other, exact_TS, **NEAR)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_any_layout_are_rounded_once(device):
    parts_TS, _ = logits(1, 9, 5, device)
    index_GTK, _, probs_GTE, dense_GTE = gates.gates(parts_TS, 1, 2, False)
    of_dense_GTE = torch.randn(1, 5, 9, device=device).transpose(1, 2)
    of_probs_GTE = torch.ones((), device=device).expand(1, 9, 5)
    given = None, of_probs_GTE, of_dense_GTE, (index_GTK, probs_GTE, dense_GTE), False
    # bf16 is wrong in Triton's interpreter
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    found_TS = gates.gates_backward(*given, dtype)
    assert found_TS.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        found_TS.float(), naive.gates_backward(*given, torch.float32), rtol=eps, atol=eps**2
    )


@pytest.mark.parametrize("device", DEVICES)
def test_three_parts_are_the_weight(device):
    weight_EI = torch.randn(5, 301, generator=torch.Generator().manual_seed(0)).to(device)
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    parts_SI = gates.thirds(weight_EI, dtype)
    assert torch.equal(parts_SI, naive.thirds(weight_EI, dtype))
    # of every number that is not tiny three parts of 8 bits are all 24
    bf16_3EI = naive.thirds(weight_EI, torch.bfloat16).unflatten(0, (3, 5)).float()
    assert torch.equal(bf16_3EI[2] + bf16_3EI[1] + bf16_3EI[0], weight_EI)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("fill", [100.0, float("nan")], ids=["equal", "nan"])
def test_indices_are_distinct_and_valid_whatever_the_logits(fill):
    index_GTK, weight_GTK, _, dense_GTE = gates.gates(torch.full((3, 15), fill), 1, 4, False)
    assert index_GTK.tolist() == [[[0, 1, 2, 3]] * 3]
    assert weight_GTK.isnan().all() if fill != fill else torch.equal(dense_GTE[..., :4], weight_GTK)
