"""What PEFT's arms cannot do is refused in one line: foreign routers, other runtimes, batches that would merge."""

import pytest

from adafuse.config import Runtime, StrategyName
from adafuse.engine.make import make
from synthetic.adapters import prompt
from synthetic.peft import ADAFUSE, adapted, checks_of, layers_of


def test_one_selection_serves_one_sequence(tiny_llama) -> None:
    model = tiny_llama()
    checks = {check.check: check for check in checks_of(adapted(model, ADAFUSE), ADAFUSE, prompt(rows=2))}
    assert "merges one selection for the whole batch: use batch=1" in checks["runs"].detail
    assert all(check.passed for name, check in checks.items() if name != "runs")
    assert not layers_of(model)


STATIC = ["method.static_targets=[q_proj]", "method.static_rank=4", "method.static_alpha=8"]
REFUSED = [
    (StrategyName.peft, ["method=adafuse"], Runtime.eager, "PEFT has no router; use method lora"),
    (StrategyName.peft_merge, ["method=mola"], Runtime.eager, "gates that they share; use method adafuse"),
    (StrategyName.peft_merge, ["method=pesc"], Runtime.eager, "gates that they share; use method adafuse"),
    (StrategyName.peft_merge, ["method=mixlora"], Runtime.eager, "gates that they share; use method adafuse"),
    (StrategyName.peft_merge, ["method=lora"], Runtime.eager, "gates that they share; use method adafuse"),
    (StrategyName.peft, ["method=lora"], Runtime.graph, "runs eagerly: use runtime=eager"),
    (StrategyName.peft_merge, ["method=adafuse"], Runtime.compiled, "runs eagerly: use runtime=eager"),
    (StrategyName.peft_merge, ["method=adafuse", *STATIC], Runtime.eager, "use static_targets="),
]


@pytest.mark.parametrize(("strategy", "overrides", "runtime", "message"), REFUSED)
def test_what_peft_cannot_do_is_refused(strategy, overrides, runtime, message, tiny_llama) -> None:
    adapter = adapted(tiny_llama(), (strategy, overrides))
    with pytest.raises(ValueError, match=message) as refusal:
        make(adapter.model, adapter, strategy, runtime, 64)
    assert "\n" not in str(refusal.value)


def test_a_backbone_without_an_adapter_is_refused(tiny_llama) -> None:
    with pytest.raises(ValueError, match="needs an adapter: use a method with experts"):
        make(tiny_llama(), None, StrategyName.peft, Runtime.eager, 64)
