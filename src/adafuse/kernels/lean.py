"""A product of a lean decode step: all that stands between two reads of the hidden state, in one launch.

In: x [T, I] as the launch before left it, W [O, I], what is done around the product (`Product`), experts beside it
(beside.py), and how the work is cut. Out: y, or the sum that goes on from layer to layer with what the next norm needs.
A norm is a weight per input and a scalar per token. The writer of the sum multiplies by the weight (x, rounded as a
norm would) and leaves sums of squares in fixed slots; the reader multiplies by the scalar, after its product. A launch
may start before the one before has ended (programmatic dependent launch): nothing that it writes is touched before
`gdc_wait`, but W, and A and B of experts that were chosen long before, are asked for. Letters as in naive.py, names as
in gather.py; README.md, section lean, has the reasons. Next: attend.py, ends.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adafuse.kernels.beside import (
    _DOWN,
    Beside,
    arguments,
    chosen_lows,
    expand_all,
    few_gates,
    few_lows,
    few_sum,
    few_ups,
    front,
    is_missing,
    load_terms,
    member,
    member_start,
    neighbours,
    one_copy,
)
from adafuse.kernels.config import GEMV_TOKENS, LeanCut, cdiv, fit_lean, lean_cut
from adafuse.kernels.gather import _dot_type
from adafuse.kernels.route import choose_alone
from adafuse.kernels.times import MAX_EARLY, early_rows, load_squares, rstd, times_x

INDEPENDENT = {"PDL": False}


@dataclass(frozen=True)
class Norm:
    """Of the input: sums of squares [T, P] of what it is a multiple of, and the norm's epsilon."""

    squares_TP: Tensor
    eps: float


@dataclass(frozen=True)
class Residual:
    """The sum of all layers' outputs in fp32, and what its next reader finds: it times its norm's weight, squares."""

    sum_TO: Tensor
    norm_O: Tensor
    next_TO: Tensor
    squares_TP: Tensor


@dataclass(frozen=True)
class Product:
    """y = (W x) rstd + b + experts; W None: y = x + experts. Gated: silu of the first half of y times the second.

    With `residual` y is added there and goes nowhere else. `alone`: it starts when all before has ended, and what comes
    next when it has: what it reads early, or what comes next reads early, was written just before.
    """

    x_TI: Tensor
    weight_OI: Tensor | None
    bias_O: Tensor | None = None
    y_TO: Tensor | None = None
    norm: Norm | None = None
    residual: Residual | None = None
    gated: bool = False
    beside: Beside | None = None
    alone: bool = False
    cut: LeanCut | None = None

    @property
    def outputs(self) -> int:
        return self.x_TI.shape[1] if self.weight_OI is None else self.weight_OI.shape[0]

    def fitted(self) -> LeanCut:
        """How this launch is cut."""
        (tokens, inputs), beside = self.x_TI.shape, self.beside
        cut = self.cut or lean_cut(tokens, inputs, self.outputs, self.gated, neighbours(beside))
        experts = beside is not None and beside.lora_B_EOR is not None and not self.gated
        return fit_lean(cut, inputs, self.outputs, beside.members if experts and beside else [], self.gated)


def product(work: Product) -> None:
    """Launch it."""
    (tokens, inputs), cut, outputs = work.x_TI.shape, work.fitted(), work.outputs
    tiles, tensor_cores = cdiv(outputs, cut.rows), tokens > GEMV_TOKENS
    beside, experts = work.beside, arguments(work.beside, tokens, cut)
    assert work.x_TI.is_contiguous()
    residual = work.residual
    # a side of a product on tensor cores is 16 at least; of a gated one's experts, half of the rows are
    assert not tensor_cores or cut.rows >= (32 if work.gated else 16), (cut, outputs)
    if residual is not None:
        assert residual.squares_TP.shape == (tokens, tiles), (residual.squares_TP.shape, tiles)
    product_kernel[(tiles // cut.tiles + experts["FRONT"],)](
        p_x=work.x_TI,
        p_W=work.weight_OI,
        p_bias=work.bias_O,
        p_y=work.y_TO,
        p_squares=work.norm and work.norm.squares_TP,
        p_sum=residual and residual.sum_TO,
        p_norm=residual and residual.norm_O,
        p_next=residual and residual.next_TO,
        p_squares_next=residual and residual.squares_TP,
        eps=work.norm.eps if work.norm else 0.0,
        **experts,
        T=tokens,
        PADDED=max(16 if tensor_cores else 1, triton.next_power_of_2(tokens)),
        OUTPUTS=outputs,
        INPUTS=inputs,
        PARTS=work.norm.squares_TP.shape[1] if work.norm else 0,
        GATED=work.gated,
        ROWS=cut.rows,
        THREADS=32 * cut.warps,
        TILES=cut.tiles,
        BLOCK=cut.block,
        STAGES=cut.stages,
        TENSOR_CORES=tensor_cores,
        DOT=_dot_type(work.x_TI),
        BLOCK_C=16
        if beside is None
        else max(16, min(128, triton.next_power_of_2(beside.experts * beside.rank))),
        num_warps=cut.warps,
        **(INDEPENDENT if work.alone else dependent(work.x_TI.device)),
    )


@triton.jit
def rows_of_tile(i_tile, OUTPUTS: tl.constexpr, ROWS: tl.constexpr, GATED: tl.constexpr):
    """Rows of W of a tile, and whether they exist; GATED: each of the first half beside its fellow of the second."""
    o_row = i_tile * ROWS + tl.arange(0, ROWS)
    m_row = o_row < OUTPUTS
    if GATED:
        o_row = o_row // 2 + o_row % 2 * (OUTPUTS // 2)
    return o_row, m_row


def dependent(device: torch.device) -> dict[str, Any]:
    """What a launch says where it may start before the one before has ended: on Hopper and later."""
    early = device.type == "cuda" and _hopper(device.index or 0)
    return {"PDL": True, "launch_pdl": True} if early else INDEPENDENT


@cache
def _hopper(index: int) -> bool:
    return torch.cuda.get_device_capability(index) >= (9, 0)


@triton.jit(do_not_specialize=["turn", "logits_stride"])
def product_kernel(
    p_x, p_W, p_bias, p_y, p_squares, p_sum, p_norm, p_next, p_squares_next,
    p_A, p_B, p_index, p_weight, p_h, p_logits, p_flags, p_slots,
    turn, logits_stride, eps, scaling,
    COLUMN_0: tl.constexpr, WIDTH_0: tl.constexpr, COLUMN_1: tl.constexpr, WIDTH_1: tl.constexpr,
    COLUMN_2: tl.constexpr, WIDTH_2: tl.constexpr,
    T: tl.constexpr, PADDED: tl.constexpr, OUTPUTS: tl.constexpr, INPUTS: tl.constexpr, PARTS: tl.constexpr,
    GATED: tl.constexpr,
    FRONT: tl.constexpr, FRONT_ROWS: tl.constexpr, FRONT_BLOCK: tl.constexpr, ROWS_A: tl.constexpr,
    ROWS_B: tl.constexpr, G: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, CHOSEN: tl.constexpr,
    EXPAND: tl.constexpr,
    ROUTED: tl.constexpr, ROUTERS: tl.constexpr, RAW: tl.constexpr, GELU: tl.constexpr, READY: tl.constexpr,
    ROWS: tl.constexpr, TILES: tl.constexpr, BLOCK: tl.constexpr, BLOCK_C: tl.constexpr, STAGES: tl.constexpr,
    THREADS: tl.constexpr, TENSOR_CORES: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`Product`. Grid: FRONT programs that shrink, then some with TILES tiles of ROWS rows of W (GATED: half of them of
    either half of W).

    p_x [T, I]; p_W [O, I] or None; p_bias [O]; p_y [T, O], or [T, O / 2] of GATED; p_squares [T, PARTS]; p_sum [T, O]
    in fp32, p_norm [O], p_next [T, O], p_squares_next [T, tiles]; p_A [ROWS_A, I]; p_B [E, ROWS_B, R]; p_index and
    p_weight [T, K], with ROUTED [T, G, K]; p_h in fp32, [T * K, G * R] of the CHOSEN rows or [T, ROWS_A] of all;
    p_logits [T, G * E] in fp32, rows `logits_stride` apart. p_flags[turn] counts the programs that have shrunk; the
    step's last launch lowers all flags (ends.py).
    """
    i_program = tl.program_id(0)
    if PDL:
        gdc_launch_dependents()
    if FRONT > 0:
        if i_program < FRONT:
            front(
                i_program, p_x, p_squares, p_A, p_index, p_weight, p_h, p_flags, None if GATED else p_slots, turn, eps,
                T, PADDED, INPUTS, PARTS, FRONT_ROWS, ROWS_A, G, E, K, R, CHOSEN, EXPAND, READY, FRONT_BLOCK,
                STAGES, TENSOR_CORES, DOT, PDL,
            )  # fmt: skip
            return
    HALF: tl.constexpr = ROWS // 2 if GATED else ROWS
    WIDTH: tl.constexpr = OUTPUTS // 2 if GATED else OUTPUTS
    WHOLE: tl.constexpr = OUTPUTS % ROWS == 0
    FEW: tl.constexpr = EXPAND and not TENSOR_CORES
    MIXED: tl.constexpr = GATED and p_slots is not None
    BLOCKS: tl.constexpr = (INPUTS + BLOCK - 1) // BLOCK
    # beside experts all of few blocks are asked for before anything is waited for
    EARLY: tl.constexpr = BLOCKS if BLOCKS <= MAX_EARLY and FEW else 1
    if CHOSEN:
        TERMS: tl.constexpr = PADDED * ROWS * triton.next_power_of_2(K * R)
        COPIES: tl.constexpr = (THREADS + TERMS - 1) // TERMS
        p_last = (p_h + T * K * G * R - 1).to(tl.pointer_type(tl.int32), bitcast=True)
    # whether the flag is raised: once a program has seen it there is nothing to wait for
    seen = False
    for tile in tl.static_range(TILES):
        i_tile = (i_program - FRONT) * TILES + tile
        o_y = i_tile * HALF + tl.arange(0, HALF)
        m_y = o_y < WIDTH
        o_row, m_row = rows_of_tile(i_tile, OUTPUTS, ROWS, GATED)
        i_g, shift = member(i_tile * HALF, COLUMN_0, WIDTH_0, COLUMN_1, WIDTH_1, COLUMN_2, WIDTH_2)
        i_up, shift_up = member(WIDTH, COLUMN_0, WIDTH_0, COLUMN_1, WIDTH_1, COLUMN_2, WIDTH_2)
        b_g, b_shift = member(o_row, COLUMN_0, WIDTH_0, COLUMN_1, WIDTH_1, COLUMN_2, WIDTH_2)
        b_g = tl.where(m_row, b_g, -1)
        if CHOSEN and READY and tile == 0:
            b_e, b_chosen = few_gates(
                p_index, p_weight, p_logits, logits_stride, tl.zeros((1,), tl.int32), m_row, m_row, True,
                T, PADDED, G, E, K, R, False, RAW,
            )  # fmt: skip
        p_rows = p_W
        if p_W is not None:
            p_rows = p_W + o_row.to(tl.int64) * INPUTS
            if tile == 0:
                if CHOSEN and READY:
                    # loads come back in the order they are asked for: gates, of which B's place hangs, then W, then B
                    tl.debug_barrier()
                b_W = early_rows(p_rows, m_row, INPUTS, BLOCK, WHOLE, EARLY, TENSOR_CORES)
                if EXPAND:
                    tl.debug_barrier()
        if TENSOR_CORES and EXPAND:
            b_B = load_terms(p_B, 0, o_y + shift, m_y & (i_g >= 0), ROWS_B, E, R, BLOCK_C)
            b_B_up = b_B
            if GATED:
                o_up = o_y + WIDTH + shift_up
                b_B_up = load_terms(p_B, 0, o_up, m_y & (i_up >= 0), ROWS_B, E, R, BLOCK_C)
        if PDL and tile == 0 and not (CHOSEN and READY):
            gdc_wait()
        if CHOSEN:
            if not READY and tile == 0:
                b_e, b_chosen = few_gates(
                    p_index, p_weight, p_logits, logits_stride, tl.zeros((1,), tl.int32), m_row, m_row, True,
                    T, PADDED, G, E, K, R, False, RAW,
                )  # fmt: skip
            b_gate = tl.where((b_g >= 0)[None, :, None], b_chosen, 0.0)
            if tile == 0 or p_W is None:
                b_B_next = few_ups(p_B, b_e, b_gate, b_g, o_row + b_shift, ROWS_B, K, R)
            b_B = b_B_next
            if PDL and tile == 0 and READY:
                gdc_wait()
        o_t = tl.arange(0, PADDED)
        m_t = o_t < T
        m_out = m_t[:, None] & m_y[None, :]
        o_out = o_t[:, None] * WIDTH + o_y[None, :]
        if not TENSOR_CORES:
            # what the end needs is on its way while W is
            if PARTS > 0:
                b_squares = load_squares(p_squares, T, PARTS, PADDED)
            if p_sum is not None:
                b_before = tl.load(p_sum + o_out, mask=m_out, other=0.0)
                b_norm = tl.load(p_norm + o_y, mask=m_y, other=0.0)
        if CHOSEN:
            b_lows = chosen_lows(p_h, b_chosen, b_g, G, K, R, COPIES)
            # or the compiler would ask for h behind the product, and wait for it there
            tl.debug_barrier()
        m_first = m_row & (o_row == member_start(b_g, COLUMN_0, COLUMN_1, COLUMN_2)) & (b_g >= 0)
        if FEW and not CHOSEN:
            # most programs start when all is shrunk, and have it long before their rows are multiplied
            if not seen:
                # relaxed, because to acquire empties the L1 cache of x; what is read behind it hangs on what it says,
                # and comes from L2, where whoever raised the flag had left it before
                seen = tl.atomic_add(p_flags + turn, 0, sem="relaxed") - _DOWN >= FRONT
            if ROUTED:
                b_e, b_gate = few_gates(
                    p_index, p_weight, p_logits, logits_stride, b_g, m_row, m_first, seen,
                    T, PADDED, ROUTERS, E, K, R, True, RAW,
                )  # fmt: skip
                b_B = few_ups(p_B, b_e, b_gate, b_g, o_row + b_shift, ROWS_B, K, R)
            b_h = few_lows(p_h, b_e, b_gate, b_g, seen, ROWS_A, E, K, R)
        if p_W is not None:
            b_y = times_x(
                b_W, p_rows, m_row, p_x, INPUTS, T, PADDED, BLOCK, WHOLE, EARLY, STAGES, TENSOR_CORES, DOT
            )
            if tile + 1 < TILES:
                # on its way while this tile ends
                o_next, m_next = rows_of_tile(i_tile + 1, OUTPUTS, ROWS, GATED)
                p_next_rows = p_W + o_next.to(tl.int64) * INPUTS
                b_W = early_rows(p_next_rows, m_next, INPUTS, BLOCK, WHOLE, EARLY, TENSOR_CORES)
                if CHOSEN:
                    g_next, shift_next = member(
                        o_next, COLUMN_0, WIDTH_0, COLUMN_1, WIDTH_1, COLUMN_2, WIDTH_2
                    )
                    g_next = tl.where(m_next, g_next, -1)
                    b_next = tl.where((g_next >= 0)[None, :, None], b_chosen, 0.0)
                    b_B_next = few_ups(p_B, b_e, b_next, g_next, o_next + shift_next, ROWS_B, K, R)
            if PARTS > 0:
                if TENSOR_CORES:
                    b_squares = load_squares(p_squares, T, PARTS, PADDED)
                b_y *= rstd(b_squares, eps, INPUTS)[:, None]
            if p_bias is not None:
                b_y += tl.load(p_bias + o_row, mask=m_row, other=0.0).to(tl.float32)[None, :]
        else:
            b_y = tl.load(p_x + o_t[:, None] * INPUTS + o_y[None, :], mask=m_out, other=0.0).to(tl.float32)
        if CHOSEN:
            while is_missing(b_lows):
                # one thread asks for the last of it: were all to ask, what they ask for would be late
                while tl.atomic_add(p_last, 0, sem="relaxed") == _DOWN:
                    pass
                b_lows = chosen_lows(p_h, b_chosen, b_g, G, K, R, COPIES)
            b_h = one_copy(b_lows, COPIES)
        elif EXPAND:
            has_experts = i_g >= 0
            if GATED:
                has_experts = has_experts | (i_up >= 0)
            if has_experts & (not seen):
                while tl.atomic_add(p_flags + turn, 0, sem="acquire") - _DOWN < FRONT:
                    pass
                seen = True
                if FEW:
                    if ROUTED:
                        b_e, b_gate = few_gates(
                            p_index, p_weight, p_logits, logits_stride, b_g, m_row, m_first, True,
                            T, PADDED, ROUTERS, E, K, R, True, RAW,
                        )  # fmt: skip
                        b_B = few_ups(p_B, b_e, b_gate, b_g, o_row + b_shift, ROWS_B, K, R)
                    b_h = few_lows(p_h, b_e, b_gate, b_g, True, ROWS_A, E, K, R)
        starts = i_tile == 0
        if not GATED:
            starts = i_tile * ROWS == member_start(i_g, COLUMN_0, COLUMN_1, COLUMN_2)
        if FEW and not MIXED:
            b_y += few_sum(b_B, b_gate, b_h, scaling, GELU)
        b_up = b_y
        if GATED and not (FEW and MIXED):
            b_y, b_up = tl.split(tl.reshape(b_y, (PADDED, HALF, 2)))
        if MIXED:
            # each choice has an MLP of its own, up to here
            b_mix = tl.zeros((PADDED, HALF), tl.float32)
            if TENSOR_CORES:
                p_own = p_logits + tl.minimum(o_t, T - 1) * logits_stride
                _b_index, b_share = choose_alone(p_own, E, K, RAW)
            for k in tl.static_range(K):
                if FEW:
                    b_share_k = tl.where(
                        (tl.arange(0, b_gate.shape[2]) // R == k)[None, None, :], b_gate, 0.0
                    )
                    b_all = b_y + few_sum(b_B, (b_share_k != 0).to(tl.float32), b_h, scaling, GELU)
                    b_own, b_own_up = tl.split(tl.reshape(b_all, (PADDED, HALF, 2)))
                    b_weight, _b_same = tl.split(tl.reshape(tl.max(b_share_k, 2), (PADDED, HALF, 2)))
                else:
                    b_own = b_y + expand_all(
                        b_B, p_B, p_index, p_weight, p_h, p_logits, logits_stride, scaling, tl.maximum(i_g, 0),
                        i_g >= 0, o_y + shift, m_y & (i_g >= 0), starts,
                        ROWS_A, ROWS_B, T, PADDED, ROUTERS, E, K, R, ROUTED, RAW, GELU, k, False, BLOCK_C, DOT,
                    )  # fmt: skip
                    b_own_up = b_up + expand_all(
                        b_B_up, p_B, p_index, p_weight, p_h, p_logits, logits_stride, scaling, tl.maximum(i_up, 0),
                        i_up >= 0, o_y + WIDTH + shift_up, m_y & (i_up >= 0), starts,
                        ROWS_A, ROWS_B, T, PADDED, ROUTERS, E, K, R, ROUTED, RAW, GELU, k, False, BLOCK_C, DOT,
                    )  # fmt: skip
                    b_weight = b_share[k][:, None]
                b_own = b_own / (1.0 + tl.exp(-b_own)) * b_own_up
                p_slot = p_slots + (o_t * K + k)[:, None] * WIDTH + o_y[None, :]
                tl.store(p_slot, b_own.to(p_slots.dtype.element_ty), mask=m_out)
                b_mix += b_own * b_weight
            b_y = b_mix
        elif TENSOR_CORES and EXPAND:
            OF_SLOTS: tl.constexpr = p_slots is not None
            b_y += expand_all(
                b_B, p_B, p_index, p_weight, p_h, p_logits, logits_stride, scaling, tl.maximum(i_g, 0), i_g >= 0,
                o_y + shift, m_y & (i_g >= 0), starts,
                ROWS_A, ROWS_B, T, PADDED, ROUTERS, E, K, R, ROUTED, RAW, GELU, -1, OF_SLOTS, BLOCK_C, DOT,
            )  # fmt: skip
            if GATED:
                b_up += expand_all(
                    b_B_up, p_B, p_index, p_weight, p_h, p_logits, logits_stride, scaling, tl.maximum(i_up, 0),
                    i_up >= 0, o_y + WIDTH + shift_up, m_y & (i_up >= 0), starts,
                    ROWS_A, ROWS_B, T, PADDED, ROUTERS, E, K, R, ROUTED, RAW, GELU, -1, False, BLOCK_C, DOT,
                )  # fmt: skip
        if GATED and not MIXED:
            b_y = b_y / (1.0 + tl.exp(-b_y)) * b_up
        if p_sum is not None:
            if TENSOR_CORES:
                b_before = tl.load(p_sum + o_out, mask=m_out, other=0.0)
                b_norm = tl.load(p_norm + o_y, mask=m_y, other=0.0)
            b_sum = b_before + b_y
            tl.store(p_sum + o_out, b_sum, mask=m_out)
            tl.store(
                p_next + o_out,
                (b_sum * b_norm.to(tl.float32)[None, :]).to(p_next.dtype.element_ty),
                mask=m_out,
            )
            b_squares = tl.sum(tl.where(m_out, b_sum * b_sum, 0.0), 1)
            tl.store(p_squares_next + o_t * tl.cdiv(OUTPUTS, ROWS) + i_tile, b_squares, mask=m_t)
        else:
            tl.store(p_y + o_out, b_y.to(p_y.dtype.element_ty), mask=m_out)
