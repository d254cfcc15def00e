"""An adapter that is installed without the Python interface: transformers' own generate decodes by its strategy too."""

import inspect

import pytest
import torch
from transformers import DynamicCache

from adafuse import strategies
from adafuse.config import StrategyName
from adafuse.engine.decode import generate
from adafuse.strategies.merge import Switch
from synthetic.adapters import adapted, prompt
from synthetic.configurations import GEOMETRY, compose

TOKENS = 8


@pytest.mark.parametrize("strategy", [StrategyName.gather, StrategyName.switch], ids=lambda s: s.name)
def test_generate_is_by_the_strategy_while_it_is_installed(
    strategy: StrategyName, tiny_llama, monkeypatch
) -> None:
    model, switched = tiny_llama(), []
    adapter = adapted(model, compose(*GEOMETRY, "method=adafuse"))
    own, decide = model.generate, Switch.decide
    monkeypatch.setattr(Switch, "decide", lambda self, gates: (switched.append(1), decide(self, gates))[1])
    options = {"max_new_tokens": TOKENS, "do_sample": False}
    plain = model.generate(prompt(), **options)
    with adapter.installing(strategies.make(strategy)):
        theirs = model.generate(prompt(), **options)
        assert len(switched) == (TOKENS - 1 if strategy is StrategyName.switch else 0)
        assert torch.equal(theirs, generate(model, adapter, prompt(), None, TOKENS))
        assert inspect.signature(model.generate).parameters.keys() >= {"inputs", "generation_config"}
    assert model.generate == own and torch.equal(model.generate(prompt(), **options), plain)
    assert not torch.equal(plain, theirs)


def test_a_forward_of_ones_own_is_left_alone(tiny_llama) -> None:
    """Whoever decodes by hand says where decode steps happen: the harness does."""
    model = tiny_llama()
    adapter = adapted(model, compose(*GEOMETRY, "method=adafuse"))
    with adapter.installing(strategies.make(StrategyName.switch)), torch.no_grad():
        cache = DynamicCache()
        for ids in (prompt(), prompt()[:, :1]):
            model(input_ids=ids, past_key_values=cache, use_cache=True)
            assert not adapter.context.decoding and not model._forward_pre_hooks


def test_a_server_of_batches_is_refused(tiny_llama) -> None:
    model = tiny_llama()
    with (
        adapted(model, compose(*GEOMETRY, "method=adafuse")).installing(strategies.make(StrategyName.gather)),
        pytest.raises(ValueError, match="knows no experts"),
    ):
        model.generate_batch([[5, 6]])
