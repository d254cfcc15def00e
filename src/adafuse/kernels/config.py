"""How the launches of gather.py are cut into programs: from shapes alone, as CUDA graphs need.

In: how many tokens, experts, ranks, inputs and outputs there are. Out: a configuration, and the few scalars that the
kernels take in place of a table of members, and `locate`, which a kernel asks where its tile is. Nothing else here
touches a device; letters as in naive.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from adafuse.kernels.naive import Members

MULTIPROCESSORS = 132  # an H200; only how finely the work is cut depends on it
FEW_TOKENS = 4  # up to here each token has programs of its own
MAX_MEMBERS = 3  # q, k and v


@dataclass(frozen=True)
class ShrinkConfig:
    """How `shrink` cuts its work: planes of `steps * block_i` inputs, tiles of `block_c` rows."""

    block_c: int
    block_i: int
    steps: int
    warps: int


@dataclass(frozen=True)
class ExpandConfig:
    """How an expand cuts its: tiles of `block_o` outputs and `block_t` tokens, `block_c` terms of a sum at once.

    One token at a time means no tensor core, and one expert's (padded) rank as the terms.
    """

    block_t: int
    block_o: int
    block_c: int
    warps: int
    stages: int = 2


def shrink_config(tokens: int, top_k: int, rows: int, inputs: int) -> ShrinkConfig:
    """A launch from shapes: enough programs for the device, and few planes, because every reader adds them up."""
    steps = triton.cdiv(inputs, 4 * 1024)
    programs = tokens * top_k * triton.cdiv(inputs, steps * 1024)
    fits = (block for block in (16, 8, 4) if programs * triton.cdiv(rows, block) >= MULTIPROCESSORS)
    return ShrinkConfig(next(fits, 2), 1024, steps, 4)


def expand_config(tokens: int, experts: int, rank: int, outputs: int, dtype: torch.dtype) -> ExpandConfig:
    """A launch from shapes: enough programs for the device, each with most of what it reads in flight at once."""
    if tokens <= FEW_TOKENS:
        block_r = triton.next_power_of_2(rank)
        block_o = max(16, min(128, 2048 // block_r))
        while block_o > 16 and tokens * outputs // block_o < MULTIPROCESSORS:
            block_o //= 2
        return ExpandConfig(1, block_o, block_r, min(8, max(1, block_o * block_r // 256)))
    block_t = max(16, min(64, triton.next_power_of_2(tokens)))
    # at least two steps, because one alone is not pipelined: its loads would wait for each other's registers. Measured
    # on an H200, a Llama-2-7B's projections on average: rank 64 and 8 tokens take 5.75 us, 6.19 with half as many steps
    terms = triton.next_power_of_2(experts * rank)
    block_c = max(16, min(32 if terms <= 128 or dtype == torch.float32 else 64, terms // 2))
    block_o = 64 if outputs * triton.cdiv(tokens, block_t) >= 64 * MULTIPROCESSORS else 32
    return ExpandConfig(block_t, block_o, block_c, 4, min(6, triton.cdiv(experts * rank, block_c) + 1))


def check_few(index_TK: Tensor) -> None:
    """These kernels read an expert once for every token that chose it."""
    if index_TK.shape[0] > FEW_TOKENS:
        raise ValueError(
            f"{index_TK.shape[0]} tokens: shrink and expand_ take 1 to {FEW_TOKENS}; "
            "use expand_all_ on a library product"
        )


def flat(members: Members) -> tuple[int, ...]:
    """(column, width) of three members as scalars; the missing ones have no width, hence no tiles."""
    assert 1 <= len(members) <= MAX_MEMBERS, f"{len(members)} linears share an input; the kernels take 1 to 3"
    padded = [*members, *[(0, 0)] * (MAX_MEMBERS - len(members))]
    return tuple(number for member in padded for number in member)


def output_tiles(members: Members, block_o: int) -> int:
    """Tiles of all members; none crosses from one member into the next."""
    return sum(triton.cdiv(width, block_o) for _, width in members)


def row_stride(y_TO: Tensor) -> int:
    """The stride between rows of an output that is written in place."""
    assert y_TO.stride(-1) == 1, "y is written in place: its columns must be contiguous"
    return y_TO.stride(0)


def stride_unit(*strides: int) -> int:
    """What a kernel multiplies these strides by: Triton by itself finds out nothing less than multiples of 16.

    Rows with the logits of 8 experts behind them are an odd multiple of 8 long: 16 bytes in bf16, a whole load.
    """
    return 8 if all(stride % 8 == 0 for stride in strides) else 1


def dot_type(like: Tensor) -> tl.dtype:
    """The operands' type in `tl.dot`; a CPU tensor means the interpreter, where only fp32 products are right."""
    wide = like.device.type == "cpu" or like.dtype == torch.float32
    return tl.float32 if wide else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[like.dtype]


@triton.jit
def locate(tile, column0, width0, column1, width1, column2, width2, BLOCK_O: tl.constexpr):
    """(member, first column of y, first row of the joined B, rows before it in the member, rows left) of a tile."""
    tiles0 = tl.cdiv(width0, BLOCK_O)
    tiles1 = tl.cdiv(width1, BLOCK_O)
    in0 = tile < tiles0
    in1 = tile < tiles0 + tiles1
    member = tl.where(in0, 0, tl.where(in1, 1, 2))
    column = tl.where(in0, column0, tl.where(in1, column1, column2))
    width = tl.where(in0, width0, tl.where(in1, width1, width2))
    row = tl.where(in0, 0, tl.where(in1, width0, width0 + width1))
    offset = (tile - tl.where(in0, 0, tl.where(in1, tiles0, tiles0 + tiles1))) * BLOCK_O
    return member, column + offset, row + offset, offset, width - offset
