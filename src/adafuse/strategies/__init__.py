"""How one decode step applies the gated experts; one file per family, all by the protocol in adapters/forward.py.

`prepare(adapter)` once, `enter()` each time the adapter goes in; `decide(gates)` when a token's shared gates are known;
`linear(site, x, gates)` the output of an adapted linear; `mix(experts, x, gates, ...)` the weighted sum of the
experts; `restore()` the weights as `prepare` found them. While decoding, `joints` run instead of the linears that they
cover (joined.py). Next: loop.py, the slowest and plainest.
"""

from __future__ import annotations

from adafuse.adapters.forward import Strategy
from adafuse.config import StrategyName
from adafuse.strategies.dense import Dense
from adafuse.strategies.fused import Fused
from adafuse.strategies.gather import Gather
from adafuse.strategies.loop import Loop, MaskedLoop
from adafuse.strategies.merge import Rebase, SimpleMerge, Switch

_STRATEGIES: dict[StrategyName, type[Strategy]] = {
    StrategyName.loop: Loop,
    StrategyName.masked_loop: MaskedLoop,
    StrategyName.dense: Dense,
    StrategyName.gather: Gather,
    StrategyName.fused: Fused,
    StrategyName.simple_merge: SimpleMerge,
    StrategyName.switch: Switch,
    StrategyName.rebase: Rebase,
}


def make(name: StrategyName) -> Strategy:
    """A fresh strategy; it holds state (packed factors, clean weights), so no two adapters share one."""
    return _STRATEGIES[name]()
