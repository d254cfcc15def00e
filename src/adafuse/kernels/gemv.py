"""The matrix-vector product of a decode step: a linear for one or two rows, at the speed at which its weight is read.

In: up to MAX_TOKENS rows of x and the joined weight of the linears that share them. Out: y, rounded once. It is the
base that fused.py adds experts to, and the fair backbone beside it. Letters as in naive.py. Next: fused.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

# beyond, arithmetic without tensor cores is slower than the weight (README.md)
MAX_TOKENS = 2


@dataclass(frozen=True)
class Config:
    """How a launch is cut: a program takes `tiles` tiles in sequence, each of `rows` of W by `block` of I."""

    rows: int
    tiles: int
    block: int
    warps: int
    shrink_rows: int = 1


def linear(x_TI: Tensor, weight_OI: Tensor, bias_O: Tensor | None, *, config: Config | None = None) -> Tensor:
    """y[T, O] = W x + b for T of 1 to MAX_TOKENS (else ValueError); bf16, fp16 or fp32, summed in fp32."""
    (tokens, in_features), out_features = x_TI.shape, weight_OI.shape[0]
    check_tokens(tokens)
    x_TI, weight_OI = rows_of(x_TI), weight_OI.contiguous()
    cut = fit(config or config_of(tokens, experts=False), in_features, [out_features], 1)
    y_TO = torch.empty(tokens, out_features, dtype=x_TI.dtype, device=x_TI.device)
    linear_kernel[(out_features // (cut.rows * cut.tiles),)](
        x_TI,
        weight_OI,
        bias_O,
        y_TO,
        x_TI.stride(0),
        out_features,
        in_features,
        T=tokens,
        **constants(cut, in_features),
    )
    return y_TO


def config_of(tokens: int, experts: bool) -> Config:
    """Where to cut; a program with experts takes two tiles, because it waits for the flag once, in the first."""
    if tokens > 1:
        return Config(rows=2, tiles=1, block=1024, warps=4)
    if experts:
        return Config(rows=4, tiles=2, block=1024, warps=4)
    return Config(rows=4, tiles=1, block=2048, warps=8)


def fit(config: Config, in_features: int, edges: list[int], columns: int) -> Config:
    """`config` cut down to these sizes: a program's rows divide every edge of a member, so none belongs to two."""
    step, rows, tiles, shrink_rows = math.gcd(*edges), config.rows, config.tiles, config.shrink_rows
    while step % (rows * tiles):
        rows, tiles = (rows, tiles // 2) if tiles > 1 else (rows // 2, 1)
    while columns % shrink_rows:
        shrink_rows //= 2
    block = min(config.block, max(triton.next_power_of_2(in_features), 16))
    # a block that divides I needs no mask; below 512 a tile has too few loads to be worth it
    even = next((b for b in (block, block // 2, block // 4) if b >= 512 and in_features % b == 0), block)
    return replace(config, rows=rows, tiles=tiles, shrink_rows=shrink_rows, block=even)


def constants(cut: Config, in_features: int) -> dict[str, Any]:
    even = in_features % cut.block == 0
    return {"ROWS": cut.rows, "TILES": cut.tiles, "BLOCK": cut.block, "EVEN": even, "num_warps": cut.warps}


def rows_of(x_TI: Tensor) -> Tensor:
    return x_TI if x_TI.stride(1) == 1 else x_TI.contiguous()


def check_tokens(tokens: int) -> None:
    if not 1 <= tokens <= MAX_TOKENS:
        raise ValueError(f"{tokens} tokens: these kernels take 1 to {MAX_TOKENS}, gather.py takes more")


@triton.jit
def linear_kernel(
    x_ptr,
    weight_ptr,
    bias_ptr,
    y_ptr,
    x_stride,
    out_features,
    in_features,
    T: tl.constexpr,
    ROWS: tl.constexpr,
    TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    EVEN: tl.constexpr,
):
    first = tl.program_id(0) * ROWS * TILES
    for tile in tl.static_range(TILES):
        o_n = first + tile * ROWS + tl.arange(0, ROWS)
        p_rows = weight_ptr + o_n.to(tl.int64) * in_features
        b_w, b_x = load_block(p_rows, x_ptr, x_stride, 0, in_features, T, BLOCK, EVEN)
        b_y = times_x(b_w, b_x, p_rows, x_ptr, x_stride, in_features, T, BLOCK, EVEN)
        finish(b_y, bias_ptr, y_ptr, o_n, out_features, T)


@triton.jit
def load_block(
    p_rows, x_ptr, x_stride, start, in_features, T: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr
):
    """[1, ROWS, BLOCK] of the rows at `p_rows` and [T, 1, BLOCK] of x from `start` on, as they are in memory."""
    PADDED: tl.constexpr = triton.next_power_of_2(T)
    o_t, o_i = tl.arange(0, PADDED)[:, None, None], start + tl.arange(0, BLOCK)[None, None, :]
    p_w, p_x, m_i = p_rows[None, :, None] + o_i, x_ptr + o_t * x_stride + o_i, o_i < in_features
    if EVEN:
        b_w = tl.load(p_w, eviction_policy="evict_first")
    else:
        b_w = tl.load(p_w, mask=m_i, other=0.0, eviction_policy="evict_first")
    if EVEN and T == PADDED:
        b_x = tl.load(p_x, eviction_policy="evict_last")
    else:
        b_x = tl.load(p_x, mask=(o_t < T) & m_i, other=0.0, eviction_policy="evict_last")
    return b_w, b_x


@triton.jit
def times_x(
    b_w, b_x, p_rows, x_ptr, x_stride, in_features, T: tl.constexpr, BLOCK: tl.constexpr, EVEN: tl.constexpr
):
    """[T, ROWS] dot products of the rows at `p_rows` with each row of x; the first block is at hand."""
    acc = b_w.to(tl.float32) * b_x.to(tl.float32)
    for start in range(BLOCK, in_features, BLOCK):
        b_w, b_x = load_block(p_rows, x_ptr, x_stride, start, in_features, T, BLOCK, EVEN)
        acc += b_w.to(tl.float32) * b_x.to(tl.float32)
    # one sum over the threads at the end, not one a block
    return tl.sum(acc, 2)


@triton.jit
def finish(b_y, bias_ptr, y_ptr, o_n, out_features, T: tl.constexpr):
    """Adds the bias, rounds and stores the rows of y that exist."""
    if bias_ptr is not None:
        b_y += tl.load(bias_ptr + o_n).to(tl.float32)[None, :]
    o_t = tl.arange(0, triton.next_power_of_2(T))[:, None]
    tl.store(y_ptr + o_t * out_features + o_n[None, :], b_y.to(y_ptr.dtype.element_ty), mask=o_t < T)
