"""What the kernels take, and how their launches are cut into programs: from shapes alone, as CUDA graphs need.

In: how many tokens, experts, ranks, inputs and outputs there are. Out: limits, which refusals.py holds a configuration
to, and the cut of each launch. Nothing heavy is imported here, so that a configuration is checked without torch, and
nothing touches a device. Letters as in naive.py. Next: gather.py, fused.py, switch.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from torch import Tensor

Members = list[tuple[int, int]]  # (first column of y, width) of each

# gather: up to here each token has programs of its own, which read an expert once for every token that chose it
FEW_TOKENS = 4
# Rows of one `fused` or `linear` launch. Beyond, arithmetic without tensor cores takes longer than the weight: at four
# rows a token of Llama-2-7B's shape takes 6.4 ms where the library's takes 3.72 (one H200, README.md).
FUSED_MAX_BATCH = 2
# rows of a launch of lean.py beyond which it goes through tensor cores, for the same reason
GEMV_TOKENS = 2
MAX_MEMBERS = 3  # linears that share an input: q, k and v
ROUTED_MAX_EXPERTS = 32  # a kernel notes whom it has taken in the bits of a word
# 16 bytes of bf16. Rows of a joined product that are an odd multiple of 4 numbers long (4 experts and their routers
# behind q, k, v) a library's kernel cannot store 128 bits at a time, nor ours load them so.
ROW_MULTIPLE = 8
# of a row of a factor: with twice as many ranks A and B of four slots leave no room on the chip for the smallest tile
SWITCH_MAX_RANK_BYTES = 512
SWITCH_ALIGNMENT_BYTES = 16  # one load of 128 bits
SWITCH_MAX_STAGES = 4  # beyond four tiles in flight nothing was gained
SWITCH_RESERVED_BYTES = 2048  # of a program's shared memory, kept by the driver and by the compiler

MULTIPROCESSORS = 132  # an H200; only how finely the work is cut depends on it

# measured on an H200, 8 experts: 3.67 us at 4096 inputs, and 6.6 us at 11008; twice the tile, with twice the warps and
# 5 stages, takes 3.96 and 6.2 us
ROUTE_TILE = 4096  # weights of a router that are read at once
ROUTE_WARPS = 4
ROUTE_STAGES = 8  # one more than there are tiles in flight: 112 of the 128 KB of 8 rows of 4096 inputs

# of a router that is trained; not measured
THIRDS_BLOCK = 1024  # weights a program
GATES_PAIRS = 2048  # pairs of experts, of all its tokens, that a program ranks: 16 a thread
GATES_WARPS = 4

NEXT_PIECES = 32  # programs that look through a vocabulary for the next token

# of fp32 one, two or four loads of 16 bytes per thread, all in flight at once; the fastest counts. On an H200 a copy in
# pieces of 8 KiB reached 4.17 TB/s where pieces of 16 KiB reached 3.92: a floor must not flatter what is held to it.
STREAM_BLOCKS = (1024, 2048, 4096)
STREAM_WARPS = 8


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


@dataclass(frozen=True)
class GemvConfig:
    """How `linear` and `fused` are cut: a program takes `tiles` tiles in turn, each of `rows` of W by `block` of I."""

    rows: int
    tiles: int
    block: int
    warps: int


@dataclass(frozen=True)
class LeanCut:
    """How a lean product is cut: `rows` of W by `block` inputs a tile, `tiles` in turn a program, `stages` of a tile in
    flight on tensor cores, and `front_rows` of A for each program that shrinks.
    """

    rows: int
    block: int
    warps: int
    stages: int = 1
    front_rows: int = 1
    tiles: int = 1


# What stands beside a product: no experts; those of gates that are known, of fewer than WIDE_TERMS terms (choices by
# rank) a row or of so many; those of routers of its own.
Neighbours = Literal["none", "known", "wide", "own"]
WIDE_TERMS = 128

# By tokens (the next power of two), inputs, outputs and what stands beside, as scripts/tune_lean.py prints them:
# Llama-2-7B at one token, on H200s. What lean_cut says of other shapes is a guess from these.
LEAN_CUTS: dict[tuple[int, int, int, Neighbours], LeanCut] = {
    (1, 4096, 4096, "none"): LeanCut(rows=4, block=2048, warps=8, tiles=2),
    (1, 4096, 12288, "none"): LeanCut(rows=4, block=2048, warps=8),
    (1, 4096, 22016, "none"): LeanCut(rows=4, block=2048, warps=8),
    (1, 4096, 32000, "none"): LeanCut(rows=4, block=2048, warps=8),
    (1, 11008, 4096, "none"): LeanCut(rows=2, block=2048, warps=4, tiles=2),
    (1, 4096, 4096, "known"): LeanCut(rows=8, block=1024, warps=4),
    (1, 4096, 12288, "known"): LeanCut(rows=8, block=1024, warps=4),
    (1, 4096, 22016, "known"): LeanCut(rows=8, block=1024, warps=4),
    (1, 11008, 4096, "known"): LeanCut(rows=2, block=2048, warps=4),
}


@dataclass(frozen=True)
class AttendCut:
    """How lean attention is cut: blocks of slots, at most so many programs beside each other for one head's context,
    and the fewest slots that are worth a program of their own.
    """

    block: int
    splits: int
    least: int
    warps: int


@dataclass(frozen=True)
class SwitchConfig:
    """Tile of W, tiles of one strip, and warps of a program."""

    block_o: int
    block_i: int
    tiles: int
    warps: int


def shrink_config(tokens: int, top_k: int, rows: int, inputs: int) -> ShrinkConfig:
    """Enough programs for the device, and few planes, because every reader adds them up."""
    steps = cdiv(inputs, 4 * 1024)
    programs = tokens * top_k * cdiv(inputs, steps * 1024)
    fits = (block for block in (16, 8, 4) if programs * cdiv(rows, block) >= MULTIPROCESSORS)
    return ShrinkConfig(next(fits, 2), 1024, steps, 4)


def expand_config(tokens: int, experts: int, rank: int, outputs: int, itemsize: int) -> ExpandConfig:
    """Enough programs for the device, each with most of what it reads in flight at once; `itemsize` is that of y."""
    if tokens <= FEW_TOKENS:
        block_r = power_of_2(rank)
        block_o = max(16, min(128, 2048 // block_r))
        while block_o > 16 and tokens * outputs // block_o < MULTIPROCESSORS:
            block_o //= 2
        return ExpandConfig(1, block_o, block_r, min(8, max(1, block_o * block_r // 256)))
    block_t = max(16, min(64, power_of_2(tokens)))
    # at least two steps, because one alone is not pipelined: its loads would wait for each other's registers. Measured
    # on an H200, a Llama-2-7B's projections on average: rank 64 and 8 tokens take 5.75 us, 6.19 with half as many steps
    terms = power_of_2(experts * rank)
    # of 8 experts 32 terms a step were best at rank 16, and 64 above
    block_c = max(16, min(32 if terms <= 128 or itemsize > 2 else 64, terms // 2))
    block_o = 64 if outputs * cdiv(tokens, block_t) >= 64 * MULTIPROCESSORS else 32
    # with up to six in flight
    return ExpandConfig(block_t, block_o, block_c, 4, min(6, cdiv(experts * rank, block_c) + 1))


def gemv_config(tokens: int, experts: bool) -> GemvConfig:
    """Where to cut. Of a program with experts the second tile never waits for the flag: one tile took 3.79 ms a token
    where two take 3.57, and four, 4.02, are too few programs (Llama-2-7B at rank 16 on an H200).
    """
    if tokens > 1:
        return GemvConfig(rows=2, tiles=1, block=1024, warps=4)
    if experts:
        return GemvConfig(rows=4, tiles=2, block=1024, warps=4)
    return GemvConfig(rows=4, tiles=1, block=2048, warps=8)


def fit_gemv(config: GemvConfig, inputs: int, edges: list[int]) -> GemvConfig:
    """`config` cut down to these sizes: a program's rows divide every edge of a member, so none belongs to two."""
    step, rows, tiles = math.gcd(*edges), config.rows, config.tiles
    while step % (rows * tiles):
        rows, tiles = (rows, tiles // 2) if tiles > 1 else (rows // 2, 1)
    block = min(config.block, max(power_of_2(inputs), 16))
    # a block that divides I needs no mask; below 512 a tile has too few loads to be worth it
    even = next((b for b in (block, block // 2, block // 4) if b >= 512 and inputs % b == 0), block)
    return replace(config, rows=rows, tiles=tiles, block=even)


def lean_cut(tokens: int, inputs: int, outputs: int, gated: bool, beside: Neighbours) -> LeanCut:
    """What was measured for this shape, or where else to cut; `outputs` counts both halves of a gated product."""
    found = LEAN_CUTS.get((power_of_2(tokens), inputs, outputs, beside))
    if found is not None:
        return found
    if tokens > GEMV_TOKENS:
        # enough programs for every multiprocessor, and as few as that allows: each reads all of x
        rows = next((r for r in (64, 32) if outputs // r >= 2 * MULTIPROCESSORS), 32 if gated else 16)
        return LeanCut(rows=rows, block=128, warps=4, stages=4, front_rows=16)
    if inputs > 2 * outputs:
        return LeanCut(rows=2, block=2048, warps=4, tiles=2 if beside == "none" else 1)
    if beside in ("wide", "own"):
        # as was best of three for Llama-2-7B at one token
        return LeanCut(rows=4, block=2048, warps=4)
    if beside != "none":
        # what experts add is a program's, not a row's: many rows a program
        return LeanCut(rows=8, block=1024, warps=4)
    # of a small product all programs run at once, and the second tile is on its way while the first ends
    return LeanCut(rows=4, block=2048, warps=8, tiles=2 if outputs <= 32 * MULTIPROCESSORS else 1)


def fit_lean(cut: LeanCut, inputs: int, outputs: int, members: Members, gated: bool) -> LeanCut:
    """`cut` for these sizes: no program has rows of two members, nor of a member and of a linear without experts."""
    edges = [edge for column, width in members for edge in (column, column + width) if 0 < edge < outputs]
    step, rows = math.gcd(*edges), min(cut.rows, power_of_2(outputs))
    while step % rows:
        rows //= 2
    rows, tiles = max(rows, 2 if gated else 1), cut.tiles
    while cdiv(outputs, rows) % tiles:
        tiles //= 2
    return replace(cut, rows=rows, tiles=tiles, block=min(cut.block, max(power_of_2(inputs), 16)))


def attend_cut(sequences: int, heads: int, slots: int) -> AttendCut:
    """Programs for every multiprocessor twice over where the context is long; `heads` are those of keys."""
    splits = min(cdiv(2 * MULTIPROCESSORS, sequences * heads), cdiv(slots, 128))
    return AttendCut(block=128, splits=max(1, splits), least=128, warps=8)


def switch_config(itemsize: int, rank: int) -> SwitchConfig:
    """On the chip are A of a tile's columns and B of its rows for every slot: high ranks need small tiles."""
    row_bytes = rank * itemsize
    if row_bytes > SWITCH_MAX_RANK_BYTES:
        most = SWITCH_MAX_RANK_BYTES // itemsize
        raise ValueError(
            f"the switch kernel takes ranks up to {most} at {itemsize} bytes a number, not {rank}"
        )
    if row_bytes > 128 or itemsize > 2:
        block_i = 32 if row_bytes > 256 else 64
        return SwitchConfig(32, block_i, tiles=32, warps=4)
    # a long strip loads its A seldom, which is much at high ranks; a short one leaves no multiprocessor without work
    return SwitchConfig(64, 128, tiles=16 if rank <= 32 else 32, warps=8)


def switch_stages(config: SwitchConfig, depth: int, itemsize: int, shared_bytes: int) -> int:
    """How many tiles of W and B may be on their way at once: as many as fit beside A, but no more than help.

    At 3 TB/s and a microsecond of latency a multiprocessor must have some 24 KB under way at all times.
    """
    kept = depth * config.block_i * itemsize
    each = config.block_o * (depth + config.block_i) * itemsize
    return max(1, min(SWITCH_MAX_STAGES, (shared_bytes - kept - SWITCH_RESERVED_BYTES) // each))


def flat(members: Members) -> dict[str, int]:
    """(column, width) of three members as scalars of a kernel; the missing ones have no width, hence no tiles."""
    if not 1 <= len(members) <= MAX_MEMBERS:
        raise ValueError(f"{len(members)} members: the kernels take 1 to {MAX_MEMBERS}")
    padded = [*members, *[(0, 0)] * (MAX_MEMBERS - len(members))]
    columns = {f"column_{g}": column for g, (column, _) in enumerate(padded)}
    return columns | {f"width_{g}": width for g, (_, width) in enumerate(padded)}


def check_tokens(tokens: int, most: int) -> None:
    """Raises ValueError beyond what a kernel for few tokens takes."""
    if not 1 <= tokens <= most:
        raise ValueError(f"{tokens} tokens: this kernel takes 1 to {most}; gather.expand_all_ takes more")


def rows_of(matrix: Tensor) -> Tensor:
    """The matrix with contiguous rows, which may lie apart."""
    return matrix if matrix.stride(-1) == 1 else matrix.contiguous()


def output_tiles(members: Members, block_o: int) -> int:
    """Tiles of all members; none crosses from one member into the next."""
    return sum(cdiv(width, block_o) for _, width in members)


def stride_unit(*strides: int) -> int:
    """What a kernel multiplies these strides by: Triton by itself finds out nothing less than multiples of 16.

    Rows with the logits of 8 experts behind them are an odd multiple of 8 long: 16 bytes in bf16, a whole load.
    """
    return ROW_MULTIPLE if all(stride % ROW_MULTIPLE == 0 for stride in strides) else 1


def cdiv(number: int, step: int) -> int:
    """`number / step`, rounded up."""
    return -(-number // step)


def power_of_2(number: int) -> int:
    """The next one from `number` on, which is at least 1."""
    return 1 << (number - 1).bit_length()
