"""Parameters counted from sizes are those of the modules, and equal budgets are equal within a rank's step."""

import pytest

from adafuse.adapters.adapter import Adapter
from adafuse.adapters.geometry import at_equal_budget, trainable_parameters
from adafuse.config import Config
from synthetic.configurations import METHODS, compose


def test_counted_parameters_are_those_of_the_modules(variant: Config, tiny_llama) -> None:
    model = tiny_llama()
    adapter = Adapter(model, variant.method, variant.experts, 0)
    counted = trainable_parameters(variant.method, variant.experts, model.config.to_dict())
    assert counted == sum(p.numel() for p in adapter.parameters())


@pytest.mark.parametrize("method", METHODS)
def test_an_equal_budget_is_as_near_as_one_rank_allows(method: str) -> None:
    config = compose("profile=gpu", "model=small", "experts=all_r8", f"method={method}", "budget=equal")
    shape = config.model.shape
    target = trainable_parameters(config.methods["lora"], config.experts, shape)
    ours = trainable_parameters(config.method, config.experts, shape)
    assert abs(ours / target - 1) < 0.07
    assert at_equal_budget(config.method, config.experts, shape, target) == config.method


def test_scaling_stays_that_of_the_method() -> None:
    for method in ("moral", "mixlora", "pesc"):
        plain = compose("model=small", f"method={method}").method
        equal = compose("model=small", f"method={method}", "budget=equal").method
        assert equal != plain
        if equal.rank:
            assert equal.alpha / equal.rank == 2
        if equal.static_rank:
            ratio = plain.static_alpha / plain.static_rank
            assert equal.static_alpha / equal.static_rank == pytest.approx(ratio)


def test_the_backbone_and_full_fine_tuning_have_no_rank_to_move() -> None:
    for method in ("base", "full"):
        assert compose(f"method={method}", "budget=equal").method == compose(f"method={method}").method
