"""A gate that reads the token before: what it reads in a prompt, while decoding, in a fit, and where it may not."""

import pytest
import torch
from torch.nn import functional as F
from transformers import DynamicCache

from adafuse import strategies
from adafuse.adapters import previous, reference
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.router import Gates, Router
from adafuse.bench.checks import run_checks
from adafuse.config import OF_PREVIOUS, RouterInput, Runtime, StrategyName
from adafuse.engine.decode import forward_logits, generate
from adafuse.engine.make import make
from synthetic.adapters import adapted, prompt
from synthetic.configurations import GEOMETRY, compose

TOKENS = 8
PADS = 5
OPTIONS = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False}
POINTS = pytest.mark.parametrize("point", OF_PREVIOUS, ids=lambda point: point.name)
WAYS = [
    *((strategy, Runtime.eager) for strategy in ("dense", "gather", "switch", "rebase")),
    *((strategy, Runtime.graph) for strategy in ("gather", "switch", "rebase")),
]


def adapter_on(model, point: RouterInput, *overrides: str) -> Adapter:
    return adapted(
        model, compose(*GEOMETRY, "method=adafuse", f"method.router_input={point.name}", *overrides)
    )


def ragged(ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first row is shorter by PADS tokens, in whose place is padding; and the mask. The id of padding itself is
    embedded as zeros, whose state is zeros too, and would tell nothing.
    """
    ids, mask = ids.clone(), torch.ones_like(ids)
    ids[0, :PADS], mask[0, :PADS] = 5, 0
    return ids, mask


def gates_of(adapter: Adapter, ids_BS: torch.Tensor, states_BSD: torch.Tensor) -> Gates:
    """What the router says where the last pass made these states of a prompt."""
    x_BSD = torch.cat([torch.ones_like(states_BSD[:, :1]), states_BSD[:, :-1]], dim=1)
    if adapter.method.router_input is RouterInput.previous_and_embedding:
        both = x_BSD, adapter.model.get_input_embeddings()(ids_BS)
        x_BSD = sum(F.rms_norm(one, one.shape[-1:], eps=1e-6) for one in both)
    return adapter.token_router(x_BSD.flatten(0, 1))


@POINTS
@pytest.mark.parametrize("fits", [False, True], ids=["in service", "in a fit"])
def test_a_prompt_is_read_in_the_second_of_three_passes(point: RouterInput, fits: bool, tiny_llama) -> None:
    """In a fit too, whose dropout they know nothing of."""
    model, ids = tiny_llama(), prompt(2)
    adapter = adapter_on(model, point, "method.dropout=0.5")
    with torch.no_grad():
        draft = gates_of(adapter, ids, model.model(input_ids=ids).last_hidden_state)
        with adapter.installing(strategies.make(StrategyName.gather)):
            adapter.context.gates = draft
            wanted = gates_of(adapter, ids, model.model.forward(input_ids=ids).last_hidden_state)
    model.train(fits)
    with adapter.installing(None if fits else strategies.make(StrategyName.gather)):
        with adapter.collecting() as said:
            model(ids, use_cache=False)
        assert all(module.training == fits for module in model.modules())
    ((_, gates),) = said
    torch.testing.assert_close(gates.probs_TE, wanted.probs_TE)
    assert not torch.allclose(wanted.probs_TE, draft.probs_TE, atol=1e-3)
    assert gates.probs_TE.requires_grad == fits and not gates.draft.probs_TE.requires_grad
    named = adapter.by_name(said, 2)
    assert named.keys() == {"token", "token.draft"}
    assert torch.equal(named["token.draft"].flatten(0, 1), draft.index_TK)


@POINTS
@pytest.mark.parametrize("positions", [True, False], ids=["positions", "a mask alone"])
def test_padding_is_nothing_that_was_before(point: RouterInput, positions: bool, tiny_llama) -> None:
    model = tiny_llama()
    ids, mask = ragged(prompt(2))
    adapter, seen = adapter_on(model, point), []
    with adapter.installing(strategies.make(StrategyName.gather)), torch.no_grad():
        for tokens, own in ((ids, mask), (ids[:1, PADS:], None)):
            with adapter.collecting() as said:
                # without positions the padded tokens stand at others, but the first one reads the same
                forward_logits(model, tokens, own) if positions else model(tokens, attention_mask=own)
            seen.append(said[0][1].probs_TE.view(*tokens.shape, -1))
    behind, alone = seen[0][0, PADS:], seen[1][0]
    torch.testing.assert_close(behind[:1], alone[:1])
    if positions:
        torch.testing.assert_close(behind, alone)


@POINTS
@pytest.mark.parametrize(("strategy", "runtime"), WAYS, ids=str)
def test_decoding_is_that_of_the_reference(
    point: RouterInput, strategy: str, runtime: Runtime, tiny_llama
) -> None:
    model = tiny_llama()
    decoder = make(model, adapter_on(model, point), StrategyName[strategy], runtime, 40)
    found = run_checks(decoder, reference.float_view(model), prompt(), TOKENS).checks
    assert all(check.passed for check in found), [check for check in found if not check.passed]


@pytest.mark.parametrize("runtime", [Runtime.eager, Runtime.graph], ids=lambda r: r.name)
def test_a_draft_of_other_experts_is_followed_and_found(runtime: Runtime, tiny_llama, monkeypatch) -> None:
    """The reference takes a draft's choices as they come, and says by how much they miss its own."""
    real, says = Router.forward, iter(range(99))
    model = tiny_llama()
    decoder = make(model, adapter_on(model, RouterInput.previous_token), StrategyName.gather, runtime, 40)

    def worse(router: Router, x_TI: torch.Tensor) -> Gates:
        gates = real(router, x_TI)
        # every other call is a draft's, until decoding begins
        if len(x_TI) == 1 or next(says) % 2:
            return gates
        index_TK = gates.probs_TE.topk(router.top_k, largest=False).indices
        weight_TK = gates.probs_TE.gather(-1, index_TK)
        return Gates(index_TK, weight_TK / weight_TK.sum(-1, keepdim=True), gates.probs_TE)

    monkeypatch.setattr(Router, "forward", worse)
    checked = run_checks(decoder, reference.float_view(model), prompt(), TOKENS)
    red = [check for check in checked.checks if not check.passed]
    assert {check.check for check in red} == {"routing_logits", "routing_whole", "routing_padding"}
    assert all(check.detail.endswith("by token.draft") for check in red)
    assert checked.choices.keys() == {"token"}


@pytest.mark.parametrize("runtime", [Runtime.eager, Runtime.graph], ids=lambda r: r.name)
def test_a_state_that_is_one_token_old_is_found(runtime: Runtime, tiny_llama, monkeypatch) -> None:
    """The mutation: what a decode step reads was there before the last one."""
    states = {}
    real = previous._of_cache
    monkeypatch.setattr(
        previous, "_of_cache", lambda cache, rows: states.setdefault(id(cache), real(cache, rows).clone())
    )
    model = tiny_llama()
    decoder = make(model, adapter_on(model, RouterInput.previous_token), StrategyName.gather, runtime, 40)
    found = run_checks(decoder, reference.float_view(model), prompt(), TOKENS).checks
    assert {"logits", "routing_logits"} <= {check.check for check in found if not check.passed}


@POINTS
@pytest.mark.parametrize("runtime", [Runtime.eager, Runtime.graph], ids=lambda r: r.name)
def test_rows_behind_padding_decode_as_they_do_alone(
    point: RouterInput, runtime: Runtime, tiny_llama
) -> None:
    model = tiny_llama()
    ids, mask = ragged(prompt(2))
    adapter, logits = adapter_on(model, point), []
    for tokens, own in ((ids, mask), (ids[:1, PADS:], None), (ids[1:], None)):
        decoder = make(model, adapter, StrategyName.gather, runtime, 40)
        with decoder.installed():
            steps = [decoder.start(tokens, own)]
            with decoder.decoding():
                # the same tokens in all three: a tie would part them
                steps += [decoder.step(torch.full_like(tokens[:, :1], 7 + step)) for step in range(TOKENS)]
        logits.append(torch.stack(steps, dim=1))
    torch.testing.assert_close(logits[0], torch.cat(logits[1:]), atol=1e-4, rtol=1e-4)


def test_a_block_that_is_decoded_again_begins_where_the_prompt_ended(tiny_llama) -> None:
    model = tiny_llama()
    decoder = make(
        model, adapter_on(model, RouterInput.previous_token), StrategyName.gather, Runtime.graph, 40
    )
    with decoder.installed():
        first = decoder.start(prompt()).argmax(-1, keepdim=True)
        steps, state = [], decoder.cache.state_B1D
        for _ in range(2):
            with decoder.decoding():
                steps.append([decoder.step(first), decoder.step(first)])
            decoder.again(prompt())
        fresh = decoder.start(prompt(length=9)), decoder.step
        with decoder.decoding():
            steps[0].append(decoder.step(first))
    assert decoder.cache.state_B1D is state, "a captured step reads where it was"
    assert torch.equal(steps[0][0], steps[1][0]) and torch.equal(steps[0][1], steps[1][1])
    other = make(model, decoder.adapter, StrategyName.gather, Runtime.graph, 40)
    with other.installed():
        assert torch.equal(other.start(prompt(length=9)), fresh[0])
        with other.decoding():
            assert torch.equal(other.step(first), steps[0][2])


@POINTS
@pytest.mark.parametrize("strategy", [StrategyName.gather, StrategyName.rebase], ids=lambda s: s.name)
def test_transformers_generate_is_right(point: RouterInput, strategy: StrategyName, tiny_llama) -> None:
    model = tiny_llama()
    adapter = adapter_on(model, point)
    ids, mask = ragged(prompt(2)) if strategy is StrategyName.gather else (prompt(), None)
    with adapter.installing(strategies.make(strategy)):
        options = OPTIONS if mask is None else OPTIONS | {"attention_mask": mask}
        assert torch.equal(model.generate(ids, **options), generate(model, adapter, ids, mask, TOKENS))


def test_a_state_lies_with_its_cache(tiny_llama) -> None:
    """Two sequences that take turns, and one that was begun without the adapter."""
    model = tiny_llama()
    adapter = adapter_on(model, RouterInput.previous_token)
    plain = DynamicCache()
    model(prompt(), past_key_values=plain)
    with adapter.installing(strategies.make(StrategyName.gather)), torch.no_grad():
        adapter.host.watch()
        prompts, logits = [prompt(), prompt().flip(1)], []
        for turns in ([0, 0, 1, 1], [0, 1, 0, 1]):
            caches, found = [DynamicCache(), DynamicCache()], ([], [])
            for ids, cache in zip(prompts, caches, strict=True):
                model(ids, past_key_values=cache)
            for turn in turns:
                found[turn].append(model(torch.tensor([[9]]), past_key_values=caches[turn]).logits)
            logits.append([one for own in found for one in own])
        assert all(map(torch.equal, *logits)) and not torch.equal(logits[0][0], logits[0][2])
        caches[1].crop(-2)
        for ids, cache, said in (
            (prompt()[:, :1], plain, "this cache does not hold for 1 rows"),
            (prompt()[:, :1], caches[1], "this cache does not hold for 1 rows"),
            (prompt(), caches[0], "only decode steps go on from a cache"),
        ):
            with pytest.raises(ValueError, match=said) as refusal:
                model(ids, past_key_values=cache)
            assert "\n" not in str(refusal.value)
        with pytest.raises(ValueError, match="num_beams takes rows"):
            model.generate(prompt(), num_beams=2, **OPTIONS)


@pytest.mark.parametrize("point", [*OF_PREVIOUS, RouterInput.embedding], ids=lambda point: point.name)
def test_a_fit_teaches_the_router_and_not_the_backbone(point: RouterInput, tiny_llama) -> None:
    """Recomputed or not: the passes before keep nothing."""
    grads = []
    for recomputes in (False, True):
        model = tiny_llama()
        adapter = adapter_on(model, point, "method.dropout=0")
        own = {id(parameter) for parameter in adapter.parameters()}
        adapter.install()
        model.train()
        if recomputes:
            model.activation_checkpointing_enable()
        still = model.model.layers[1].mlp.eval()
        model(prompt(2), labels=prompt(2)).loss.backward()
        assert model.model.layers[1].training and not still.training, "as whoever fits has left it"
        backbone = [p for p in model.parameters() if id(p) not in own]
        assert backbone and all(p.grad is None for p in backbone)
        grads.append([p.grad for p in adapter.parameters()])
        adapter.remove()
    assert all(grad.any() for grad in grads[0])
    for plainly, recomputed in zip(*grads, strict=True):
        torch.testing.assert_close(plainly, recomputed)
