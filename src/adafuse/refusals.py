"""Combinations that cannot work, each refused with one line that names the key and the cure.

In: a `Config`. Out: nothing, or a ValueError, before anything heavy is imported.
"""

from __future__ import annotations

from collections.abc import Collection

from adafuse.config import (
    LINEARS,
    Arm,
    Config,
    Drift,
    ExpertKind,
    Experts,
    Kernel,
    Method,
    Routing,
    Runtime,
    StrategyName,
    Task,
    Weights,
)

MERGING = (StrategyName.simple_merge, StrategyName.switch, StrategyName.rebase)
# rows of one `fused` launch: beyond them library products read the weights as fast (kernels/README.md)
FUSED_MAX_BATCH = 2
# what task=kernel can time (bench/kernel_cases.py), and the linears that a merge writes
KERNELS = (
    *("switch", "rebase", "shrink_expand", "expand_all", "gather", "gather_routed"),
    *("dense", "fused", "linear", "library_linear", "route"),
)
KERNEL_TARGETS = {"qv": ("q_proj", "v_proj"), "qkvo": LINEARS[:4], "all": LINEARS}


def validate(config: Config) -> None:
    """Refuse what cannot work, naming the key and the cure. Raises ValueError."""
    _check_experts(config.experts)
    for method in config.methods.values():
        _check_method(method, config.experts)
    _check_arms(config)
    refuse_strategy(config.method, config.evaluate_strategy)
    if config.task is Task.evaluate:
        _refuse_batch("suite.batch", config.suite.batch, config.evaluate_strategy)
    for key in ("batch", "context"):
        _refuse(getattr(config, key) < 1, f"{key} must be at least 1")
    _refuse(not config.data.families and not config.data.path, "data.families is empty")
    _refuse(not config.suite.tasks, "suite.tasks is empty: name at least one lm-eval task")
    for stage in ("pretrain", "train"):
        fit = getattr(config, stage)
        for key in ("steps", "batch", "accumulation", "max_length", "save_every_steps"):
            _refuse(getattr(fit, key) < 1, f"{stage}.{key} must be at least 1")
    _refuse(config.latency.block_tokens < 64, "latency.block_tokens must be at least 64")
    _refuse(config.latency.rounds < 2, "latency.rounds must be at least 2")
    _check_kernel(config.kernel)
    _check_drift(config.drift)
    if config.task is Task.drift:
        _refuse(
            config.method.routing is not Routing.token,
            f"method {config.method.name}: task=drift merges one selection into all linears, so routing must be token: "
            "use method=adafuse",
        )
    _refuse(config.device not in ("auto", "cpu", "cuda"), "device must be auto, cpu or cuda")


def _check_kernel(knobs: Kernel) -> None:
    known: dict[str, Collection[str]] = {"kernels": KERNELS, "targets": KERNEL_TARGETS}
    for key, names in known.items():
        unknown = [name for name in getattr(knobs, key) if name not in names]
        _refuse(bool(unknown), f"kernel.{key} has {unknown}: choose from {list(names)}")
    for key in ("ranks", "tokens"):
        values = getattr(knobs, key)
        _refuse(not values or min(values) < 1, f"kernel.{key} must be numbers of at least 1")
    _refuse(knobs.replays < 1, "kernel.replays must be at least 1")


def _check_drift(knobs: Drift) -> None:
    points = knobs.switches
    _refuse(not points or points[0] < 1, "drift.switches must be numbers of at least 1")
    _refuse(
        points != sorted(set(points)), "drift.switches must rise: it is one sequence, measured on its way"
    )
    for key in ("refresh_every", "prompts"):
        _refuse(getattr(knobs, key) < 1, f"drift.{key} must be at least 1")


def _check_experts(experts: Experts) -> None:
    unknown = [t for t in experts.targets if t not in LINEARS]
    _refuse(bool(unknown), f"experts.targets has {unknown}: choose from {list(LINEARS)}")
    _refuse(not experts.targets, f"experts.targets is empty: choose from {list(LINEARS)}")
    for key in ("rank", "count", "top_k"):
        _refuse(getattr(experts, key) < 1, f"experts.{key} must be at least 1")
    _refuse(
        experts.top_k > experts.count,
        f"experts.top_k={experts.top_k} exceeds experts.count={experts.count}",
    )


def _check_method(method: Method, experts: Experts) -> None:
    name, quarters = method.name, method.experts_by_quarter
    for key in ("expert_targets", "static_targets"):
        unknown = [t for t in getattr(method, key) or [] if t not in LINEARS]
        _refuse(bool(unknown), f"method {name}: {key} has {unknown}: choose from {list(LINEARS)}")
    if quarters is not None:
        _refuse(len(quarters) != 4, f"method {name}: experts_by_quarter needs four numbers")
        _refuse(
            min(quarters) < experts.top_k,
            f"method {name}: experts_by_quarter={quarters} has fewer than experts.top_k={experts.top_k}",
        )
        _refuse(
            method.routing is not Routing.layerwise,
            f"method {name}: experts_by_quarter needs routing=layerwise (a shared gate counts once)",
        )
    blockwise = method.routing is Routing.blockwise
    _refuse(
        blockwise != (method.expert_kind in (ExpertKind.mlp_lora, ExpertKind.bottleneck)),
        f"method {name}: routing=blockwise goes with expert_kind mlp_lora or bottleneck, and they with it",
    )
    _refuse(
        method.expert_kind is ExpertKind.bottleneck and method.bottleneck_dim < 1,
        f"method {name}: bottleneck_dim must be at least 1",
    )


def _check_arms(config: Config) -> None:
    arms = config.arms
    _refuse(not arms.run, "arms.run is empty: name at least one arm")
    for name in arms.run:
        _refuse(name not in arms.table, f"unknown arm '{name}': choose from {sorted(arms.table)}")
        arm = arms.table[name]
        _refuse(
            arm.method not in config.methods,
            f"arm {name}: unknown method '{arm.method}': choose from {sorted(config.methods)}",
        )
        refuse_strategy(config.methods[arm.method], arm.strategy)
        _refuse_batch(f"arm {name}: batch", config.batch, arm.strategy)
        _refuse_runtime(name, arm, config.methods[arm.method], config.batch)
    _refuse(len(set(arms.run)) < len(arms.run), "arms.run names an arm twice")


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


def refuse_device(config: Config, where: str) -> None:
    """Raise ValueError where an arm or a kernel needs a GPU and `where` is none; called before anything is loaded."""
    if where == "cuda":
        return
    _refuse(
        config.task is Task.kernel,
        "task=kernel times GPU kernels and this machine has no CUDA device: run it on one (make test runs the same "
        "kernels here, in Triton's interpreter)",
    )
    if config.task is not Task.latency:
        return
    for name in config.arms.run:
        runtime = config.arms.table[name].runtime
        _refuse(
            runtime is not Runtime.eager,
            f"arm {name}: runtime={runtime.name} captures a CUDA graph and this machine has no CUDA device: "
            "use arms=paper or arms=controls, whose arms are eager",
        )


def _refuse_batch(key: str, batch: int, strategy: StrategyName) -> None:
    _refuse(
        strategy is StrategyName.fused and batch > FUSED_MAX_BATCH,
        f"{key}={batch} exceeds the {FUSED_MAX_BATCH} rows that strategy fused serves: use gather",
    )


def _refuse_runtime(name: str, arm: Arm, method: Method, batch: int) -> None:
    """Static runtimes launch the same kernels for every token, and the host sees nothing in between."""
    if arm.runtime is Runtime.eager:
        return
    _refuse(
        arm.strategy is StrategyName.loop and method.has_experts,
        f"arm {name}: strategy loop waits for the host at every expert, so runtime={arm.runtime.name} cannot capture "
        "it: use masked_loop, the same loop without the waiting",
    )
    merged_per_token = arm.strategy in MERGING and method.routing is not Routing.none
    _refuse(
        merged_per_token and arm.runtime is Runtime.compiled,
        f"arm {name}: strategy {arm.strategy.name} rewrites weights that torch.compile takes for constant within a "
        "step, and may use before they are written: use runtime=graph",
    )
    _refuse(
        merged_per_token and batch > 1,
        f"arm {name}: strategy {arm.strategy.name} compares the gates of a batch on the host, so "
        f"runtime={arm.runtime.name} needs batch=1",
    )


def refuse_untrained(config: Config) -> None:
    """Raise ValueError where accuracy is asked of random weights; speed may be, so the configuration is valid."""
    random = config.model.path is None and config.model.weights is Weights.random
    _refuse(
        random and config.task in (Task.train, Task.evaluate),
        f"task={config.task.name} on random weights means nothing: set model=small, model=tiny or model.path=FOLDER",
    )


def _refuse(wrong: bool, message: str) -> None:
    if wrong:
        raise ValueError(message)
