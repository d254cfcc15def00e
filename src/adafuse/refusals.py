"""Combinations that cannot work, each refused with one line that names the key and the cure.

In: a `Config`. Out: nothing, or a ValueError, before anything heavy is imported.
Next: refused_arms.py.
"""

from __future__ import annotations

from collections.abc import Collection

from adafuse.config import (
    LINEARS,
    Config,
    Drift,
    ExpertKind,
    Experts,
    Kernel,
    Method,
    Normalisation,
    Routing,
    Runtime,
    StrategyName,
    Task,
    Weights,
)
from adafuse.data.families import LEVELS
from adafuse.refused_arms import PEFT, check_arms, refuse, refuse_batch, refuse_strategy

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
    check_arms(config)
    refuse_strategy(config.method, config.evaluate_strategy)
    refuse(
        config.evaluate_strategy in PEFT,
        "evaluate_strategy=peft times PEFT's own code and is no way to evaluate: use dense",
    )
    refuse(
        not config.evaluate_restore and config.evaluate_strategy is not StrategyName.switch,
        "evaluate_restore=false is about what in-place merging leaves in the weights: use evaluate_strategy=switch",
    )
    if config.task is Task.evaluate:
        refuse_batch("suite.batch", config.suite.batch, config.evaluate_strategy)
    for key in ("batch", "context"):
        refuse(getattr(config, key) < 1, f"{key} must be at least 1")
    refuse(not config.data.families and not config.data.path, "data.families is empty")
    refuse(config.data.level not in LEVELS, f"data.level={config.data.level}: choose from {list(LEVELS)}")
    refuse(not config.suite.tasks, "suite.tasks is empty: name at least one lm-eval task")
    for stage in ("pretrain", "train"):
        fit = getattr(config, stage)
        for key in ("steps", "batch", "accumulation", "max_length", "save_every_steps"):
            refuse(getattr(fit, key) < 1, f"{stage}.{key} must be at least 1")
    refuse(config.latency.block_tokens < 64, "latency.block_tokens must be at least 64")
    refuse(config.latency.rounds < 2, "latency.rounds must be at least 2")
    # the check behind padding holds four positions against the reference
    refuse(config.latency.check_tokens < 4, "latency.check_tokens must be at least 4")
    _check_kernel(config.kernel)
    _check_drift(config.drift)
    if config.task is Task.drift:
        refuse(
            config.method.routing is not Routing.token,
            f"method {config.method.name}: task=drift merges one selection into all linears, so routing must be token: "
            "use method=adafuse",
        )
    refuse(config.device not in ("auto", "cpu", "cuda"), "device must be auto, cpu or cuda")


def _check_kernel(knobs: Kernel) -> None:
    known: dict[str, Collection[str]] = {"kernels": KERNELS, "targets": KERNEL_TARGETS}
    for key, names in known.items():
        unknown = [name for name in getattr(knobs, key) if name not in names]
        refuse(bool(unknown), f"kernel.{key} has {unknown}: choose from {list(names)}")
    for key in ("ranks", "tokens"):
        values = getattr(knobs, key)
        refuse(not values or min(values) < 1, f"kernel.{key} must be numbers of at least 1")
    refuse(knobs.replays < 1, "kernel.replays must be at least 1")


def _check_drift(knobs: Drift) -> None:
    points = knobs.switches
    refuse(not points or points[0] < 1, "drift.switches must be numbers of at least 1")
    refuse(points != sorted(set(points)), "drift.switches must rise: it is one sequence, measured on its way")
    for key in ("refresh_every", "prompts"):
        refuse(getattr(knobs, key) < 1, f"drift.{key} must be at least 1")


def _check_experts(experts: Experts) -> None:
    unknown = [t for t in experts.targets if t not in LINEARS]
    refuse(bool(unknown), f"experts.targets has {unknown}: choose from {list(LINEARS)}")
    refuse(not experts.targets, f"experts.targets is empty: choose from {list(LINEARS)}")
    for key in ("rank", "count", "top_k"):
        refuse(getattr(experts, key) < 1, f"experts.{key} must be at least 1")
    refuse(
        experts.top_k > experts.count,
        f"experts.top_k={experts.top_k} exceeds experts.count={experts.count}",
    )


def _check_method(method: Method, experts: Experts) -> None:
    name, quarters = method.name, method.experts_by_quarter
    for key in ("expert_targets", "static_targets"):
        unknown = [t for t in getattr(method, key) or [] if t not in LINEARS]
        refuse(bool(unknown), f"method {name}: {key} has {unknown}: choose from {list(LINEARS)}")
    if quarters is not None:
        refuse(len(quarters) != 4, f"method {name}: experts_by_quarter needs four numbers")
        refuse(
            min(quarters) < experts.top_k,
            f"method {name}: experts_by_quarter={quarters} has fewer than experts.top_k={experts.top_k}",
        )
        refuse(
            method.routing is not Routing.layerwise,
            f"method {name}: experts_by_quarter needs routing=layerwise (a shared gate counts once)",
        )
    blockwise = method.routing is Routing.blockwise
    refuse(
        blockwise != (method.expert_kind in (ExpertKind.mlp_lora, ExpertKind.bottleneck)),
        f"method {name}: routing=blockwise goes with expert_kind mlp_lora or bottleneck, and they with it",
    )
    plain = method.routing is Routing.token and method.normalisation is Normalisation.softmax_topk_renorm
    refuse(
        method.null_expert and not plain,
        f"method {name}: null_expert leaves a whole token to the backbone, so it needs routing=token and "
        "normalisation=softmax_topk_renorm: use method=adafuse",
    )
    refuse(
        method.router_norm and method.routing is not Routing.token,
        f"method {name}: router_norm is of the one router that decides for all layers: use method=adafuse",
    )
    refuse(
        method.bypass_penalty != 0 and not method.null_expert,
        f"method {name}: bypass_penalty without null_expert=true does nothing",
    )
    refuse(
        method.first_expert_block > 0 and method.routing is Routing.blockwise,
        f"method {name}: first_expert_block is for experts on linears; routing=blockwise has them on MLPs",
    )
    refuse(
        method.full and method.has_experts,
        f"method {name}: full=true trains the backbone itself, so expert_targets must be []",
    )
    refuse(
        method.expert_kind is ExpertKind.bottleneck and method.bottleneck_dim < 1,
        f"method {name}: bottleneck_dim must be at least 1",
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
