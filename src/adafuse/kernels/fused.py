"""One launch for a decode-size linear and its chosen experts, so that experts cost no kernel of their own.

In: up to MAX_TOKENS rows of x, the joined weight of the linears that share this input, the stacked experts, and
which experts each token takes (naive.py has the letters). Out: y, rounded once. The first programs of the grid
multiply x by the chosen experts' A and raise a flag; the others multiply x by their rows of W, wait for the flag and
add their rows of B. Programs start in the order of their numbers, so those that are waited for always run. gemv.py is
the same product without experts; gather.py serves more tokens. Next: ops.py.
"""
# ruff: noqa: ANN202 - a kernel's arguments are pointers and numbers that Triton types itself

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adafuse.kernels.gemv import (
    Config,
    check_tokens,
    config_of,
    constants,
    finish,
    fit,
    load_block,
    rows_of,
    times_x,
)
from adafuse.kernels.naive import Members

MAX_MEMBERS = 3
EDGES = [
    "column_0",
    "width_0",
    "column_1",
    "width_1",
    "column_2",
    "width_2",
    "num_shrink",
    "turn",
    "next_turn",
]


def fused(
    x_TI: Tensor,
    weight_OI: Tensor,
    bias_O: Tensor | None,
    lora_A_ECI: Tensor,
    lora_B_EOR: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    members: Members,
    scaling: float,
    flags: Tensor,
    turn: int,
    *,
    config: Config | None = None,
) -> Tensor:
    """y[T, O] of naive.fused in one launch, for T of 1 to MAX_TOKENS and up to MAX_MEMBERS members (else ValueError).

    `flags` [at least 2] are int32 zeros at first. A launch raises flags[turn] and lowers the next one, around the ring:
    launches that take turns in order need no node that clears. Columns of y outside the members get W x + b alone.
    """
    (tokens, in_features), out_features = x_TI.shape, weight_OI.shape[0]
    top_k, columns, (width, rank) = index_TK.shape[1], lora_A_ECI.shape[1], lora_B_EOR.shape[1:]
    check_tokens(tokens)
    _check_members(members, out_features, columns, width, rank)
    if len(flags) < 2 or flags.dtype != torch.int32:
        raise ValueError(f"flags must be at least two int32, not {len(flags)} of {flags.dtype}")
    x_TI, weight_OI = rows_of(x_TI), weight_OI.contiguous()
    edges = [out_features, *(edge for member in members for edge in member)]
    cut = fit(config or config_of(tokens, experts=True), in_features, edges, columns)
    num_shrink = tokens * top_k * (columns // cut.shrink_rows)
    h_TKC = torch.empty(tokens, top_k, columns, dtype=torch.float32, device=x_TI.device)
    y_TO = torch.empty(tokens, out_features, dtype=x_TI.dtype, device=x_TI.device)
    fused_kernel[(num_shrink + out_features // (cut.rows * cut.tiles),)](
        x_TI,
        weight_OI,
        bias_O,
        lora_A_ECI.contiguous(),
        lora_B_EOR.contiguous(),
        index_TK.contiguous(),
        weight_TK.contiguous(),
        h_TKC,
        flags,
        y_TO,
        x_TI.stride(0),
        out_features,
        in_features,
        columns,
        width,
        *(edge for member in [*members, *[(0, 0)] * (MAX_MEMBERS - len(members))] for edge in member),
        float(scaling),
        num_shrink,
        turn,
        (turn + 1) % len(flags),
        T=tokens,
        K=top_k,
        R=rank,
        SHRINK_ROWS=cut.shrink_rows,
        **constants(cut, in_features),
    )
    return y_TO


def _check_members(members: Members, out_features: int, columns: int, width: int, rank: int) -> None:
    if not 1 <= len(members) <= MAX_MEMBERS:
        raise ValueError(f"{len(members)} members: the kernel takes 1 to {MAX_MEMBERS}")
    if columns != len(members) * rank or width != sum(size for _, size in members):
        raise ValueError(
            f"lora_A has {columns} rows and lora_B {width} columns: not those of {members}, rank {rank}"
        )
    if any(column + size > out_features for column, size in members):
        raise ValueError(f"{members} reach beyond the {out_features} columns of y")


# numbers and slices that differ between projections would be compiled once more for each multiple of 16
@triton.jit(do_not_specialize=EDGES, do_not_specialize_on_alignment=["index_ptr", "gate_ptr", "flags_ptr"])
def fused_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    lora_A_ptr,
    lora_B_ptr,
    index_ptr,
    gate_ptr,
    h_ptr,
    flags_ptr,
    y_ptr,
    x_stride,
    out_features,
    in_features,
    columns,
    width,
    column_0,
    width_0,
    column_1,
    width_1,
    column_2,
    width_2,
    scaling,
    num_shrink,
    turn,
    next_turn,
    T: tl.constexpr,
    K: tl.constexpr,
    R: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    SHRINK_ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    program = tl.program_id(0)
    if program < num_shrink:
        pair = program // (columns // SHRINK_ROWS)
        o_c = program % (columns // SHRINK_ROWS) * SHRINK_ROWS + tl.arange(0, SHRINK_ROWS)
        expert = tl.load(index_ptr + pair).to(tl.int64)
        # of a slot without a gate nothing is read, here or below
        if tl.load(gate_ptr + pair) != 0:
            p_low = lora_A_ptr + (expert * columns + o_c) * in_features
            p_x = x_ptr + pair // K * x_stride
            b_a, b_x_low = load_block(p_low, p_x, x_stride, 0, in_features, 1, BLOCK, EVEN)
            b_low = times_x(b_a, b_x_low, p_low, p_x, x_stride, in_features, 1, BLOCK, EVEN)
            tl.store(h_ptr + pair * columns + o_c[None, :], b_low)
        # every thread's h is stored before the one thread that holds the atomic releases it
        tl.debug_barrier()
        tl.atomic_add(flags_ptr + turn, 1, sem="release")
        if program == 0:
            # raised a round ago and read by nobody now; the next launch starts when this one has ended
            tl.store(flags_ptr + next_turn, 0)
    else:
        first = (program - num_shrink) * ROWS * TILES
        member, shift = _member(first, column_0, width_0, column_1, width_1, column_2, width_2)
        o_pair, m_pair = _pairs(T, K)
        m_pair = m_pair & (member >= 0)
        b_expert = tl.load(index_ptr + o_pair, mask=m_pair, other=0).to(tl.int64)
        b_gate = tl.load(gate_ptr + o_pair, mask=m_pair, other=0.0) * scaling
        m_pair = m_pair & (b_gate != 0)
        for tile in tl.static_range(TILES):
            o_n = first + tile * ROWS + tl.arange(0, ROWS)
            p_rows = weight_ptr + o_n.to(tl.int64) * in_features
            b_w, b_x = load_block(p_rows, x_ptr, x_stride, 0, in_features, T, BLOCK, EVEN)
            # B has to wait for the expert's number: asked for behind the first block of W, it holds no W up
            b_up = _load_up(lora_B_ptr, b_expert * width, m_pair, o_n + shift, R)
            b_y = times_x(b_w, b_x, p_rows, x_ptr, x_stride, in_features, T, BLOCK, EVEN)
            if tile == 0:
                if member >= 0:
                    # programs that start late find the flag raised and go through once
                    while tl.atomic_add(flags_ptr + turn, 0, sem="acquire") < num_shrink:
                        pass
                b_h = _load_h(h_ptr, o_pair * columns + member * R, m_pair, R) * b_gate[:, None]
            b_y += _expand(b_up, b_h, T, K, ROWS)
            finish(b_y, bias_ptr, y_ptr, o_n, out_features, T)


@triton.jit
def _member(first, column_0, width_0, column_1, width_1, column_2, width_2):
    """The member that column `first` of y belongs to (or -1), and what leads from it to a column of the joined B."""
    in_0 = (first >= column_0) & (first < column_0 + width_0)
    in_1 = (first >= column_1) & (first < column_1 + width_1)
    in_2 = (first >= column_2) & (first < column_2 + width_2)
    member = tl.where(in_0, 0, tl.where(in_1, 1, tl.where(in_2, 2, -1)))
    shift = tl.where(in_0, -column_0, tl.where(in_1, width_0 - column_1, width_0 + width_1 - column_2))
    return member, shift


@triton.jit
def _pairs(T: tl.constexpr, K: tl.constexpr):
    """Flat numbers of the (token, choice) pairs, both padded to powers of two, and which of them exist."""
    PADDED: tl.constexpr = triton.next_power_of_2(K)
    o_p = tl.arange(0, triton.next_power_of_2(T) * PADDED)
    token, choice = o_p // PADDED, o_p % PADDED
    return token * K + choice, (token < T) & (choice < K)


@triton.jit
def _load_up(lora_B_ptr, b_start, m_pair, o_column, R: tl.constexpr):
    """[pairs, ROWS, R] of B: each pair's expert, these columns of the joined members."""
    o_r = tl.arange(0, triton.next_power_of_2(R))[None, None, :]
    p_up = lora_B_ptr + (b_start[:, None, None] + o_column[None, :, None]) * R + o_r
    mask = m_pair[:, None, None] & (o_r < R)
    return tl.load(p_up, mask=mask, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_h(h_ptr, b_start, m_pair, R: tl.constexpr):
    """[pairs, R] of h, past the L1 cache, which does not see what other processors wrote."""
    o_r = tl.arange(0, triton.next_power_of_2(R))[None, :]
    mask = m_pair[:, None] & (o_r < R)
    return tl.load(h_ptr + b_start[:, None] + o_r, mask=mask, other=0.0, cache_modifier=".cg")


@triton.jit
def _expand(b_up, b_h, T: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """[T, ROWS] of B h, summed over each token's choices."""
    b_delta = tl.sum(b_up.to(tl.float32) * b_h[:, None, :], 2)
    return tl.sum(tl.reshape(b_delta, (triton.next_power_of_2(T), triton.next_power_of_2(K), ROWS)), 1)
