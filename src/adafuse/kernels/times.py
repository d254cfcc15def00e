"""Rows of a matrix times a few vectors, as a part of other kernels: with tensor cores, or without if they would idle.

In: pointers to rows, whose first blocks are read before x is known; x [T, I]. Out: [T, rows] in fp32. Names as in
gather.py. Next: lean.py, beside.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

MAX_EARLY = tl.constexpr(6)


@triton.jit
def load_rows(
    p_rows,
    m_rows,
    start,
    INPUTS: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):
    """[ROWS, BLOCK] of the rows at `p_rows`, or [1, ROWS, BLOCK] off the tensor cores; they are read once."""
    o_i = start + tl.arange(0, BLOCK)
    if TENSOR_CORES:
        p_block = p_rows[:, None] + o_i[None, :]
        m_block = m_rows[:, None] & (o_i < INPUTS)[None, :]
    else:
        p_block = p_rows[None, :, None] + o_i[None, None, :]
        m_block = m_rows[None, :, None] & (o_i < INPUTS)[None, None, :]
    if WHOLE and INPUTS % BLOCK == 0:
        return tl.load(p_block, eviction_policy="evict_first")
    return tl.load(p_block, mask=m_block, other=0.0, eviction_policy="evict_first")


@triton.jit
def early_rows(
    p_rows, m_rows, INPUTS: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr,
    TENSOR_CORES: tl.constexpr,
):  # fmt: skip
    """A tuple of the first EARLY blocks."""
    b_early: tl.tuple = ()
    for block in tl.static_range(EARLY):
        b_early += (load_rows(p_rows, m_rows, block * BLOCK, INPUTS, BLOCK, WHOLE, TENSOR_CORES),)
    return b_early


@triton.jit
def times_x(
    b_early, p_rows, m_rows, p_x, INPUTS: tl.constexpr, T: tl.constexpr, PADDED: tl.constexpr,
    BLOCK: tl.constexpr, WHOLE: tl.constexpr, EARLY: tl.constexpr, STAGES: tl.constexpr,
    TENSOR_CORES: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """[T, ROWS] products of the rows with each row of x; the first EARLY blocks of the rows are at hand."""
    o_t = tl.arange(0, PADDED)
    if TENSOR_CORES:
        o_i = tl.arange(0, BLOCK)
        p_block = p_x + o_t[None, :] * INPUTS + o_i[:, None]
        m_t = (o_t < T)[None, :]
        b_x = tl.load(p_block, mask=m_t & (o_i < INPUTS)[:, None], other=0.0)
        b_sum = tl.dot(b_early[0].to(DOT), b_x.to(DOT), input_precision="ieee")
        for start in tl.range(BLOCK, INPUTS, BLOCK, num_stages=STAGES):
            b_rows = load_rows(p_rows, m_rows, start, INPUTS, BLOCK, WHOLE, True)
            b_x = tl.load(p_block + start, mask=m_t & (start + o_i < INPUTS)[:, None], other=0.0)
            b_sum = tl.dot(b_rows.to(DOT), b_x.to(DOT), b_sum, input_precision="ieee")
        b_sum = tl.trans(b_sum)
    else:
        b_terms = b_early[0].to(tl.float32) * load_x(p_x, o_t, 0, INPUTS, T, BLOCK).to(tl.float32)
        for block in tl.static_range(1, EARLY):
            b_x = load_x(p_x, o_t, block * BLOCK, INPUTS, T, BLOCK)
            b_terms += b_early[block].to(tl.float32) * b_x.to(tl.float32)
        # unrolled, and loads then stand before products: of few blocks all, of many as have room in registers
        if INPUTS <= MAX_EARLY * BLOCK:
            for start in tl.static_range(EARLY * BLOCK, INPUTS, BLOCK):
                b_rows = load_rows(p_rows, m_rows, start, INPUTS, BLOCK, WHOLE, False)
                b_terms += b_rows.to(tl.float32) * load_x(p_x, o_t, start, INPUTS, T, BLOCK).to(tl.float32)
        else:
            for start in tl.range(EARLY * BLOCK, INPUTS, BLOCK, loop_unroll_factor=4, num_stages=1):
                b_rows = load_rows(p_rows, m_rows, start, INPUTS, BLOCK, WHOLE, False)
                b_terms += b_rows.to(tl.float32) * load_x(p_x, o_t, start, INPUTS, T, BLOCK).to(tl.float32)
        # one sum over the threads at the end, not one a block
        b_sum = tl.sum(b_terms, 2)
    return b_sum


@triton.jit
def load_x(p_x, o_t, start, INPUTS: tl.constexpr, T: tl.constexpr, BLOCK: tl.constexpr):
    o_i = (start + tl.arange(0, BLOCK))[None, None, :]
    p_block = p_x + o_t[:, None, None] * INPUTS + o_i
    if o_t.shape[0] == T and INPUTS % BLOCK == 0:
        return tl.load(p_block, eviction_policy="evict_last")
    return tl.load(
        p_block, mask=(o_t < T)[:, None, None] & (o_i < INPUTS), other=0.0, eviction_policy="evict_last"
    )


@triton.jit
def load_squares(p_squares, T: tl.constexpr, PARTS: tl.constexpr, PADDED: tl.constexpr):
    """[T, PARTS]: the sums of squares that the writers left."""
    o_t = tl.arange(0, PADDED)[:, None]
    o_p = tl.arange(0, triton.next_power_of_2(PARTS))[None, :]
    return tl.load(p_squares + o_t * PARTS + o_p, mask=(o_t < T) & (o_p < PARTS), other=0.0)


@triton.jit
def rstd(b_squares, eps, WIDTH: tl.constexpr):
    """[T]: one over the root mean square."""
    return 1.0 / tl.sqrt(tl.sum(b_squares, 1) / WIDTH + eps)
