"""strategies/merge.py around tokens that are left to the backbone: one restore, and then nothing at all."""

import pytest
import torch

from adafuse import strategies
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.router import Gates
from adafuse.config import Config, StrategyName
from adafuse.strategies import merge
from synthetic.adapters import adapted, one_selection
from synthetic.configurations import GEOMETRY, compose


def no_experts(index: int) -> Gates:
    """A token that is left to the backbone: the numbers of its experts mean nothing."""
    return Gates(torch.full((1, 2), index), torch.zeros(1, 2), torch.full((1, 4), 0.25))


def some_experts(*pair: int) -> Gates:
    return Gates(torch.tensor([pair]), one_selection(0).weight_TK, torch.full((1, 4), 0.25))


def installed(adapter: Adapter, strategy: StrategyName, launched: bool) -> merge.Switch:
    """Ready to decode; `launched`: by the kernel that a GPU launches, in Triton's interpreter."""
    adapter.install(strategies.make(strategy))
    decode = adapter.context.decode
    if launched:
        decode._plan = decode._planned()
    return decode


def without_third_expert(model, config: Config) -> Adapter:
    """Expert 3 is NaN: a gate of zero must not let it in."""
    adapter = adapted(model, config)
    for site in adapter.adapted().values():
        site.experts.lora_A.data[3] = site.experts.lora_B.data[3] = float("nan")
    return adapter


ONE_LAUNCH = pytest.mark.parametrize(
    "strategy", [StrategyName.switch, StrategyName.rebase], ids=lambda s: s.name
)
LAUNCHED = pytest.mark.parametrize("launched", [False, True], ids=["products", "kernel"])


@LAUNCHED
@ONE_LAUNCH
def test_tokens_without_experts_leave_no_trace(strategy, launched, tiny_llama) -> None:
    """Whatever comes before it, a token without experts has the clean weights, and one with experts its own."""
    model, config = tiny_llama(num_hidden_layers=1), compose(*GEOMETRY, "method=adafuse")
    adapter = without_third_expert(model, config)
    clean = [site.base.weight.clone() for site in adapter.adapted().values()]

    def weights_after(*tokens: Gates) -> list[torch.Tensor]:
        decode = installed(adapter, strategy, launched)
        for gates in tokens:
            decode.decide(gates)
        found = [site.base.weight.clone() for site in adapter.adapted().values()]
        adapter.remove()
        return found

    first, last, none = some_experts(0, 2), some_experts(2, 1), no_experts(3)
    # what is added and subtracted in place rounds; what starts from clean weights is exact
    exact = {"rtol": 0.0, "atol": 0.0 if strategy is StrategyName.rebase else 1e-6}
    merged = weights_after(last)
    assert all(map(torch.equal, weights_after(none), clean)), "the first token of all"
    for before in ([none], [first, none], [first, none, none], [none, first, none]):
        torch.testing.assert_close(weights_after(*before), clean, **exact)
        torch.testing.assert_close(weights_after(*before, last), merged, **exact)


@LAUNCHED
@ONE_LAUNCH
def test_nothing_is_written_between_two_tokens_without_experts(strategy, launched, tiny_llama) -> None:
    model, config = tiny_llama(num_hidden_layers=1), compose(*GEOMETRY, "method=adafuse")
    adapter = without_third_expert(model, config)
    weights = [site.base.weight for site in adapter.adapted().values()]
    clean = [weight.clone() for weight in weights]
    decode = installed(adapter, strategy, launched)
    for before in ([], [some_experts(0, 2), no_experts(3)]):
        for gates in before:
            decode.decide(gates)
        for weight in weights:
            weight.fill_(7.0)
        decode.decide(no_experts(3))
        assert all(bool((weight == 7.0).all()) for weight in weights)
        decode.restore()
        assert all(map(torch.equal, weights, clean))
    adapter.remove()
