"""The kernel of switch.py: a strip of one weight per program, from a table that says where everything is.

A program keeps the chosen experts' A of its columns on the chip, gates folded in, and streams W and B past them,
several tiles of both on their way at once, so that each weight is read once and written once.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def switch_kernel(
    strips,  # [strips, 8] int64, see _strips
    index_S,  # [S] int64 or int32
    gate_S,  # [S] fp32
    SOURCE: tl.constexpr,
    SLOTS: tl.constexpr,
    ELEMENT: tl.constexpr,
    DOT: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROW_STEP: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STAGES: tl.constexpr,
):
    strip = strips + tl.program_id(0) * 8
    p_target = _address(strip, ELEMENT)
    p_source = _address(strip + SOURCE, ELEMENT)
    p_A = _address(strip + 2, ELEMENT)
    p_B = _address(strip + 3, ELEMENT)
    out_size = tl.load(strip + 4)
    in_size = tl.multiple_of(tl.load(strip + 5).to(tl.int32), ROW_STEP)
    rows = tl.load(strip + 6).to(tl.int32)
    columns = tl.multiple_of(tl.load(strip + 7).to(tl.int32), ROW_STEP)

    o = tl.arange(0, BLOCK_O)[:, None]
    i = tl.arange(0, BLOCK_I)[None, :]
    o_tile = o * in_size + i
    step = in_size.to(tl.int64) * BLOCK_O

    # all slots are one contraction: row d of A and column d of B belong to slot d // BLOCK_R
    d_A = tl.arange(0, DEPTH)[:, None]
    m_A = (d_A // BLOCK_R < SLOTS) & (d_A % BLOCK_R < RANK)
    expert_A = tl.load(index_S + d_A // BLOCK_R, mask=m_A, other=0).to(tl.int64)
    gate_A = tl.load(gate_S + d_A // BLOCK_R, mask=m_A, other=0.0)
    p_down = p_A + (expert_A * RANK + d_A % BLOCK_R) * in_size + i
    b_A = tl.load(p_down, mask=m_A & (i < columns), other=0.0, eviction_policy="evict_last")
    b_A = (b_A.to(tl.float32) * gate_A).to(DOT)

    d_B = tl.arange(0, DEPTH)[None, :]
    m_B = (d_B // BLOCK_R < SLOTS) & (d_B % BLOCK_R < RANK)
    expert_B = tl.load(index_S + d_B // BLOCK_R, mask=m_B, other=0).to(tl.int64)
    p_up = p_B + expert_B * out_size * RANK + d_B % BLOCK_R + o * RANK

    # the stages are a pipeline of W as well as of B: what is in flight is what the memory's speed is made of
    for start in tl.range(0, rows, BLOCK_O, num_stages=STAGES):
        left = rows - start
        m_tile = (o < left) & (i < columns)
        b_weight = tl.load(p_source + o_tile, mask=m_tile, eviction_policy="evict_first")
        m_up = o < left
        if PADDED:
            m_up = m_up & m_B
        b_B = tl.load(p_up + start * RANK, mask=m_up, other=0.0, eviction_policy="evict_last").to(DOT)
        b_delta = tl.dot(b_B, b_A, input_precision="ieee")
        b_sum = (b_weight.to(tl.float32) + b_delta).to(ELEMENT)
        tl.store(p_target + o_tile, b_sum, mask=m_tile, eviction_policy="evict_first")
        p_source += step
        p_target += step


@triton.jit
def _address(entry, ELEMENT: tl.constexpr) -> tl.tensor:
    """A pointer out of the table; told to be aligned, or the compiler would fall back to loads of one element."""
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(ELEMENT)), 16)
