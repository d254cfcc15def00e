"""Combinations that cannot work, each refused with one line that names the key and the cure.

In: a `Config`, or a method and a strategy. Out: nothing, or a ValueError, before anything heavy is imported.
Next: cell.py, for what is left.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Collection, Iterable, Iterator
from dataclasses import asdict
from itertools import chain
from operator import attrgetter
from typing import Any

from adafuse.config import (
    LAYER_BY_LAYER,
    LINEARS,
    OF_PREVIOUS,
    Arm,
    Config,
    ExpertKind,
    Experts,
    GateSource,
    Method,
    Normalisation,
    RouterInput,
    Routing,
    Runtime,
    StrategyName,
    Task,
    Weights,
)
from adafuse.data.families import LEVELS
from adafuse.distributed import PROCESSES, SHARDED, refuse_sharding
from adafuse.kernels.config import FUSED_MAX_BATCH

# PEFT's own code, launched as its users do
PEFT = (StrategyName.peft, StrategyName.peft_merge)
MERGING = (StrategyName.simple_merge, StrategyName.switch, StrategyName.rebase)
# what runtime lean carries: rows of a step, and strategies ("dense" for the backbone alone)
LEAN_MAX_BATCH = 64
LEAN = (StrategyName.gather, StrategyName.switch, StrategyName.rebase)
# what task=kernel can time (bench/kernel_work.py), and the linears that a merge writes
KERNELS = (
    *("switch", "rebase", "shrink_expand", "expand_all", "gather", "gather_routed"),
    *("dense", "fused", "linear", "library_linear", "route"),
)
KERNEL_TARGETS = {"qv": ("q_proj", "v_proj"), "qkvo": LINEARS[:4], "all": LINEARS}

# what a number may be: beyond it some library overflows, long before a machine is large enough
MOST = 2**31 - 1
# below nothing, these have a rule of their own, or none
HAVE_BOUNDS = ("alpha", "bypass_share", "blocks_per_decision")
AT_LEAST = {
    **dict.fromkeys(("experts.rank", "experts.count", "experts.top_k", "batch", "context", "suite.batch"), 1),
    **dict.fromkeys(("layer.runs", "layer.ranks", "layer.sequence_lengths"), 1),
    **{
        f"{stage}.{key}": 1
        for stage in ("pretrain", "train")
        for key in ("steps", "batch", "accumulation", "max_length", "save_every_steps")
    },
    "latency.block_tokens": 64,
    "latency.rounds": 2,
    "latency.settle_tokens": 1,
    "latency.check_tokens": 4,  # the check behind padding holds four positions against the reference
    **dict.fromkeys(("kernel.replays", "kernel.ranks", "kernel.tokens"), 1),
    **dict.fromkeys(("drift.switches", "drift.refresh_every", "drift.prompts"), 1),
}
NOT_EMPTY = {
    "experts.targets": f"choose from {list(LINEARS)}",
    "arms.run": "name at least one arm",
    "suite.tasks": "name at least one lm-eval task",
    "runs_dir": "name a folder for what runs leave",
}
ONE_OF: dict[str, Collection[Any]] = {"data.level": LEVELS, "device": ("auto", "cpu", "cuda")}
SOME_OF: dict[str, Collection[str]] = {
    "experts.targets": LINEARS,
    "kernel.kernels": KERNELS,
    "kernel.targets": KERNEL_TARGETS,
}


def validate(config: Config) -> None:
    """Refuse what cannot work, naming the key and the cure. Raises ValueError."""
    _refuse(chain(_of_empty(config), _of_numbers(config), _of_single_keys(config)))
    _refuse(chain(_of_values(config), _of_text(config)))
    for method in config.methods.values():
        faults = chain(_of_targets(method, config.experts), _of_method(method))
        _refuse(f"method {method.name}: {wrong}" for wrong in faults)
    _refuse(_of_arms(config))
    for name, arm in config.arms.chosen.items():
        method = config.methods[arm.method]
        # a fit or an evaluation of a method that some arm cannot run is none of that arm's
        if config.task not in (Task.pretrain, Task.train, Task.evaluate):
            refuse_strategy(method, arm.strategy)
        _refuse(f"arm {name}: {wrong}" for wrong in _of_arm(arm, method, config))
    refuse_strategy(config.method, config.evaluate_strategy)
    _refuse(_of_evaluation(config))


def refuse_strategy(method: Method, strategy: StrategyName) -> None:
    """Raise ValueError where `strategy` cannot apply the experts of `method`."""
    cannot = f"method {method.name} cannot use strategy {strategy.name}"
    _refuse(f"{cannot}: {wrong}" for wrong in _of_strategy(method, strategy))


def refuse_geometry(experts: Experts) -> None:
    """Raise ValueError for an expert geometry that is impossible, named as the Python interface names it."""
    _refuse(_of_geometry(experts))


def refuse_method(method: Method, experts: Experts) -> None:
    """Raise ValueError for a method that is impossible, alone or with these experts."""
    _refuse(
        f"method {method.name}: {wrong}" for wrong in chain(_of_targets(method, experts), _of_method(method))
    )


def refuse_use(method: Method, strategy: StrategyName, runtime: Runtime, batch: int, where: str) -> None:
    """Raise ValueError where `strategy` and `runtime` cannot decode `batch` sequences of `method` on device `where`."""
    refuse_strategy(method, strategy)
    faults = chain(
        _of_batch("batch", batch, strategy),
        _of_runtime(Arm(strategy=strategy, runtime=runtime), method, batch),
    )
    _refuse(f"strategy {strategy.name}: {wrong}" for wrong in faults)
    if where != "cuda" and runtime is not Runtime.eager:
        raise ValueError(
            f"runtime={runtime.name} captures a CUDA graph and the model is on the CPU: use runtime='eager'"
        )


def refuse_device(config: Config, where: str) -> None:
    """Raise ValueError where an arm or a kernel needs a GPU and `where` is none; called before anything is loaded."""
    if where != "cuda":
        _refuse(_of_cpu(config))


def refuse_processes(config: Config) -> None:
    """Raise ValueError where several processes were started for what one does, or by what splits what is trained."""
    if PROCESSES == 1:
        return
    if config.task not in (Task.pretrain, Task.train, Task.evaluate):
        raise ValueError(
            f"task={config.task.name} measures one process: start it without torchrun or accelerate launch"
        )
    full = config.task is Task.pretrain or (config.task is Task.train and config.method.full)
    refuse_sharding(trained=SHARDED and full)


def refuse_untrained(config: Config) -> None:
    """Raise ValueError where accuracy is asked of random weights; speed may be, so the configuration is valid."""
    random = config.model.path is None and config.model.weights is Weights.random
    if random and config.task in (Task.train, Task.evaluate):
        raise ValueError(
            f"task={config.task.name} on random weights means nothing: set model=small, model=tiny or model.path=FOLDER"
        )


def _refuse(faults: Iterable[str]) -> None:
    """Raise ValueError with the first."""
    for fault in faults:
        raise ValueError(fault)


def _of_empty(config: Config) -> Iterator[str]:
    # first, because suite.tasks are the families where nobody names them
    if not config.data.families and not config.data.path:
        yield "data.families is empty: name at least one"
    for key, cure in NOT_EMPTY.items():
        if not attrgetter(key)(config):
            yield f"{key} is empty: {cure}"
    # OmegaConf lets a list within a file's list of names pass
    for key in ("data.families", "suite.tasks", "experts.targets", "arms.run"):
        if odd := [name for name in attrgetter(key)(config) if not isinstance(name, str)]:
            yield f"{key} has {str(odd)[:80]}, which is no name"


def _of_numbers(config: Config) -> Iterator[str]:
    """Sizes of model.shape are looked at with those of checkpoints (model/declared.py)."""
    for key, value in _numbers(asdict(config)):
        least = -MOST if key.endswith(HAVE_BOUNDS) else 0
        if not key.startswith("model.shape.") and not least <= value <= MOST:
            yield f"{key}={reprlib.repr(value)} must be between {least} and {MOST}"


def _numbers(value: Any, key: str = "") -> Iterator[tuple[str, float]]:
    """Every number in plain settings, and its dotted name."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _numbers(inner, key)
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield key, value


def _of_single_keys(config: Config) -> Iterator[str]:
    for key, least in AT_LEAST.items():
        value = attrgetter(key)(config)
        if min(value if isinstance(value, list) else [value], default=0) < least:
            yield f"{key}={value} must be at least {least}"
    for key, known in ONE_OF.items():
        value = attrgetter(key)(config)
        if value not in known:
            yield f"{key}={value}: choose from {list(known)}"
    for key, known in SOME_OF.items():
        yield from _unknown(key, attrgetter(key)(config), known)


def _of_values(config: Config) -> Iterator[str]:
    """What can be seen of two keys in a group."""
    experts, switches, share = config.experts, config.drift.switches, config.latency.bypass_share
    bypass = f"latency.bypass_share={share}"
    if experts.top_k > experts.count:
        yield f"experts.top_k={experts.top_k} exceeds experts.count={experts.count}"
    if switches != sorted(set(switches)):
        yield "drift.switches must rise: it is one sequence, measured on its way"
    if config.task is Task.drift and config.method.routing is not Routing.token:
        yield f"task=drift merges one selection into all linears, which {config.method.name} cannot: use method=adafuse"
    if config.task is Task.fit_speed and not config.method.has_experts:
        yield f"task=fit_speed trains an adapter and {config.method.name} has none: use method=adafuse"
    if config.latency.gates is GateSource.distinct and experts.count < experts.top_k * 2:
        yield "latency.gates=distinct needs twice as many experts as experts.top_k: no token shares one with the last"
    if not 0 <= share <= 1:
        yield f"{bypass} must be between 0 and 1: it is the share of tokens without experts"
    if share > 0 and config.latency.gates is GateSource.router:
        yield f"{bypass} is part of a table of gates, and latency.gates=router has none: use latency.gates=uniform"
    if share > 0 and config.task is Task.trace:
        yield f"{bypass} mixes two kinds of tokens, and task=trace looks at one: use task=latency"


def _of_text(config: Config) -> Iterator[str]:
    """How much of it is generated."""
    fit = config.pretrain
    for key in ("train_items", "validation_items", "test_items"):
        if config.data.families and getattr(config.data, key) < 1:
            yield f"data.{key}=0 leaves nothing to learn or to ask: set at least 1"
    if config.model.is_made_here and fit.steps * fit.batch * fit.accumulation * fit.max_length > MOST:
        yield f"pretrain: its steps, batch, accumulation and max_length make more than {MOST} tokens: lower them"


def _of_geometry(experts: Experts) -> Iterator[str]:
    """Of a geometry that came from nobody's configuration."""
    yield from _unknown("targets", experts.targets, LINEARS)
    if not experts.targets:
        yield f"targets is empty: {NOT_EMPTY['experts.targets']}"
    for name in ("rank", "count", "top_k"):
        value = getattr(experts, name)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield f"{'experts' if name == 'count' else name}={value!r} must be a whole number of at least 1"
            return
    if experts.top_k > experts.count:
        yield f"top_k={experts.top_k} exceeds experts={experts.count}"
    if not isinstance(experts.alpha, int | float) or not math.isfinite(experts.alpha):
        yield f"alpha={experts.alpha!r} must be a finite number"


def _of_method(method: Method) -> Iterator[str]:
    blockwise = method.routing is Routing.blockwise
    if blockwise != (method.expert_kind in (ExpertKind.mlp_lora, ExpertKind.bottleneck)):
        yield "routing=blockwise goes with expert_kind mlp_lora or bottleneck, and they with it"
    yield from _of_decisions(method)
    if method.bypass_penalty != 0 and not method.null_expert:
        yield "bypass_penalty without null_expert=true does nothing"
    if method.first_expert_block > 0 and blockwise:
        yield "first_expert_block is for experts on linears; routing=blockwise has them on MLPs"
    if not 0 <= method.dropout < 1:
        yield f"dropout={method.dropout} must be at least 0 and below 1"
    if method.full and method.has_experts:
        yield "full=true trains the backbone itself, so expert_targets must be []"
    if method.expert_kind is ExpertKind.bottleneck and method.bottleneck_dim < 1:
        yield "bottleneck_dim must be at least 1"


def _of_decisions(method: Method) -> Iterator[str]:
    """Of the routers that decide for several linears."""
    token, every = method.routing is Routing.token, method.blocks_per_decision
    if method.null_expert and not (token and method.normalisation is Normalisation.softmax_topk_renorm):
        yield "null_expert leaves a whole token to the backbone: use method=adafuse and softmax_topk_renorm"
    if method.router_norm and not token:
        yield "router_norm is of the one router that decides for all layers: use method=adafuse"
    at_block = method.router_input is RouterInput.block_output
    if at_block != (method.router_block > 0):
        yield "router_block, from 1 on, goes with router_input=block_output (block0_output is that of the first)"
    if token and method.router_input in OF_PREVIOUS and method.static_targets:
        yield (
            f"router_input={method.router_input.name} reads states of the backbone alone, and static_targets are "
            "merged into it: use static_targets=[]"
        )
    if every < 0:
        yield f"blocks_per_decision={every} must be at least 0 (0: one decision for all blocks)"
    if every and not (token and method.router_input is RouterInput.first_linear):
        yield "blocks_per_decision is for gates that linears share: use method=adafuse and router_input=first_linear"
    if every and method.null_expert:
        yield "null_expert leaves a token to the backbone in all blocks: use blocks_per_decision=0"


def _of_targets(method: Method, experts: Experts) -> Iterator[str]:
    yield from _unknown("expert_targets", method.expert_targets or [], LINEARS)
    yield from _unknown("static_targets", method.static_targets, LINEARS)
    quarters = method.experts_by_quarter
    if quarters is None:
        return
    if len(quarters) != 4:
        yield "experts_by_quarter needs four numbers"
    if min(quarters) < experts.top_k:
        yield f"experts_by_quarter={quarters} has fewer than experts.top_k={experts.top_k}"
    if method.routing is not Routing.layerwise:
        yield "experts_by_quarter needs routing=layerwise (a shared gate counts once)"


def _of_strategy(method: Method, strategy: StrategyName) -> Iterator[str]:
    if strategy in MERGING and method.expert_kind is not ExpertKind.lora:
        yield "its experts are not linear in the weight, so they cannot be merged; use loop, dense or gather"
    if strategy in (StrategyName.switch, StrategyName.rebase) and method.routing is Routing.layerwise:
        yield "its gates are known layer by layer, and one launch merges all: use simple_merge, loop, dense or gather"
    if strategy in (StrategyName.switch, StrategyName.rebase) and method.blocks_per_decision:
        yield "one launch merges all when the token starts, and later blocks decide later: use simple_merge or gather"
    if strategy is StrategyName.fused and method.routing in LAYER_BY_LAYER:
        yield f"its kernel must know the experts before the input, unlike routing={method.routing.name}: use gather"
    if strategy in PEFT and not method.has_experts:
        yield "it has no adapter; use method lora or adafuse"
    if strategy is StrategyName.peft and method.routing is not Routing.none:
        yield "PEFT has no router; use method lora, or peft_merge"
    if strategy is StrategyName.peft_merge and method.routing is not Routing.token:
        yield "one merge for all layers needs gates that they share; use method adafuse"
    if strategy in PEFT and method.static_targets:
        yield "it does not carry LoRA beside the experts; use static_targets=[]"


def _of_arms(config: Config) -> Iterator[str]:
    """What can be seen of all arms of the cell, before each is looked at."""
    arms, methods = config.arms, config.methods
    yield from (
        f"unknown arm '{name}': choose from {sorted(arms.table)}"
        for name in arms.run
        if name not in arms.table
    )
    yield from (
        f"arm {name}: unknown method '{arm.method}': choose from {sorted(methods)}"
        for name, arm in arms.chosen.items()
        if arm.method not in methods
    )
    if len(set(arms.run)) < len(arms.run):
        yield "arms.run names an arm twice"
    if config.task is Task.memory and len(arms.run) > 1:
        yield "task=memory measures one arm a process: arms.run=[NAME]"


def _of_arm(arm: Arm, method: Method, config: Config) -> Iterator[str]:
    yield from _of_batch("batch", config.batch, arm.strategy)
    strategy = f"strategy {arm.strategy.name}"
    yield from (f"{strategy} {wrong}" for wrong in _of_runtime(arm, method, config.batch))
    gates, share = config.latency.gates, config.latency.bypass_share
    # a table of gates replaces one decision per token; a decision per layer is taken inside the kernels
    if gates is not GateSource.router and method.routing in LAYER_BY_LAYER:
        yield (
            f"latency.gates={gates.name} replaces one decision for all layers, and method {method.name} takes many: "
            "use arms of adafuse, or latency.gates=router"
        )
    if share > 0 and method.routing is Routing.token and not method.null_expert:
        yield (
            f"latency.bypass_share={share} leaves tokens to the backbone, which the router of method {method.name} "
            f"cannot: use method={method.name} method.null_expert=true"
        )


def _of_runtime(arm: Arm, method: Method, batch: int) -> Iterator[str]:
    """Static runtimes launch the same kernels for every token, and the host sees nothing in between."""
    if arm.strategy is StrategyName.peft_merge and batch > 1:
        yield "merges one selection for the whole batch: use batch=1"
    if arm.runtime is Runtime.eager:
        return
    if arm.runtime is Runtime.lean:
        yield from _of_lean(arm, method, batch)
    merged_per_token = arm.strategy in MERGING and method.routing is not Routing.none
    if arm.strategy in PEFT:
        yield "is PEFT's own Python, which runs eagerly: use runtime=eager"
    if arm.strategy is StrategyName.loop and method.has_experts:
        yield f"waits for the host at every expert, which runtime={arm.runtime.name} cannot capture: use masked_loop"
    if merged_per_token and arm.runtime is Runtime.compiled:
        yield "rewrites weights that torch.compile takes for constant within a step: use runtime=graph"
    if merged_per_token and batch > 1:
        yield f"compares the gates of a batch on the host, so runtime={arm.runtime.name} needs batch=1"


def _of_lean(arm: Arm, method: Method, batch: int) -> Iterator[str]:
    allowed = LEAN if method.has_experts else (StrategyName.dense,)
    if arm.strategy not in allowed:
        names = ", ".join(strategy.name for strategy in allowed)
        yield f"is not one of runtime=lean's for method {method.name}: use {names}, or runtime=graph"
    if method.routing is Routing.token and method.router_input in OF_PREVIOUS:
        yield f"has no router_input={method.router_input.name} in runtime=lean: use runtime=graph"
    if batch > LEAN_MAX_BATCH:
        yield f"serves up to {LEAN_MAX_BATCH} rows in runtime=lean, not batch={batch}: use runtime=graph"


def _of_evaluation(config: Config) -> Iterator[str]:
    strategy = config.evaluate_strategy
    if strategy in PEFT:
        yield "evaluate_strategy=peft times PEFT's own code and is no way to evaluate: use dense"
    if not config.evaluate_restore and strategy is not StrategyName.switch:
        yield "evaluate_restore=false is about what in-place merging leaves behind: use evaluate_strategy=switch"
    if config.task is Task.evaluate:
        yield from _of_batch("suite.batch", config.suite.batch, strategy)


def _of_cpu(config: Config) -> Iterator[str]:
    if config.task is Task.kernel:
        yield (
            "task=kernel times GPU kernels and this machine has no CUDA device: run it on one (make test runs the same "
            "kernels here, in Triton's interpreter)"
        )
    if config.task in (Task.latency, Task.memory, Task.trace):
        for name, arm in config.arms.chosen.items():
            if arm.runtime is not Runtime.eager:
                yield (
                    f"arm {name}: runtime={arm.runtime.name} captures a CUDA graph and this machine has no CUDA "
                    "device: use arms=paper or arms=controls, whose arms are eager"
                )


def _of_batch(key: str, batch: int, strategy: StrategyName) -> Iterator[str]:
    if strategy is StrategyName.fused and batch > FUSED_MAX_BATCH:
        yield f"{key}={batch} exceeds the {FUSED_MAX_BATCH} rows that strategy fused serves: use gather"


def _unknown(key: str, names: Collection[str], known: Collection[str]) -> Iterator[str]:
    if unknown := [name for name in names if name not in known]:
        yield f"{key} has {unknown}: choose from {list(known)}"
