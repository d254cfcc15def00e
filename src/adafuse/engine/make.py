"""A decoder of a strategy and a runtime.

In: a model, its adapter (or None). Out: a `Decoder`, not installed yet. Next: decoders.py, graph.py, lean.py, peft.py.
"""

from __future__ import annotations

from torch import nn

from adafuse.adapters.adapter import Adapter
from adafuse.config import Runtime, StrategyName
from adafuse.engine.decoders import Decoder, Eager
from adafuse.engine.graph import Static
from adafuse.refusals import PEFT, refuse_strategy


def make(
    model: nn.Module, adapter: Adapter | None, strategy: StrategyName, runtime: Runtime, length: int
) -> Decoder:
    """A decoder for at most `length` tokens, prompt included. Raises ValueError, one line, for what PEFT cannot do."""
    if strategy in PEFT:
        return _of_peft(model, adapter, strategy, runtime)
    if runtime is Runtime.eager:
        return Eager(model, adapter, strategy)
    if runtime is Runtime.lean:
        # there is no Triton without Linux, and no other runtime asks for it here
        from adafuse.engine.lean import Lean

        return Lean(model, adapter, strategy, length)
    return Static(model, adapter, strategy, runtime, length)


def _of_peft(model: nn.Module, adapter: Adapter | None, strategy: StrategyName, runtime: Runtime) -> Decoder:
    if adapter is None:
        raise ValueError(
            f"strategy {strategy.name} needs an adapter: use a method with experts, such as lora"
        )
    refuse_strategy(adapter.method, strategy)
    if runtime is not Runtime.eager:
        raise ValueError(
            f"strategy {strategy.name} is PEFT's own Python, which runs eagerly: use runtime=eager"
        )
    # PEFT takes seconds to import, and two arms alone need it
    from adafuse.engine.peft import Peft

    return Peft(model, adapter, strategy)
