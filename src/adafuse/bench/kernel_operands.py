"""The operands of a timed kernel: sizes of a backbone, seeded tensors of these sizes, and a call of a kernel on them.

In: a configuration, a `Case`. Out: tensors on the device, never the same for two blocks, so that a pass over all blocks
reads gigabytes and no cache answers. Experts are made as large as the weights: a mistake in them could otherwise hide
behind the rounding of the rest. Biases are left out. Letters as in kernels/naive.py. Next: kernel_steps.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from adafuse.config import Config
from adafuse.kernels import naive
from adafuse.model.projections import SHARED_INPUT
from adafuse.shape import shape_of

WEIGHT_STD = 0.02
SCALING = 2.0  # alpha / rank, as in conf/experts


@dataclass(frozen=True)
class Case:
    """A kernel and what it depends on; None where it does not. Only a merge is asked of less than all linears."""

    kernel: str
    targets: str
    rank: int | None
    tokens: int | None


@dataclass(frozen=True)
class Sizes:
    """`linears` holds (O, I) by name; every block has the same."""

    blocks: int
    hidden: int
    linears: dict[str, tuple[int, int]]
    experts: int
    top_k: int


def sizes_of(config: Config) -> Sizes:
    """The linears of the configured backbone, the number of experts of the configured cell."""
    shape = shape_of(config.model)
    hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    head_dim = shape.get("head_dim") or hidden // heads
    queries, keys = heads * head_dim, shape.get("num_key_value_heads", heads) * head_dim
    linears = {
        "q_proj": (queries, hidden),
        "k_proj": (keys, hidden),
        "v_proj": (keys, hidden),
        "o_proj": (hidden, queries),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }
    return Sizes(shape["num_hidden_layers"], hidden, linears, config.experts.count, config.experts.top_k)


@dataclass
class Draw:
    """Seeded values, made on the device."""

    sizes: Sizes
    where: str
    dtype: torch.dtype
    generator: torch.Generator

    def __post_init__(self) -> None:
        # of the launches of a pass that wait inside (kernels/fused.py): as many as projections, used in turn
        self.flags = torch.zeros(self.sizes.blocks * len(SHARED_INPUT), dtype=torch.int32, device=self.where)
        self.turns = count()

    def normal(self, *shape: int, std: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
        fresh = torch.empty(shape, dtype=dtype or self.dtype, device=self.where)
        return fresh.normal_(0.0, std, generator=self.generator)

    def down(self, rows: int, inputs: int) -> Tensor:
        """lora_A of all experts, [E, rows, I]."""
        return self.normal(self.sizes.experts, rows, inputs, std=WEIGHT_STD)

    def up(self, outputs: int, rank: int) -> Tensor:
        """lora_B of all experts, [E, O, R], such that B A is as large as the weights."""
        return self.normal(self.sizes.experts, outputs, rank, std=rank**-0.5)

    def gates(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Distinct experts [T, K] of every token, all equally likely, and weights [T, K] that sum to one."""
        scores = torch.rand(tokens, self.sizes.experts, generator=self.generator, device=self.where)
        weight_TK = torch.softmax(self.normal(tokens, self.sizes.top_k, dtype=torch.float32), dim=-1)
        return scores.topk(self.sizes.top_k, dim=-1).indices, weight_TK

    def router(self, members: int, inputs: int) -> Tensor:
        """[G, E, I] in fp32, whose logits are of size one."""
        shape = members, self.sizes.experts, inputs
        return self.normal(*shape, std=inputs**-0.5, dtype=torch.float32)


@dataclass
class Step:
    """One call of a kernel, and the same in fp32 by naive.py, which leaves the operands alone: call it first."""

    launch: Callable[[], list[Tensor]]
    wanted: Callable[[], list[Tensor]]
    bytes: float


class Linear:
    """One projection of one block: its input x and the linears (`names`) that share it."""

    def __init__(self, draw: Draw, case: Case, names: tuple[str, ...]) -> None:
        assert case.tokens is not None
        widths = [draw.sizes.linears[name][0] for name in names]
        self.inputs, self.outputs = draw.sizes.linears[names[0]][1], sum(widths)
        starts = [sum(widths[:g]) for g in range(len(names))]
        self.members: naive.Members = list(zip(starts, widths, strict=True))
        self.x_TI = draw.normal(case.tokens, self.inputs)

    def rows(self, draw: Draw, spare: int = 0) -> Tensor:
        """The joined weight, and `spare` rows behind it."""
        return draw.normal(self.outputs + spare, self.inputs, std=WEIGHT_STD)


class Adapted(Linear):
    """The same with experts on all of its linears: B, and each token's gates. A comes in two layouts."""

    def __init__(self, draw: Draw, case: Case, names: tuple[str, ...]) -> None:
        super().__init__(draw, case, names)
        assert case.rank is not None
        self.columns = len(names) * case.rank
        self.shrunk = draw.sizes.experts * self.columns
        self.lora_B_EOR = draw.up(self.outputs, case.rank)
        self.index_TK, self.weight_TK = draw.gates(len(self.x_TI))

    def lora_A_ECI(self, draw: Draw) -> Tensor:
        return draw.down(self.columns, self.inputs)


def fp32_copy(operand: Tensor) -> Tensor:
    """To be written in place, whatever the dtype was."""
    return operand.to(torch.float32, copy=True)
