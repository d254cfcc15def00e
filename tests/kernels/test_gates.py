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
# tokens, experts, top-k
SIZES = [(1, 2, 1), (37, 5, 5), (130, 8, 2), (300, 3, 1), (3, 33, 4)]
# fp32 sums of a few terms in another order
NEAR = {"rtol": 2e-5, "atol": 2e-6}


def logits(tokens: int, experts: int, device: str) -> tuple[Tensor, Tensor]:
    """In three parts, each a 256th of the one before, and their sum."""
    parts_T3E = torch.randn(tokens, 3, experts, generator=torch.Generator().manual_seed(0)).to(device)
    parts_T3E = parts_T3E * torch.tensor([1.0, 2**-8, 2**-16], device=device)[:, None]
    return parts_T3E.flatten(1), parts_T3E[:, 2] + parts_T3E[:, 1] + parts_T3E[:, 0]


def plain(logits_TE: Tensor, top_k: int, normalisation: Normalisation) -> tuple[Tensor, ...]:
    """Index, weights, softmax and weights of all experts from a router that hands its input on."""
    router = Router(logits_TE.shape[1], logits_TE.shape[1], top_k, normalisation)
    router.weight = torch.nn.Parameter(torch.eye(logits_TE.shape[1], device=logits_TE.device))
    found = router(logits_TE)
    return found.index_TK, found.weight_TK, found.probs_TE, found.dense()


@pytest.mark.parametrize("normalisation", Normalisation)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("size", SIZES, ids=str)
def test_gates_and_their_gradients(size, device, normalisation):
    tokens, experts, top_k = size
    raw = normalisation is Normalisation.softmax_topk_raw
    parts_TS, logits_TE = logits(tokens, experts, device)
    wanted = plain(logits_TE.requires_grad_(), top_k, normalisation)
    with torch.no_grad():
        found, again = gates.gates(parts_TS, top_k, raw), naive.gates(parts_TS, top_k, raw)
    for one, two, three in zip(found, again, wanted, strict=True):
        assert one.dtype == three.dtype
        torch.testing.assert_close(one, three, **NEAR)
        torch.testing.assert_close(two, three, **NEAR)
    index_TK, _, probs_TE, dense_TE = found
    grads = [torch.randn_like(one.detach()) for one in wanted[1:]]
    for used in [(0,), (2,), (1,), (1, 2), (0, 1, 2)]:
        (exact_TE,) = torch.autograd.grad(
            [wanted[1:][one] for one in used], logits_TE, [grads[one] for one in used], retain_graph=True
        )
        given = [grads[one] if one in used else None for one in range(3)]
        arguments = (index_TK, probs_TE, dense_TE), raw, torch.float32
        for form in (gates, naive):
            torch.testing.assert_close(form.gates_backward(*given, *arguments), exact_TE, **NEAR)
        if used == (2,) and 1 < top_k < experts:
            swapped = gates.gates_backward(None, None, grads[2].roll(1, 1), *arguments)
            other = gates.gates_backward(*given, arguments[0], not raw, torch.float32)
            assert not torch.allclose(swapped, exact_TE, **NEAR)
            assert not torch.allclose(other, exact_TE, **NEAR)


@pytest.mark.parametrize("device", DEVICES)
def test_gradients_of_any_layout_are_rounded_once(device):
    parts_TS, _ = logits(9, 5, device)
    index_TK, _, probs_TE, dense_TE = gates.gates(parts_TS, 2, False)
    of_dense_TE, of_probs_TE = torch.randn(5, 9, device=device).T, torch.ones((), device=device).expand(9, 5)
    given = None, of_probs_TE, of_dense_TE, (index_TK, probs_TE, dense_TE), False
    # bf16 is wrong in Triton's interpreter
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    found_TE = gates.gates_backward(*given, dtype)
    assert found_TE.dtype == dtype
    eps = torch.finfo(dtype).eps
    torch.testing.assert_close(
        found_TE.float(), naive.gates_backward(*given, torch.float32), rtol=eps, atol=eps**2
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
@pytest.mark.parametrize("fill", [0.0, float("nan")], ids=["equal", "nan"])
def test_indices_are_distinct_and_valid_whatever_the_logits(fill):
    index_TK, weight_TK, _, dense_TE = gates.gates(torch.full((3, 15), fill), 4, False)
    assert index_TK.tolist() == [[0, 1, 2, 3]] * 3
    assert weight_TK.isnan().all() if fill != fill else torch.equal(dense_TE[:, :4], weight_TK)
