"""Gates sum to one where they should, the three normalisations relate as documented, and the balance loss can learn."""

import pytest
import torch

from adafuse.adapters import router as routers
from adafuse.adapters.router import Gates, Router, balance_loss, routing_losses, stacked
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


def test_a_normed_router_sees_directions_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    plain = Router(16, 8, 2, Normalisation.softmax_topk_renorm)
    normed = Router(16, 8, 2, Normalisation.softmax_topk_renorm, norm=True)
    normed.load_state_dict(plain.state_dict())
    x_TI = torch.randn(5, 16)
    small, large = (normed(scale * x_TI).probs_TE for scale in (1e-2, 1e2))
    assert torch.allclose(small, large, atol=1e-2) and torch.allclose(normed(x_TI).probs_TE, large, atol=1e-3)
    assert not torch.allclose(plain(1e-2 * x_TI).probs_TE, plain(1e2 * x_TI).probs_TE, atol=0.1)
    unit_TI = x_TI / x_TI.square().mean(-1, keepdim=True).sqrt()
    assert torch.allclose(normed(x_TI).probs_TE, plain(unit_TI).probs_TE, atol=1e-4)
    monkeypatch.setattr(routers, "is_fit_in_half", lambda x: True)
    assert torch.allclose(normed(1e2 * x_TI).probs_TE, large)


@pytest.mark.parametrize("experts", [5, 8])
def test_logits_on_tensor_cores_are_those_of_fp32(experts: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against fp64 no worse than a product in fp32; gradients within a rounding of bf16."""
    torch.manual_seed(0)
    router = Router(512, experts, 2, Normalisation.softmax_topk_renorm)
    x_TI, grad_TE = torch.randn(64, 512).bfloat16().requires_grad_(), torch.randn(64, experts)
    exact_TE = x_TI.detach().double() @ router.weight.detach().double().T
    wanted = torch.autograd.grad(router._logits(x_TI), (x_TI, router.weight), grad_TE)
    monkeypatch.setattr(routers, "is_fit_in_half", lambda x: True)
    logits_TE = router._logits(x_TI)
    assert logits_TE.dtype == torch.float32 and type(logits_TE.grad_fn).__name__ == "_LogitsBackward"
    assert (logits_TE - exact_TE).abs().max() < 4e-7 * exact_TE.abs().max()
    found = torch.autograd.grad(logits_TE, (x_TI, router.weight), grad_TE)
    for one, two in zip(found, wanted, strict=True):
        assert one.dtype == two.dtype and (one - two).norm() < 2**-7 * two.norm()
    # the backbone's embeddings are frozen: there is no gradient for the first router's input
    (of_weight,) = torch.autograd.grad(router._logits(x_TI.detach()), router.weight, grad_TE)
    assert torch.equal(of_weight, found[1])


@pytest.mark.parametrize("null_expert", [False, True])
def test_routers_may_be_balanced_at_once(null_expert: bool) -> None:
    torch.manual_seed(0)
    x_TI, keep_T = torch.randn(9, 16), torch.arange(9) > 2
    several = [
        Router(16, count, 2, Normalisation.softmax_topk_renorm, null_expert) for count in (4, 8, 4, 8, 8)
    ]
    losses, gradients = [], []
    for form in (list, stacked):
        balance, used = routing_losses(form([router(x_TI) for router in several]), keep_T)
        losses.append(torch.stack([balance, used]))
        gradients.append(torch.autograd.grad(balance + used, [router.weight for router in several]))
    assert len(stacked([router(x_TI) for router in several])) == 2
    torch.testing.assert_close(*losses)
    torch.testing.assert_close(*gradients)
