"""A router with a null expert: who is left alone, what it learns from, and what in-place merging leaves behind."""

from pathlib import Path

import pytest
import torch

from adafuse import strategies
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.adapters.router import Router, balance_loss, routing_losses
from adafuse.config import Normalisation, StrategyName
from adafuse.engine.decode import generate
from synthetic.configurations import GEOMETRY, compose
from synthetic.training import knobs, train

IDS = torch.randint(4, 260, (1, 9), generator=torch.Generator().manual_seed(1))
X = torch.randn(200, 16, generator=torch.Generator().manual_seed(2))


def null_router() -> Router:
    torch.manual_seed(0)
    return Router(16, 4, 2, Normalisation.softmax_topk_renorm, null_expert=True)


def test_a_token_is_left_alone_where_the_null_expert_is_the_likeliest() -> None:
    router = null_router()
    with torch.no_grad():
        gates = router(X)
    alone = (X @ router.weight.T).argmax(-1) == 4
    assert 0 < alone.sum() < len(X)
    assert torch.equal(gates.weight_TK.any(-1), ~alone)
    torch.testing.assert_close(gates.weight_TK.sum(-1), (~alone).float())
    assert gates.index_TK.max() < 4, "expert numbers stay valid for kernels that read them"


def test_the_others_have_the_gates_that_they_would_have_without_it() -> None:
    router = null_router()
    plain = Router(16, 4, 2, Normalisation.softmax_topk_renorm)
    plain.weight.data.copy_(router.weight[:4])
    gates, used = router(X), router(X).weight_TK.any(-1)
    torch.testing.assert_close(gates.dense()[used], plain(X).dense()[used])
    torch.testing.assert_close(gates.probs_TE, plain(X).probs_TE)


def test_a_token_that_was_left_alone_can_come_back() -> None:
    """Its experts get no gradient, the choice to use them does: that of its soft share."""
    router = null_router()
    gates = router(X)
    alone = ~gates.weight_TK.detach().any(-1)
    found, wanted = (
        torch.autograd.grad(said[alone].sum(), router.weight, retain_graph=True)[0]
        for said in (gates.weight_TK, gates.used_T)
    )
    assert found[4].abs().sum() > 0
    torch.testing.assert_close(found, wanted)


def test_the_share_of_use_is_soft_and_leaves_padding_out() -> None:
    router = null_router()
    gates, keep = router(X), torch.arange(len(X)) % 3 > 0
    probs = (X @ router.weight.T).softmax(-1)
    taken = probs[:, :4].topk(2).values.sum(-1)
    torch.testing.assert_close(gates.used_T, taken / (taken + probs[:, 4]))
    balance, used = routing_losses([gates], keep)
    torch.testing.assert_close(used, gates.used_T[keep].mean())
    torch.testing.assert_close(balance, balance_loss(gates, keep))


def test_the_balance_loss_looks_at_tokens_with_experts_alone() -> None:
    gates = null_router()(X)
    used = gates.weight_TK.detach().any(-1)
    keep = torch.ones(len(X), dtype=torch.bool)
    assert torch.equal(balance_loss(gates, keep), balance_loss(gates, used))


def test_the_penalty_decides_how_many_are_left_alone(tiny_llama, tmp_path: Path) -> None:
    used = []
    for penalty in (0.0, 3.0):
        config = compose(
            *GEOMETRY,
            "method=adafuse",
            "method.null_expert=true",
            f"method.bypass_penalty={penalty}",
            "method.dropout=0",
        )
        adapter, _ = train(
            tiny_llama(), config, tmp_path / str(penalty), knobs(steps=40, save_every_steps=40)
        )
        with torch.no_grad():
            states = torch.randn(500, 32, generator=torch.Generator().manual_seed(0))
            used.append(adapter.token_router(states).used_T.mean().item())
    assert used[1] < used[0]


@pytest.mark.parametrize(("restores", "exact"), [(True, True), (False, False)])
def test_weights_keep_their_drift_only_where_that_is_asked_for(
    restores: bool, exact: bool, tiny_llama
) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse")
    model.to(torch.bfloat16)
    clean = {name: p.clone() for name, p in model.named_parameters()}
    adapter = Adapter(model, config.method, config.experts, 0)
    randomise(adapter, 1, scale=0.3)
    adapter.to_dtype(torch.bfloat16)
    adapter.restores = restores
    adapter.install(strategies.make(StrategyName.switch))
    generate(model, adapter, IDS, None, 40)
    weights = {name.replace(".base.", "."): p for name, p in model.named_parameters()}
    drift = max(float((weights[n].float() - p.float()).abs().max()) for n, p in clean.items())
    size = max(float(p.float().abs().max()) for p in clean.values())
    # the last token's experts are out again: what is left is rounding
    assert (drift == 0) is exact and drift < 0.05 * size
    adapter.remove()
    assert all(torch.equal(p, clean[name]) for name, p in model.named_parameters())
