"""The kernel of switch.py: a strip of one weight per program, from a table that says where everything is.

A program keeps the chosen experts' A of its columns on the chip, gates folded in, and streams W and B past them,
several tiles of both on their way at once, so that each weight is read once and written once, or neither where there
is nothing to do.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adafuse.kernels.route import is_slot


@triton.jit
def switch_kernel(
    strips,  # [strips, 8] int64, see _strips
    index_S,  # [S] int64 or int32
    gate_S,  # [S] fp32
    held_H,  # [H] fp32, gates of what W holds where it is not a slot
    SOURCE: tl.constexpr,
    SLOTS: tl.constexpr,
    HELD: tl.constexpr,
    ELEMENT: tl.constexpr,
    DOT: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPTH: tl.constexpr,
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

    # all slots are one contraction: row d of A and column d of B belong to slot d // BLOCK_R
    d_A = tl.arange(0, DEPTH)[:, None]
    d_B = tl.arange(0, DEPTH)[None, :]
    m_A = (d_A // BLOCK_R < SLOTS) & (d_A % BLOCK_R < RANK)
    m_B = (d_B // BLOCK_R < SLOTS) & (d_B % BLOCK_R < RANK)
    expert_A = tl.load(index_S + d_A // BLOCK_R, mask=m_A, other=0).to(tl.int64)
    expert_B = tl.load(index_S + d_B // BLOCK_R, mask=m_B, other=0).to(tl.int64)
    gate_A = tl.load(gate_S + d_A // BLOCK_R, mask=m_A, other=0.0)

    # A gate of zero is no slot: its factors are not read. Put slot by slot, the compiler sees that a mask is the same
    # all over a slot, so that loads stay wide. The gates come in with the table: nothing waits longer for them.
    merges = is_slot(tl.load(gate_S))
    for slot in tl.static_range(SLOTS):
        used = is_slot(tl.load(gate_S + slot))
        m_A = m_A & ((d_A // BLOCK_R != slot) | used)
        m_B = m_B & ((d_B // BLOCK_R != slot) | used)
        merges = merges | used
    writes = merges
    for held in tl.static_range(HELD):
        writes = writes | is_slot(tl.load(held_H + held))
    if not writes:
        return

    o = tl.arange(0, BLOCK_O)[:, None]
    i = tl.arange(0, BLOCK_I)[None, :]
    o_tile = o * in_size + i
    step = in_size.to(tl.int64) * BLOCK_O

    p_down = p_A + (expert_A * RANK + d_A % BLOCK_R) * in_size + i
    b_A = tl.load(p_down, mask=m_A & (i < columns), other=0.0, eviction_policy="evict_last")
    b_A = (b_A.to(tl.float32) * gate_A).to(DOT)
    p_up = p_B + expert_B * out_size * RANK + d_B % BLOCK_R + o * RANK

    # one comparison a step for both masks of B: with two, rank 8 has no registers for two programs a multiprocessor
    left_B = tl.where(m_B, rows, 0) - o

    # the stages are a pipeline of W as well as of B: what is in flight is what the memory's speed is made of
    for start in tl.range(0, rows, BLOCK_O, num_stages=STAGES):
        left = rows - start
        m_tile = (o < left) & (i < columns)
        b_weight = tl.load(p_source + o_tile, mask=m_tile, eviction_policy="evict_first")
        m_up = start < left_B
        b_B = tl.load(p_up + start * RANK, mask=m_up, other=0.0, eviction_policy="evict_last").to(DOT)
        b_delta = tl.dot(b_B, b_A, input_precision="ieee")
        b_sum = (b_weight.to(tl.float32) + b_delta).to(ELEMENT)
        # without a slot a plain copy: minus zero plus zero would be zero
        b_sum = tl.where(merges, b_sum, b_weight)
        tl.store(p_target + o_tile, b_sum, mask=m_tile, eviction_policy="evict_first")
        p_source += step
        p_target += step


@triton.jit
def _address(entry, ELEMENT: tl.constexpr) -> tl.tensor:
    """A pointer out of the table; told to be aligned, or the compiler would fall back to loads of one element."""
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(ELEMENT)), 16)
