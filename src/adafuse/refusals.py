"""Combinations that cannot work, each refused with one line that names the key and the cure.

In: a `Config`, or a method and a strategy. Out: nothing, or a ValueError, before anything heavy is imported.
Next: cell.py, for what is left.
"""

from __future__ import annotations

from collections.abc import Collection
from operator import attrgetter

from adafuse.config import (
    LINEARS,
    Arm,
    Config,
    ExpertKind,
    Experts,
    GateSource,
    Latency,
    Method,
    Normalisation,
    Routing,
    Runtime,
    StrategyName,
    Task,
    Weights,
)
from adafuse.data.families import LEVELS
from adafuse.kernels.config import FUSED_MAX_BATCH

# PEFT's own code, launched as its users do
PEFT = (StrategyName.peft, StrategyName.peft_merge)
MERGING = (StrategyName.simple_merge, StrategyName.switch, StrategyName.rebase)
# what task=kernel can time (bench/kernel_work.py), and the linears that a merge writes
KERNELS = (
    *("switch", "rebase", "shrink_expand", "expand_all", "gather", "gather_routed"),
    *("dense", "fused", "linear", "library_linear", "route"),
)
KERNEL_TARGETS = {"qv": ("q_proj", "v_proj"), "qkvo": LINEARS[:4], "all": LINEARS}

AT_LEAST = {
    **dict.fromkeys(("experts.rank", "experts.count", "experts.top_k", "batch", "context"), 1),
    **{
        f"{stage}.{key}": 1
        for stage in ("pretrain", "train")
        for key in ("steps", "batch", "accumulation", "max_length", "save_every_steps")
    },
    "latency.block_tokens": 64,
    "latency.rounds": 2,
    "latency.check_tokens": 4,  # the check behind padding holds four positions against the reference
    **dict.fromkeys(("kernel.replays", "drift.refresh_every", "drift.prompts"), 1),
}
EACH_AT_LEAST_ONE = ("kernel.ranks", "kernel.tokens", "drift.switches")
NOT_EMPTY = {
    "experts.targets": f"choose from {list(LINEARS)}",
    "arms.run": "name at least one arm",
    "suite.tasks": "name at least one lm-eval task",
}
LAYER_BY_LAYER = (Routing.layerwise, Routing.blockwise)


def validate(config: Config) -> None:
    """Refuse what cannot work, naming the key and the cure. Raises ValueError."""
    _check_values(config)
    for method in config.methods.values():
        _check_method(method, config.experts)
    _check_arms(config)
    _check_evaluation(config)
    refuse(
        config.task is Task.drift and config.method.routing is not Routing.token,
        f"method {config.method.name}: task=drift merges one selection into all linears, so routing must be token: "
        "use method=adafuse",
    )


def refuse_strategy(method: Method, strategy: StrategyName) -> None:
    """Raise ValueError where `strategy` cannot apply the experts of `method`."""
    cannot = f"method {method.name} cannot use strategy {strategy.name}"
    refuse(
        strategy in MERGING and method.expert_kind is not ExpertKind.lora,
        f"{cannot}: its experts are not linear in the weight, so they cannot be merged; use loop, dense or gather",
    )
    refuse(
        strategy in (StrategyName.switch, StrategyName.rebase) and method.routing is Routing.layerwise,
        f"{cannot}: its gates are known only layer by layer, so one launch cannot merge all; "
        "use simple_merge, loop, dense or gather",
    )
    refuse(
        strategy is StrategyName.fused and method.routing in LAYER_BY_LAYER,
        f"{cannot}: its kernel must know the experts before it reads the input, and routing={method.routing.name} "
        "does not; use gather",
    )
    refuse(
        strategy in PEFT and not method.has_experts,
        f"{cannot}: it has no adapter; use method lora or adafuse",
    )
    refuse(
        strategy is StrategyName.peft and method.routing is not Routing.none,
        f"{cannot}: PEFT has no router; use method lora, or peft_merge",
    )
    refuse(
        strategy is StrategyName.peft_merge and method.routing is not Routing.token,
        f"{cannot}: one merge for all layers needs gates that they share; use method adafuse",
    )
    refuse(
        strategy in PEFT and bool(method.static_targets),
        f"{cannot}: it does not carry LoRA beside the experts; use static_targets=[]",
    )


def refuse_device(config: Config, where: str) -> None:
    """Raise ValueError where an arm or a kernel needs a GPU and `where` is none; called before anything is loaded."""
    if where == "cuda":
        return
    refuse(
        config.task is Task.kernel,
        "task=kernel times GPU kernels and this machine has no CUDA device: run it on one (make test runs the same "
        "kernels here, in Triton's interpreter)",
    )
    if config.task not in (Task.latency, Task.memory, Task.trace):
        return
    for name in config.arms.run:
        runtime = config.arms.table[name].runtime
        refuse(
            runtime is not Runtime.eager,
            f"arm {name}: runtime={runtime.name} captures a CUDA graph and this machine has no CUDA device: "
            "use arms=paper or arms=controls, whose arms are eager",
        )


def refuse_untrained(config: Config) -> None:
    """Raise ValueError where accuracy is asked of random weights; speed may be, so the configuration is valid."""
    random = config.model.path is None and config.model.weights is Weights.random
    refuse(
        random and config.task in (Task.train, Task.evaluate),
        f"task={config.task.name} on random weights means nothing: set model=small, model=tiny or model.path=FOLDER",
    )


def refuse(wrong: bool, message: str) -> None:
    """Raise ValueError with `message` if something is `wrong`."""
    if wrong:
        raise ValueError(message)


def _check_values(config: Config) -> None:
    """What can be seen of one key at a time, and of two in a group."""
    # first, because suite.tasks are the families where nobody names them
    refuse(not config.data.families and not config.data.path, "data.families is empty: name at least one")
    for key, cure in NOT_EMPTY.items():
        refuse(not attrgetter(key)(config), f"{key} is empty: {cure}")
    for key, least in AT_LEAST.items():
        refuse(attrgetter(key)(config) < least, f"{key} must be at least {least}")
    for key in EACH_AT_LEAST_ONE:
        refuse(min(attrgetter(key)(config), default=0) < 1, f"{key} must be numbers of at least 1")
    experts, switches = config.experts, config.drift.switches
    _refuse_unknown("experts.targets", experts.targets, LINEARS)
    _refuse_unknown("kernel.kernels", config.kernel.kernels, KERNELS)
    _refuse_unknown("kernel.targets", config.kernel.targets, KERNEL_TARGETS)
    refuse(
        experts.top_k > experts.count,
        f"experts.top_k={experts.top_k} exceeds experts.count={experts.count}",
    )
    refuse(
        switches != sorted(set(switches)), "drift.switches must rise: it is one sequence, measured on its way"
    )
    refuse(config.data.level not in LEVELS, f"data.level={config.data.level}: choose from {list(LEVELS)}")
    refuse(config.device not in ("auto", "cpu", "cuda"), "device must be auto, cpu or cuda")


def _check_method(method: Method, experts: Experts) -> None:
    where = f"method {method.name}:"
    _refuse_unknown(f"{where} expert_targets", method.expert_targets or [], LINEARS)
    _refuse_unknown(f"{where} static_targets", method.static_targets, LINEARS)
    _check_quarters(method, experts)
    blockwise = method.routing is Routing.blockwise
    refuse(
        blockwise != (method.expert_kind in (ExpertKind.mlp_lora, ExpertKind.bottleneck)),
        f"{where} routing=blockwise goes with expert_kind mlp_lora or bottleneck, and they with it",
    )
    plain = method.routing is Routing.token and method.normalisation is Normalisation.softmax_topk_renorm
    refuse(
        method.null_expert and not plain,
        f"{where} null_expert leaves a whole token to the backbone, so it needs routing=token and "
        "normalisation=softmax_topk_renorm: use method=adafuse",
    )
    refuse(
        method.router_norm and method.routing is not Routing.token,
        f"{where} router_norm is of the one router that decides for all layers: use method=adafuse",
    )
    refuse(
        method.bypass_penalty != 0 and not method.null_expert,
        f"{where} bypass_penalty without null_expert=true does nothing",
    )
    refuse(
        method.first_expert_block > 0 and blockwise,
        f"{where} first_expert_block is for experts on linears; routing=blockwise has them on MLPs",
    )
    refuse(
        method.full and method.has_experts,
        f"{where} full=true trains the backbone itself, so expert_targets must be []",
    )
    refuse(
        method.expert_kind is ExpertKind.bottleneck and method.bottleneck_dim < 1,
        f"{where} bottleneck_dim must be at least 1",
    )


def _check_quarters(method: Method, experts: Experts) -> None:
    where, quarters = f"method {method.name}:", method.experts_by_quarter
    if quarters is None:
        return
    refuse(len(quarters) != 4, f"{where} experts_by_quarter needs four numbers")
    refuse(
        min(quarters) < experts.top_k,
        f"{where} experts_by_quarter={quarters} has fewer than experts.top_k={experts.top_k}",
    )
    refuse(
        method.routing is not Routing.layerwise,
        f"{where} experts_by_quarter needs routing=layerwise (a shared gate counts once)",
    )


def _check_arms(config: Config) -> None:
    """Refuse arms that the cell cannot hold."""
    arms, methods = config.arms, config.methods
    for name in arms.run:
        refuse(name not in arms.table, f"unknown arm '{name}': choose from {sorted(arms.table)}")
        arm = arms.table[name]
        refuse(
            arm.method not in methods,
            f"arm {name}: unknown method '{arm.method}': choose from {sorted(methods)}",
        )
        refuse_strategy(methods[arm.method], arm.strategy)
        _refuse_batch(f"arm {name}: batch", config.batch, arm.strategy)
        _refuse_runtime(f"arm {name}:", arm, methods[arm.method], config.batch)
        _refuse_gates(f"arm {name}:", methods[arm.method], config.latency)
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


def _check_evaluation(config: Config) -> None:
    strategy = config.evaluate_strategy
    refuse_strategy(config.method, strategy)
    refuse(
        strategy in PEFT,
        "evaluate_strategy=peft times PEFT's own code and is no way to evaluate: use dense",
    )
    refuse(
        not config.evaluate_restore and strategy is not StrategyName.switch,
        "evaluate_restore=false is about what in-place merging leaves in the weights: use evaluate_strategy=switch",
    )
    if config.task is Task.evaluate:
        _refuse_batch("suite.batch", config.suite.batch, strategy)


def _refuse_unknown(key: str, names: Collection[str], known: Collection[str]) -> None:
    unknown = [name for name in names if name not in known]
    refuse(bool(unknown), f"{key} has {unknown}: choose from {list(known)}")


def _refuse_batch(key: str, batch: int, strategy: StrategyName) -> None:
    refuse(
        strategy is StrategyName.fused and batch > FUSED_MAX_BATCH,
        f"{key}={batch} exceeds the {FUSED_MAX_BATCH} rows that strategy fused serves: use gather",
    )


def _refuse_runtime(where: str, arm: Arm, method: Method, batch: int) -> None:
    """Static runtimes launch the same kernels for every token, and the host sees nothing in between."""
    strategy = f"{where} strategy {arm.strategy.name}"
    refuse(
        arm.strategy is StrategyName.peft_merge and batch > 1,
        f"{strategy} merges one selection for the whole batch: use batch=1",
    )
    if arm.runtime is Runtime.eager:
        return
    refuse(
        arm.strategy in PEFT,
        f"{strategy} is PEFT's own Python, which runs eagerly: use runtime=eager",
    )
    refuse(
        arm.strategy is StrategyName.loop and method.has_experts,
        f"{strategy} waits for the host at every expert, so runtime={arm.runtime.name} cannot capture it: "
        "use masked_loop, the same loop without the waiting",
    )
    merged_per_token = arm.strategy in MERGING and method.routing is not Routing.none
    refuse(
        merged_per_token and arm.runtime is Runtime.compiled,
        f"{strategy} rewrites weights that torch.compile takes for constant within a step, and may use before they "
        "are written: use runtime=graph",
    )
    refuse(
        merged_per_token and batch > 1,
        f"{strategy} compares the gates of a batch on the host, so runtime={arm.runtime.name} needs batch=1",
    )


def _refuse_gates(where: str, method: Method, knobs: Latency) -> None:
    """A table of gates replaces one decision per token; a decision per layer is taken inside the kernels."""
    refuse(
        knobs.gates is not GateSource.router and method.routing in LAYER_BY_LAYER,
        f"{where} latency.gates={knobs.gates.name} replaces one decision for all layers, and method {method.name} "
        "takes many: use arms of adafuse, or latency.gates=router",
    )
    refuse(
        knobs.bypass_share > 0 and method.routing is Routing.token and not method.null_expert,
        f"{where} latency.bypass_share={knobs.bypass_share} leaves tokens to the backbone, which the router of "
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
