"""Gates sum to one where they should, the three normalisations relate as documented, and the balance loss can learn."""

import pytest
import torch

from adafuse.adapters.router import Gates, Router, balance_loss
from adafuse.config import Normalisation


def gates_of(normalisation: Normalisation, seed: int = 0) -> Gates:
    torch.manual_seed(seed)
    router = Router(16, 8, 2, normalisation)
    torch.manual_seed(seed + 1)
    return router(torch.randn(5, 16))


def test_renormalised_softmax_and_softmax_of_the_top_k_are_the_same_gates() -> None:
    renormalised = gates_of(Normalisation.softmax_topk_renorm)
    of_top_k = gates_of(Normalisation.topk_softmax)
    torch.testing.assert_close(renormalised.dense(), of_top_k.dense())
    torch.testing.assert_close(renormalised.weight_TK.sum(-1), torch.ones(5))


def test_raw_softmax_keeps_its_probabilities() -> None:
    raw = gates_of(Normalisation.softmax_topk_raw)
    assert (raw.weight_TK.sum(-1) < 1).all()
    torch.testing.assert_close(raw.weight_TK, raw.probs_TE.gather(-1, raw.index_TK))


def test_the_router_computes_in_fp32_on_bf16_input() -> None:
    router = Router(16, 8, 2, Normalisation.softmax_topk_renorm)
    x = torch.randn(5, 16).bfloat16()
    assert router(x).weight_TK.dtype == torch.float32
    torch.testing.assert_close(router(x).probs_TE, router(x.float()).probs_TE)


def test_balance_loss_is_one_when_even_and_E_when_collapsed() -> None:
    even = Gates(torch.arange(4)[:, None], torch.ones(4, 1), torch.full((4, 4), 0.25))
    collapsed = Gates(torch.zeros(4, 1, dtype=torch.int64), torch.ones(4, 1), torch.eye(4)[:1].expand(4, 4))
    keep = torch.ones(4, dtype=torch.bool)
    assert balance_loss(even, keep).item() == pytest.approx(1.0)
    assert balance_loss(collapsed, keep).item() == pytest.approx(4.0)


def test_balance_loss_has_a_gradient() -> None:
    torch.manual_seed(0)
    router = Router(16, 8, 2, Normalisation.topk_softmax)
    balance_loss(router(torch.randn(32, 16)), torch.ones(32, dtype=torch.bool)).backward()
    assert router.weight.grad is not None and router.weight.grad.abs().max() > 1e-4


def test_balance_loss_leaves_padding_out() -> None:
    torch.manual_seed(0)
    router = Router(16, 8, 2, Normalisation.softmax_topk_renorm)
    tokens, padding = torch.randn(6, 16), torch.randn(10, 16) * 5
    keep = torch.tensor([True] * 6 + [False] * 10)
    alone = balance_loss(router(tokens), torch.ones(6, dtype=torch.bool))
    padded = balance_loss(router(torch.cat([tokens, padding])), keep)
    torch.testing.assert_close(alone, padded)
    assert not torch.isclose(alone, balance_loss(router(torch.cat([tokens, padding])), torch.ones(16) > 0))


def test_a_normed_router_sees_directions_alone() -> None:
    plain = Router(16, 8, 2, Normalisation.softmax_topk_renorm)
    normed = Router(16, 8, 2, Normalisation.softmax_topk_renorm, norm=True)
    normed.load_state_dict(plain.state_dict())
    x_TI = torch.randn(5, 16)
    small, large = (normed(scale * x_TI).probs_TE for scale in (1e-2, 1e2))
    assert torch.allclose(small, large, atol=1e-2) and torch.allclose(normed(x_TI).probs_TE, large, atol=1e-3)
    assert not torch.allclose(plain(1e-2 * x_TI).probs_TE, plain(1e2 * x_TI).probs_TE, atol=0.1)
    unit_TI = x_TI / x_TI.square().mean(-1, keepdim=True).sqrt()
    assert torch.allclose(normed(x_TI).probs_TE, plain(unit_TI).probs_TE, atol=1e-4)
