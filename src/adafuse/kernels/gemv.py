"""The matrix-vector product of a decode step: a linear for one or two rows, at the speed at which its weight is read.

In: up to FUSED_MAX_BATCH rows of x and the joined weight of the linears that share them. Out: y, rounded once. It is
the base that fused.py adds experts to, and the fair backbone beside it. Letters as in naive.py, names as in
gather_kernels.py. Next: fused.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adafuse.kernels.config import FUSED_MAX_BATCH, GemvConfig, check_tokens, fit_gemv, gemv_config


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


def constants(cut: GemvConfig, inputs: int) -> dict[str, int]:
    """What `linear_kernel` and `fused_kernel` are compiled for; EVEN: no block of I needs a mask."""
    even = inputs % cut.block == 0
    return {"ROWS": cut.rows, "TILES": cut.tiles, "BLOCK": cut.block, "EVEN": even, "num_warps": cut.warps}


def rows_of(x_TI: Tensor) -> Tensor:
    """x with contiguous rows, which may lie apart."""
    return x_TI if x_TI.stride(-1) == 1 else x_TI.contiguous()


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
