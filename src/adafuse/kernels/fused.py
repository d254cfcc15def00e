"""One launch for a decode-size linear and its chosen experts, so that experts cost no kernel of their own; and the
linear alone, at the speed at which its weight is read: the base that experts are added to, and the fair backbone.

In: up to FUSED_MAX_BATCH rows of x, the joined weight of the linears that share this input, the stacked experts, and
which experts each token takes (naive.py has the letters, gather.py the names). Out: y, rounded once. The first programs
of the grid multiply x by the chosen experts' A and raise a flag; the others multiply x by their rows of W, wait for the
flag and add their rows of B. gather.py serves more tokens. Next: ops.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adafuse.kernels.config import (
    FUSED_MAX_BATCH,
    GemvConfig,
    Members,
    check_tokens,
    fit_gemv,
    flat,
    gemv_config,
    rows_of,
)

# numbers and slices that differ between projections would be compiled once more for each multiple of 16
UNSPECIALISED = [*flat([(0, 0)]), "num_shrink", "turn", "next_turn"]
UNALIGNED = ["p_index", "p_gate", "p_flags"]


def linear(
    x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, config: GemvConfig | None = None
) -> Tensor:
    """y[T, O] = W x + b for T of 1 to FUSED_MAX_BATCH (else ValueError); bf16, fp16 or fp32, summed in fp32."""
    (tokens, inputs), outputs = x_TI.shape, weight_OI.shape[0]
    check_tokens(tokens, FUSED_MAX_BATCH)
    x_TI, weight_OI = rows_of(x_TI), weight_OI.contiguous()
    cut = fit_gemv(config or gemv_config(tokens, experts=False), inputs, [outputs])
    y_TO = torch.empty(tokens, outputs, dtype=x_TI.dtype, device=x_TI.device)
    linear_kernel[(outputs // (cut.rows * cut.tiles),)](
        p_x=x_TI,
        p_W=weight_OI,
        p_bias=bias_O,
        p_y=y_TO,
        x_stride=x_TI.stride(0),
        outputs=outputs,
        inputs=inputs,
        T=tokens,
        **constants(cut, inputs),
    )
    return y_TO


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
    config: GemvConfig | None = None,
) -> Tensor:
    """y[T, O] of naive.fused in one launch, for T of 1 to FUSED_MAX_BATCH and up to MAX_MEMBERS members.

    Anything else is a ValueError. `flags` [at least 2] are int32 zeros at first. A launch raises flags[turn] and lowers
    the next one, around the ring: launches that take turns in order need no node that clears. Columns of y outside the
    members get W x + b alone.
    """
    (tokens, inputs), outputs = x_TI.shape, weight_OI.shape[0]
    top_k, rows_A, (rows_B, rank) = index_TK.shape[1], lora_A_ECI.shape[1], lora_B_EOR.shape[1:]
    check_tokens(tokens, FUSED_MAX_BATCH)
    edges = flat(members)
    _check_members(members, outputs, rows_A, rows_B, rank)
    if len(flags) < 2 or flags.dtype != torch.int32:
        raise ValueError(f"flags must be at least two int32, not {len(flags)} of {flags.dtype}")
    x_TI, weight_OI = rows_of(x_TI), weight_OI.contiguous()
    cut = fit_gemv(config or gemv_config(tokens, experts=True), inputs, [outputs, *edges.values()])
    num_shrink = tokens * top_k * rows_A
    h_TKC = torch.empty(tokens, top_k, rows_A, dtype=torch.float32, device=x_TI.device)
    y_TO = torch.empty(tokens, outputs, dtype=x_TI.dtype, device=x_TI.device)
    fused_kernel[(num_shrink + outputs // (cut.rows * cut.tiles),)](
        p_x=x_TI,
        p_W=weight_OI,
        p_bias=bias_O,
        p_A=lora_A_ECI.contiguous(),
        p_B=lora_B_EOR.contiguous(),
        p_index=index_TK.contiguous(),
        p_gate=weight_TK.contiguous(),
        p_h=h_TKC,
        p_flags=flags,
        p_y=y_TO,
        x_stride=x_TI.stride(0),
        outputs=outputs,
        inputs=inputs,
        rows_A=rows_A,
        rows_B=rows_B,
        **edges,
        scaling=float(scaling),
        num_shrink=num_shrink,
        turn=turn,
        next_turn=(turn + 1) % len(flags),
        T=tokens,
        K=top_k,
        R=rank,
        **constants(cut, inputs),
    )
    return y_TO


def _check_members(members: Members, outputs: int, rows_A: int, rows_B: int, rank: int) -> None:
    if rows_A != len(members) * rank or rows_B != sum(size for _, size in members):
        raise ValueError(
            f"lora_A has {rows_A} rows and lora_B {rows_B} columns: not those of {members}, rank {rank}"
        )
    if any(column + size > outputs for column, size in members):
        raise ValueError(f"{members} reach beyond the {outputs} columns of y")


def constants(cut: GemvConfig, inputs: int) -> dict[str, int]:
    """What `linear_kernel` and `fused_kernel` are compiled for; EVEN: no block of I needs a mask."""
    even = inputs % cut.block == 0
    return {"ROWS": cut.rows, "TILES": cut.tiles, "BLOCK": cut.block, "EVEN": even, "num_warps": cut.warps}


@triton.jit
def linear_kernel(
    p_x, p_W, p_bias, p_y,
    x_stride, outputs, inputs,
    T: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y[T, O] = W x + b, without tensor cores, which T rows could not fill.

    Grid: O / (ROWS * TILES). A program takes TILES tiles in turn, each of ROWS rows of W, BLOCK inputs at a time (EVEN:
    I is a multiple, no mask). p_x [T, I], rows `x_stride` apart; p_W [O, I]; p_bias [O] or None; p_y [T, O].
    """
    first = tl.program_id(0) * ROWS * TILES
    for tile in tl.static_range(TILES):
        o_o = first + tile * ROWS + tl.arange(0, ROWS)
        p_rows = p_W + o_o.to(tl.int64) * inputs
        b_W, b_x = load_block(p_rows, p_x, x_stride, 0, inputs, T, BLOCK, EVEN)
        b_y = times_x(b_W, b_x, p_rows, p_x, x_stride, inputs, T, BLOCK, EVEN)
        finish(b_y, p_bias, p_y, o_o, outputs, T)


@triton.jit(do_not_specialize=UNSPECIALISED, do_not_specialize_on_alignment=UNALIGNED)
def fused_kernel(
    p_x, p_W, p_bias, p_A, p_B, p_index, p_gate, p_h, p_flags, p_y,
    x_stride, outputs, inputs, rows_A, rows_B,
    column_0, width_0, column_1, width_1, column_2, width_2,
    scaling, num_shrink, turn, next_turn,
    T: tl.constexpr, K: tl.constexpr, R: tl.constexpr, ROWS: tl.constexpr, TILES: tl.constexpr,
    BLOCK: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """y = W x + b + scaling * sum_k gate_k B[e_k] A[e_k] x, experts and base in one launch.

    Grid: `num_shrink` programs for h = A[e] x, one row of one (token, choice) pair each, and behind them
    O / (ROWS * TILES) for y as in `linear_kernel`. The hardware starts programs in the order of their numbers and
    nobody waits for a later one, so it ends. p_flags[turn] counts the programs that have stored their h, and
    p_flags[next_turn] is lowered.
    p_x [T, I], rows `x_stride` apart; p_W [O, I]; p_bias [O] or None; p_A [E, C = rows_A, I]; p_B [E, rows_B, R];
    p_index, p_gate [T, K]; p_h [T, K, C] in fp32, scratch; p_y [T, O]. Members as in gather.py; their rows of h
    and columns of the joined B follow each other. README.md, section fused, has the measurements.
    """
    i_program = tl.program_id(0)
    if i_program < num_shrink:
        i_pair = i_program // rows_A
        o_c = i_program % rows_A + tl.arange(0, 1)
        i_e = tl.load(p_index + i_pair).to(tl.int64)
        # of a slot without a gate nothing is read, here or below
        if tl.load(p_gate + i_pair) != 0:
            p_rows_A = p_A + (i_e * rows_A + o_c) * inputs
            p_x_t = p_x + i_pair // K * x_stride
            b_A, b_x_t = load_block(p_rows_A, p_x_t, x_stride, 0, inputs, 1, BLOCK, EVEN)
            b_low = times_x(b_A, b_x_t, p_rows_A, p_x_t, x_stride, inputs, 1, BLOCK, EVEN)
            tl.store(p_h + i_pair * rows_A + o_c[None, :], b_low)
        # every thread's h is stored before the one thread that holds the atomic releases it
        tl.debug_barrier()
        tl.atomic_add(p_flags + turn, 1, sem="release")
        if i_program == 0:
            # raised a round ago and read by nobody now; the next launch starts when this one has ended
            tl.store(p_flags + next_turn, 0)
    else:
        first = (i_program - num_shrink) * ROWS * TILES
        i_g, shift = _member(first, column_0, width_0, column_1, width_1, column_2, width_2)
        o_pair, m_pair = _pairs(T, K)
        m_pair = m_pair & (i_g >= 0)
        b_expert = tl.load(p_index + o_pair, mask=m_pair, other=0).to(tl.int64)
        b_gate = tl.load(p_gate + o_pair, mask=m_pair, other=0.0) * scaling
        m_pair = m_pair & (b_gate != 0)
        for tile in tl.static_range(TILES):
            o_o = first + tile * ROWS + tl.arange(0, ROWS)
            p_rows = p_W + o_o.to(tl.int64) * inputs
            b_W, b_x = load_block(p_rows, p_x, x_stride, 0, inputs, T, BLOCK, EVEN)
            # B has to wait for the expert's number: asked for behind the first block of W, it holds no W up
            b_B = _load_B(p_B, b_expert * rows_B, m_pair, o_o + shift, R)
            b_y = times_x(b_W, b_x, p_rows, p_x, x_stride, inputs, T, BLOCK, EVEN)
            if tile == 0:
                if i_g >= 0:
                    # programs that start late find the flag raised and go through once
                    while tl.atomic_add(p_flags + turn, 0, sem="acquire") < num_shrink:
                        pass
                b_h = _load_h(p_h, o_pair * rows_A + i_g * R, m_pair, R) * b_gate[:, None]
            b_y += _expand(b_B, b_h, T, K, ROWS)
            finish(b_y, p_bias, p_y, o_o, outputs, T)


@triton.jit
def load_block(
    p_rows, p_x, x_stride, start, inputs, T: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr
):
    """[1, ROWS, BLOCK] of the rows at `p_rows` and [T, 1, BLOCK] of x from `start` on, as they are in memory."""
    PADDED: tl.constexpr = triton.next_power_of_2(T)
    o_t, o_i = tl.arange(0, PADDED)[:, None, None], start + tl.arange(0, BLOCK)[None, None, :]
    p_block, p_x_block, m_i = p_rows[None, :, None] + o_i, p_x + o_t * x_stride + o_i, o_i < inputs
    if EVEN:
        b_W = tl.load(p_block, eviction_policy="evict_first")
    else:
        b_W = tl.load(p_block, mask=m_i, other=0.0, eviction_policy="evict_first")
    if EVEN and T == PADDED:
        b_x = tl.load(p_x_block, eviction_policy="evict_last")
    else:
        b_x = tl.load(p_x_block, mask=(o_t < T) & m_i, other=0.0, eviction_policy="evict_last")
    return b_W, b_x


@triton.jit
def times_x(
    b_W, b_x, p_rows, p_x, x_stride, inputs, T: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr
):
    """[T, ROWS] dot products of the rows at `p_rows` with each row of x; the first block is at hand."""
    b_sum = b_W.to(tl.float32) * b_x.to(tl.float32)
    for start in range(BLOCK, inputs, BLOCK):
        b_W, b_x = load_block(p_rows, p_x, x_stride, start, inputs, T, BLOCK, EVEN)
        b_sum += b_W.to(tl.float32) * b_x.to(tl.float32)
    # one sum over the threads at the end, not one a block
    return tl.sum(b_sum, 2)


@triton.jit
def finish(b_y, p_bias, p_y, o_o, outputs, T: tl.constexpr):
    """Adds the bias, rounds and stores the rows of y that exist."""
    if p_bias is not None:
        b_y += tl.load(p_bias + o_o).to(tl.float32)[None, :]
    o_t = tl.arange(0, triton.next_power_of_2(T))[:, None]
    tl.store(p_y + o_t * outputs + o_o[None, :], b_y.to(p_y.dtype.element_ty), mask=o_t < T)


@triton.jit
def _member(first, column_0, width_0, column_1, width_1, column_2, width_2):
    """The member that column `first` of y belongs to (or -1), and what leads from it to a column of the joined B."""
    in_0 = (first >= column_0) & (first < column_0 + width_0)
    in_1 = (first >= column_1) & (first < column_1 + width_1)
    in_2 = (first >= column_2) & (first < column_2 + width_2)
    i_g = tl.where(in_0, 0, tl.where(in_1, 1, tl.where(in_2, 2, -1)))
    shift = tl.where(in_0, -column_0, tl.where(in_1, width_0 - column_1, width_0 + width_1 - column_2))
    return i_g, shift


@triton.jit
def _pairs(T: tl.constexpr, K: tl.constexpr):
    """Flat numbers of the (token, choice) pairs, both padded to powers of two, and which of them exist."""
    PADDED: tl.constexpr = triton.next_power_of_2(K)
    o_pair = tl.arange(0, triton.next_power_of_2(T) * PADDED)
    o_t, o_k = o_pair // PADDED, o_pair % PADDED
    return o_t * K + o_k, (o_t < T) & (o_k < K)


@triton.jit
def _load_B(p_B, o_expert, m_pair, o_column, R: tl.constexpr):
    """[pairs, ROWS, R] of B: each pair's expert, these columns of the joined members."""
    o_r = tl.arange(0, triton.next_power_of_2(R))[None, None, :]
    p_up = p_B + (o_expert[:, None, None] + o_column[None, :, None]) * R + o_r
    m_up = m_pair[:, None, None] & (o_r < R)
    return tl.load(p_up, mask=m_up, other=0.0, eviction_policy="evict_first")


@triton.jit
def _load_h(p_h, o_start, m_pair, R: tl.constexpr):
    """[pairs, R] of h, past the L1 cache, which does not see what other processors wrote."""
    o_r = tl.arange(0, triton.next_power_of_2(R))[None, :]
    m_h = m_pair[:, None] & (o_r < R)
    return tl.load(p_h + o_start[:, None] + o_r, mask=m_h, other=0.0, cache_modifier=".cg")


@triton.jit
def _expand(b_B, b_h, T: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr):
    """[T, ROWS] of B h, summed over each token's choices."""
    b_delta = tl.sum(b_B.to(tl.float32) * b_h[:, None, :], 2)
    return tl.sum(tl.reshape(b_delta, (triton.next_power_of_2(T), triton.next_power_of_2(K), ROWS)), 1)
