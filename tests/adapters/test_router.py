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


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("null_expert", [False, True])
@pytest.mark.parametrize("normalisation", Normalisation)
@pytest.mark.parametrize("experts,top_k", [(5, 2), (8, 1), (3, 3)])
def test_a_fit_in_half_has_the_gates_of_fp32(
    experts: int,
    top_k: int,
    normalisation: Normalisation,
    null_expert: bool,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Against fp64 no worse than a product in fp32; gradients within two roundings to bf16, through each output."""
    torch.manual_seed(0)
    router = Router(512, experts, top_k, normalisation, null_expert).to(device)
    x_TI = torch.randn(67, 512).bfloat16().to(device).requires_grad_()
    of_probs_TE, of_dense_TE = torch.randn(2, 67, experts, device=device)
    exact_TE = torch.softmax(x_TI.detach().double() @ router.weight.detach().double().T, -1)[:, :experts]
    exact_TE = exact_TE / exact_TE.sum(-1, keepdim=True)

    def gradients(gates: Gates, x_TI: torch.Tensor | None = x_TI) -> list[tuple[torch.Tensor, ...]]:
        of_slot_TK = of_dense_TE.gather(1, gates.index_TK)
        through = [
            (gates.dense() * of_dense_TE).sum(),
            (gates.weight_TK * of_slot_TK).sum() + (gates.probs_TE * of_probs_TE).sum(),
        ]
        wanted = [router.weight] if x_TI is None else [router.weight, x_TI]
        return [torch.autograd.grad(one, wanted, retain_graph=True) for one in through]

    usual = [router(x_TI), gradients(router(x_TI))]
    monkeypatch.setattr(routers, "is_fit_in_half", lambda x: True)
    gates = router(x_TI)
    assert gates.probs_TE.dtype == torch.float32 and "_Fitted" in str(_ancestors(gates.probs_TE))
    assert torch.equal(gates.index_TK, usual[0].index_TK)
    assert (gates.probs_TE - exact_TE).abs().max() < 1e-6
    torch.testing.assert_close(gates.dense(), usual[0].dense())
    torch.testing.assert_close(gates.weight_TK, usual[0].weight_TK)
    for found, wanted in zip(gradients(gates), usual[1], strict=True):
        for one, two in zip(found, wanted, strict=True):
            # a gate that is always 1 has none
            assert one.dtype == two.dtype and (one - two).norm() <= 2**-7 * two.norm() + 1e-5
    # the backbone's embeddings are frozen: there is no gradient for the first router's input
    alone = gradients(router(x_TI.detach()), None)
    assert all(torch.equal(one[0], two[0]) for one, two in zip(alone, gradients(gates), strict=True))


def _ancestors(one: torch.Tensor) -> list[object]:
    """The nodes that a tensor comes from."""
    nodes = [one.grad_fn]
    for node in nodes:
        nodes += [before for before, _ in node.next_functions if before is not None]
    return nodes


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
