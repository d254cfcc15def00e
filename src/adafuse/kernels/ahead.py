"""Experts are shrunk ahead: the launch that makes x also adds A x up, and the product that reads x finds its h there.

In: what a program has just made of x, rounded as its reader will find it; A of the product that reads it next, turned,
so that some inputs' columns lie together. Out: h, added to in fixed point: whole numbers have the same sum in any
order, so the same bits come out every time. The step's last launch makes all h zero again (ends.py). One or two tokens
only: each adds as many numbers a program as it has rows of A. Names as in gather.py. Next: lean.py, attend.py.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from adafuse.kernels.beside import FIXED, Beside, is_chosen
from adafuse.kernels.config import AHEAD_NUMBERS, cdiv, power_of_2
from adafuse.kernels.route import is_slot


def ahead_arguments(reader: Beside | None, tokens: int, rows: int, warps: int) -> dict[str, Any]:
    """What a kernel is told whose programs shrink `rows` inputs each for the experts of `reader`."""
    if reader is None:
        nothing = dict.fromkeys(("p_columns", "p_chosen", "p_gates", "p_low"))
        return nothing | dict.fromkeys(
            ("LOWS", "STRIDE_LOW", "G_LOW", "E_LOW", "K_LOW", "R_LOW", "PAIRS_LOW"), 1
        ) | {"AHEAD": False, "CHOSEN_LOW": False}  # fmt: skip
    assert reader.columns_IS is not None
    chosen, stride = is_chosen(reader, tokens), reader.columns_IS.shape[1]
    lows = reader.top_k * len(reader.members) * reader.rank if chosen else stride
    pairs = power_of_2(cdiv(lows, reader.rank))
    return {
        "p_columns": reader.columns_IS,
        "p_chosen": reader.index,
        "p_gates": reader.weight,
        "p_low": reader.h,
        "AHEAD": True,
        "LOWS": lows,
        "STRIDE_LOW": stride,
        "G_LOW": len(reader.members),
        "E_LOW": reader.experts,
        "K_LOW": reader.top_k,
        "R_LOW": reader.rank,
        "CHOSEN_LOW": chosen,
        "PAIRS_LOW": min(pairs, max(1, warps * AHEAD_NUMBERS // (rows * power_of_2(reader.rank)))),
    }


@triton.jit
def columns(
    p_columns, p_chosen, p_gates, o_x, m_x, i_t, first,
    LOWS: tl.constexpr, STRIDE: tl.constexpr, G: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    CHOSEN: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """[rows, PAIRS, R] of A turned [I, STRIDE]: of inputs `o_x` what the pairs from `first` on have to do with them.

    CHOSEN: pairs of a choice of token `i_t` and a member, G * K of them; of a choice without a gate nothing is read.
    Else the rows of A as they stand, R at a time, LOWS in all. The ranks have a dimension of their own, so that
    addresses along it are seen to be neighbours.
    """
    o_p = first + tl.arange(0, PAIRS)
    o_r = tl.arange(0, triton.next_power_of_2(R))
    m_low = (o_r < R)[None, :] & ((o_p * R)[:, None] + o_r[None, :] < LOWS)
    b_first = o_p * R
    if CHOSEN:
        m_p = o_p < K * G
        i_e = tl.load(p_chosen + i_t * K + o_p // G, mask=m_p, other=0).to(tl.int32)
        m_low = m_low & is_slot(tl.load(p_gates + i_t * K + o_p // G, mask=m_p, other=0.0))[:, None]
        b_first = (o_p % G * E + i_e) * R
    p_block = (
        p_columns + o_x.to(tl.int64)[:, None, None] * STRIDE + b_first[None, :, None] + o_r[None, None, :]
    )
    return tl.load(p_block, mask=m_x[:, None, None] & m_low[None, :, :], other=0.0)


@triton.jit
def add_low(b_A, b_x, p_low, i_t, first, LOWS: tl.constexpr, R: tl.constexpr, PAIRS: tl.constexpr):
    """h += A x for those pairs and inputs `b_x` [rows] in fp32; p_low [T, LOWS] in fixed point."""
    o_p = first + tl.arange(0, PAIRS)
    o_r = tl.arange(0, triton.next_power_of_2(R))
    o_low = (o_p * R)[:, None] + o_r[None, :]
    b_low = tl.sum(b_A.to(tl.float32) * b_x[:, None, None], 0)
    m_low = (o_r < R)[None, :] & (o_low < LOWS)
    # who reads h starts when this launch has ended: there is no order to keep
    tl.atomic_add(p_low + i_t * LOWS + o_low, (b_low * FIXED).to(tl.int64), mask=m_low, sem="relaxed")


@triton.jit
def add_lows(
    b_early, b_x, p_columns, p_chosen, p_gates, p_low, o_x, m_x, i_t,
    LOWS: tl.constexpr, STRIDE: tl.constexpr, G: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    CHOSEN: tl.constexpr, PAIRS: tl.constexpr,
):  # fmt: skip
    """All pairs of token `i_t`; the columns of the first are at hand."""
    ALL: tl.constexpr = K * G if CHOSEN else (LOWS + R - 1) // R
    LATE: tl.constexpr = (ALL - 1) // PAIRS
    # all are asked for before any is added, because nothing is asked for before an addition that comes behind it
    b_late: tl.tuple = ()
    for block in tl.static_range(LATE):
        b_late += (
            columns(
                p_columns, p_chosen, p_gates, o_x, m_x, i_t, (block + 1) * PAIRS,
                LOWS, STRIDE, G, E, K, R, CHOSEN, PAIRS,
            ),
        )  # fmt: skip
    add_low(b_early, b_x, p_low, i_t, 0, LOWS, R, PAIRS)
    for block in tl.static_range(LATE):
        add_low(b_late[block], b_x, p_low, i_t, (block + 1) * PAIRS, LOWS, R, PAIRS)
