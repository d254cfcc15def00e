"""The typed configuration: one dataclass per Hydra group.

In: nothing. Out: the dataclasses whose fields are all the keys that there are. Next: compose.py, which fills them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING

LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

# Enum's functional form keeps each on a line; YAML and the command line use the member names.
Task = Enum("Task", "pretrain train evaluate latency memory trace layer kernel drift fit_speed")
Weights = Enum("Weights", "scratch random hub")
Routing = Enum("Routing", "none layerwise blockwise token")
LAYER_BY_LAYER = (Routing.layerwise, Routing.blockwise)
RouterInput = Enum(
    "RouterInput",
    "first_linear embedding block0_output block_output previous_token previous_and_embedding",
)
# known before the token starts: the last hidden state of the token before (adapters/previous.py)
OF_PREVIOUS = (RouterInput.previous_token, RouterInput.previous_and_embedding)
Normalisation = Enum("Normalisation", "softmax_topk_renorm topk_softmax softmax_topk_raw")
ExpertKind = Enum("ExpertKind", "lora mlp_lora bottleneck")
StrategyName = Enum(
    "StrategyName", "loop masked_loop dense gather fused simple_merge switch rebase peft peft_merge"
)
# where the gates of a timed arm come from: its router, or a seeded table that the device reads on its way
GateSource = Enum("GateSource", "router uniform zipf same distinct")
Runtime = Enum("Runtime", "eager graph compiled lean")
# auto: a checkpoint's own on a GPU, float32 on a CPU (compose.py); no cell has it
Dtype = Enum("Dtype", "float32 bfloat16 float16 auto")
# published: every method's experts as its file says; equal: ranks that give each method as many parameters as lora
Budget = Enum("Budget", "published equal")


@dataclass
class Model:
    """A backbone: `path` (a folder in Hugging Face format) wins over `weights`."""

    name: str = MISSING
    path: str | None = None
    weights: Weights = Weights.scratch
    hub_id: str | None = None
    revision: str | None = None
    dtype: Dtype = Dtype.float32
    # of scratch and random weights; apart from the run's seed, so that adapters of several seeds share a backbone
    seed: int = 0
    # model_type and the sizes of a transformers config; needed for scratch and random weights
    shape: dict[str, Any] = field(default_factory=dict)

    @property
    def is_made_here(self) -> bool:
        """True for a backbone that task=pretrain makes."""
        return self.path is None and self.weights is Weights.scratch


@dataclass
class Experts:
    """Expert geometry of a cell: which linears, how many experts, of which rank."""

    targets: list[str] = MISSING
    rank: int = MISSING
    count: int = MISSING
    top_k: int = MISSING
    alpha: float = MISSING
    # PEFT LoRA folders, an expert each (experts.from on the command line): they are frozen, the router alone is
    # trained, and targets, rank, count and alpha are theirs
    folders: list[str] = field(default_factory=list)
    # a module that one of the folders does not adapt, and others do, is zero there
    missing_as_zeros: bool = False


@dataclass
class Method:
    """A published recipe. conf/method/*.yaml hold what differs from these defaults, and its source."""

    name: str = MISSING
    routing: Routing = MISSING
    # where routing=token takes its one decision
    router_input: RouterInput = RouterInput.first_linear
    # of which block, with router_input=block_output: no block up to it has experts
    router_block: int = 0
    # routing=token: it decides anew at the first adapted linear of every so many adapted blocks; 0: once for all
    blocks_per_decision: int = 0
    # the token router reads its input at a root mean square of 1, wherever it looks: places differ in scale
    router_norm: bool = False
    normalisation: Normalisation = Normalisation.softmax_topk_renorm
    expert_kind: ExpertKind = ExpertKind.lora
    # linears that carry experts; null: all of the cell's targets; []: the plain backbone
    expert_targets: list[str] | None = None
    # one expert of the whole budget (plain LoRA); null: the cell's experts (conf/experts)
    rank: int | None = None
    count: int | None = None
    alpha: float | None = None
    experts_by_quarter: list[int] | None = None
    # ordinary LoRA beside the experts
    static_targets: list[str] = field(default_factory=list)
    static_rank: int = 0
    static_alpha: float = 0.0
    # width of PESC's serial adapters
    bottleneck_dim: int = 0
    dropout: float = 0.0
    balance_coefficient: float = 0.0
    # the router may leave a token to the backbone alone, and what a token that it does not leave costs in the loss
    null_expert: bool = False
    bypass_penalty: float = 0.0
    # no experts before this block: what a gate that is known late must do without
    first_expert_block: int = 0
    # times train.learning_rate: what suits all of a backbone's weights is too much for factors of rank 8, or too little
    learning_rate_factor: float = 1.0
    # full fine-tuning: all of the backbone's weights are trained, and there are no experts
    full: bool = False

    @property
    def has_experts(self) -> bool:
        """False for the plain backbone, which says `expert_targets: []`."""
        return self.expert_targets != []

    @property
    def is_trained(self) -> bool:
        """False for the plain backbone alone."""
        return self.has_experts or self.full


@dataclass
class Arm:
    method: str = MISSING
    strategy: StrategyName = StrategyName.dense
    runtime: Runtime = Runtime.eager
    label: str = MISSING


def arm_version(arm: Arm, method: Method) -> int:
    """Of an arm's code: one more with every mend that changes its time, so that it is measured anew, and never pooled
    with its older self. 1 is that of the first published records, which do not say.
    """
    strategy, routing = arm.strategy, method.routing
    # gates that all linears share are shifted once a token, not at each of them
    if strategy is StrategyName.simple_merge and routing is Routing.token:
        return 2
    # kernels that every layer launches are called directly, not through torch's dispatcher: where the host waits for it
    routed = strategy in (StrategyName.dense, StrategyName.simple_merge) and routing in LAYER_BY_LAYER
    launches = strategy in (StrategyName.gather, StrategyName.fused) or routed
    if arm.runtime is Runtime.lean:
        # what a launch's end needs is on its way while it reads W; of experts h is its own flag (2 was never published)
        return 3 if strategy is StrategyName.gather else 2
    return 2 if launches and arm.runtime is Runtime.eager else 1


# the same of a step of training (bench/fit_speed.py), whatever the method: routers and experts in few launches
FIT_VERSION = 2


@dataclass
class Arms:
    name: str = MISSING
    table: dict[str, Arm] = field(default_factory=dict)
    run: list[str] = MISSING

    @property
    def chosen(self) -> dict[str, Arm]:
        """The arms that run, by name, in their order."""
        return {name: self.table[name] for name in self.run}


@dataclass
class Data:
    """What adapters are trained on: generated families, or JSONL files in `path`."""

    name: str = MISSING
    families: list[str] = MISSING
    # how hard the generated items are: lengths, see data/families.py
    level: int = 1
    path: str | None = None
    train_items: int = MISSING
    validation_items: int = MISSING
    test_items: int = MISSING


@dataclass
class Fit:
    """Knobs of one training stage, handed to transformers.TrainingArguments."""

    steps: int = MISSING
    batch: int = MISSING
    accumulation: int = 1
    learning_rate: float = MISSING
    weight_decay: float = 0.0
    warmup_steps: int = 0
    max_length: int = MISSING
    save_every_steps: int = MISSING
    bf16: bool = False


@dataclass
class Suite:
    """lm-eval tasks; `bundled` adds the tasks that lm-eval ships (they need a network, or `path`)."""

    name: str = MISSING
    tasks: list[str] = MISSING
    bundled: bool = False
    # a folder of data sets for bundled tasks, as scripts/prepare.py evaluation leaves it; null: from the hub
    path: str | None = None
    limit: int | None = None
    shots: int = 0
    # for tasks and groups that have their own number
    shots_by_task: dict[str, int] = field(default_factory=dict)
    batch: int = 16


@dataclass
class Latency:
    """Knobs of the timed pass, and of the memory and trace passes beside it."""

    rounds: int = MISSING
    block_tokens: int = 64
    settle_tokens: int = 4
    check_tokens: int = 64
    # trained: the adapters of the accuracy study; random: seeded factors of the same shapes
    trained_adapters: bool = False
    gates: GateSource = GateSource.router
    # of the table's tokens this share, drawn by seed, is left to the backbone alone
    bypass_share: float = 0.0
    # every block a query of its own, as the paper decodes: another prompt each round, its prefill timed too
    queries: bool = False
    # a file of lines {"prompt": TEXT} to read; else ids drawn by seed, or test items where routers are trained
    prompts: str | None = None


@dataclass
class Layer:
    """One adapted linear by itself (the paper's Figures 1 and 2)."""

    warmup: int = 100
    runs: int = 300
    ranks: list[int] = MISSING
    sequence_lengths: list[int] = MISSING


@dataclass
class Kernel:
    """Kernels by themselves: every combination of `ranks`, `targets` and `tokens` that a kernel depends on."""

    kernels: list[str] = MISSING
    # qv, qkvo, all: see bench/kernel.py
    targets: list[str] = MISSING
    ranks: list[int] = MISSING
    tokens: list[int] = MISSING
    replays: int = 20


@dataclass
class Drift:
    """What in-place merging does to the weights: measured after each of `switches`."""

    switches: list[int] = MISSING
    # a clean copy back every so many switches
    refresh_every: int = MISSING
    prompts: int = 4
    # what the weights are cast to first: a backbone pre-trained here is one backbone, whatever is measured on it
    dtype: Dtype = Dtype.bfloat16


@dataclass
class Config:
    task: Task = Task.evaluate
    model: Model = field(default_factory=Model)
    experts: Experts = field(default_factory=Experts)
    method: Method = field(default_factory=Method)
    methods: dict[str, Method] = field(default_factory=dict)
    arms: Arms = field(default_factory=Arms)
    data: Data = field(default_factory=Data)
    suite: Suite = field(default_factory=Suite)
    pretrain: Fit = field(default_factory=Fit)
    train: Fit = field(default_factory=Fit)
    latency: Latency = field(default_factory=Latency)
    layer: Layer = field(default_factory=Layer)
    kernel: Kernel = field(default_factory=Kernel)
    drift: Drift = field(default_factory=Drift)
    evaluate_strategy: StrategyName = StrategyName.dense
    # what backbone and experts are cast to before they are evaluated; routers stay in fp32
    evaluate_dtype: Dtype = Dtype.float32
    # false: between sequences a strategy that merges takes its selection out and leaves what rounding has left
    evaluate_restore: bool = True
    budget: Budget = Budget.published
    tracker: str = MISSING
    profile: str = MISSING
    batch: int = 1
    context: int = 64
    seed: int = 0
    replicate: int = 0
    runs_dir: str = "results/runs"
    device: str = "auto"
