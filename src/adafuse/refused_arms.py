"""Which arms a cell can hold: strategies that cannot apply a method's experts, runtimes that cannot hold a strategy.

In: a `Config`, or a method and a strategy. Out: nothing, or a ValueError of one line with the key and the cure.
"""

from __future__ import annotations

from adafuse.config import (
    Arm,
    Config,
    ExpertKind,
    GateSource,
    Latency,
    Method,
    Routing,
    Runtime,
    StrategyName,
    Task,
)

# PEFT's own code, launched as its users do
PEFT = (StrategyName.peft, StrategyName.peft_merge)
MERGING = (StrategyName.simple_merge, StrategyName.switch, StrategyName.rebase)
# rows of one `fused` launch: beyond them library products read the weights as fast (kernels/README.md)
FUSED_MAX_BATCH = 2


def check_arms(config: Config) -> None:
    """Refuse arms that the cell cannot hold. Raises ValueError."""
    arms = config.arms
    refuse(not arms.run, "arms.run is empty: name at least one arm")
    for name in arms.run:
        refuse(name not in arms.table, f"unknown arm '{name}': choose from {sorted(arms.table)}")
        arm = arms.table[name]
        refuse(
            arm.method not in config.methods,
            f"arm {name}: unknown method '{arm.method}': choose from {sorted(config.methods)}",
        )
        refuse_strategy(config.methods[arm.method], arm.strategy)
        refuse_batch(f"arm {name}: batch", config.batch, arm.strategy)
        _refuse_runtime(name, arm, config.methods[arm.method], config.batch)
        _refuse_gates(name, config.methods[arm.method], config.latency)
    refuse(len(set(arms.run)) < len(arms.run), "arms.run names an arm twice")
    refuse(
        config.task is Task.memory and len(arms.run) > 1,
        "task=memory measures one arm a process: arms.run=[NAME]",
    )
    refuse(
        config.latency.gates is GateSource.distinct and config.experts.count < config.experts.top_k * 2,
        "latency.gates=distinct needs twice as many experts as experts.top_k: a token shares none with the one before",
    )
    _refuse_share(config)


def refuse_strategy(method: Method, strategy: StrategyName) -> None:
    """Raise ValueError where `strategy` cannot apply the experts of `method`."""
    if strategy in MERGING and method.expert_kind is not ExpertKind.lora:
        raise ValueError(
            f"method {method.name} cannot use strategy {strategy.name}: its experts are not linear in the "
            "weight, so they cannot be merged; use loop, dense or gather"
        )
    if strategy in (StrategyName.switch, StrategyName.rebase) and method.routing is Routing.layerwise:
        raise ValueError(
            f"method {method.name} cannot use strategy {strategy.name}: its gates are known only layer by "
            "layer, so one launch cannot merge all; use simple_merge, loop, dense or gather"
        )
    own_gates = method.routing in (Routing.layerwise, Routing.blockwise)
    if strategy is StrategyName.fused and own_gates:
        raise ValueError(
            f"method {method.name} cannot use strategy fused: its kernel must know the experts before it reads the "
            f"input, and routing={method.routing.name} does not; use gather"
        )
    if strategy in PEFT:
        _refuse_peft(method, strategy)


def _refuse_peft(method: Method, strategy: StrategyName) -> None:
    cannot = f"method {method.name} cannot use strategy {strategy.name}"
    refuse(not method.has_experts, f"{cannot}: it has no adapter; use method lora or adafuse")
    refuse(
        strategy is StrategyName.peft and method.routing is not Routing.none,
        f"{cannot}: PEFT has no router; use method lora, or peft_merge",
    )
    refuse(
        strategy is StrategyName.peft_merge and method.routing is not Routing.token,
        f"{cannot}: one merge for all layers needs gates that they share; use method adafuse",
    )
    refuse(
        bool(method.static_targets),
        f"{cannot}: it does not carry LoRA beside the experts; use static_targets=[]",
    )


def refuse_batch(key: str, batch: int, strategy: StrategyName) -> None:
    refuse(
        strategy is StrategyName.fused and batch > FUSED_MAX_BATCH,
        f"{key}={batch} exceeds the {FUSED_MAX_BATCH} rows that strategy fused serves: use gather",
    )


def _refuse_runtime(name: str, arm: Arm, method: Method, batch: int) -> None:
    """Static runtimes launch the same kernels for every token, and the host sees nothing in between."""
    refuse(
        arm.strategy is StrategyName.peft_merge and batch > 1,
        f"arm {name}: strategy peft_merge merges one selection for the whole batch: use batch=1",
    )
    if arm.runtime is Runtime.eager:
        return
    refuse(
        arm.strategy in PEFT,
        f"arm {name}: strategy {arm.strategy.name} is PEFT's own Python, which runs eagerly: use runtime=eager",
    )
    refuse(
        arm.strategy is StrategyName.loop and method.has_experts,
        f"arm {name}: strategy loop waits for the host at every expert, so runtime={arm.runtime.name} cannot capture "
        "it: use masked_loop, the same loop without the waiting",
    )
    merged_per_token = arm.strategy in MERGING and method.routing is not Routing.none
    refuse(
        merged_per_token and arm.runtime is Runtime.compiled,
        f"arm {name}: strategy {arm.strategy.name} rewrites weights that torch.compile takes for constant within a "
        "step, and may use before they are written: use runtime=graph",
    )
    refuse(
        merged_per_token and batch > 1,
        f"arm {name}: strategy {arm.strategy.name} compares the gates of a batch on the host, so "
        f"runtime={arm.runtime.name} needs batch=1",
    )


def _refuse_gates(name: str, method: Method, knobs: Latency) -> None:
    """A table of gates replaces one decision per token; a decision per layer is taken inside the kernels."""
    refuse(
        knobs.gates is not GateSource.router and method.routing in (Routing.layerwise, Routing.blockwise),
        f"arm {name}: latency.gates={knobs.gates.name} replaces one decision for all layers, and method {method.name} "
        "takes many: use arms of adafuse, or latency.gates=router",
    )
    refuse(
        knobs.bypass_share > 0 and method.routing is Routing.token and not method.null_expert,
        f"arm {name}: latency.bypass_share={knobs.bypass_share} leaves tokens to the backbone, which the router of "
        f"method {method.name} cannot: use method={method.name} method.null_expert=true",
    )


def _refuse_share(config: Config) -> None:
    share = config.latency.bypass_share
    key = f"latency.bypass_share={share}"
    refuse(not 0 <= share <= 1, f"{key} must be between 0 and 1: it is the share of tokens without experts")
    refuse(
        share > 0 and config.latency.gates is GateSource.router,
        f"{key} is part of a table of gates, and latency.gates=router has none: use latency.gates=uniform",
    )
    refuse(
        share > 0 and config.task is Task.trace,
        f"{key} mixes two kinds of tokens, and task=trace looks at one: use task=latency",
    )


def refuse(wrong: bool, message: str) -> None:
    """Raise ValueError with `message` if something is `wrong`."""
    if wrong:
        raise ValueError(message)
