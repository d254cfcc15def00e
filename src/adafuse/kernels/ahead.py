"""Experts are shrunk ahead: the launch that makes x also adds A x up, and the product that reads x finds its h there.

In: what a program has just made of x, rounded as its reader will find it; the chosen experts' A of the product that
reads it next, turned, so that an input's numbers lie together. Out: h, added to in fixed point: whole numbers have the
same sum in any order, so the same bits come out every time. Programs take turns on a few copies of h, because additions
to one place wait for each other; the reader adds the copies. The step's last launch makes them zero again (ends.py).
Only where gates are known before x is, and for one or two tokens. Names as in gather.py. Next: lean.py, attend.py.
"""

from __future__ import annotations

from typing import Any

import triton
import triton.language as tl

from adafuse.kernels.beside import FIXED, Beside
from adafuse.kernels.config import AHEAD_COPIES
from adafuse.kernels.route import is_slot


def ahead_arguments(reader: Beside | None) -> dict[str, Any]:
    """What a kernel is told that shrinks for the experts of `reader`."""
    if reader is None:
        nothing = dict.fromkeys(("p_columns", "p_chosen", "p_gates", "p_low"))
        sizes = dict.fromkeys(("STRIDE_LOW", "G_LOW", "E_LOW", "K_LOW", "R_LOW"), 1)
        return nothing | sizes | {"AHEAD": 0}
    assert reader.columns_IS is not None and reader.h.shape[0] == AHEAD_COPIES
    return {
        "p_columns": reader.columns_IS,
        "p_chosen": reader.index,
        "p_gates": reader.weight,
        "p_low": reader.h,
        "AHEAD": AHEAD_COPIES,
        "STRIDE_LOW": reader.columns_IS.shape[1],
        "G_LOW": len(reader.members),
        "E_LOW": reader.experts,
        "K_LOW": reader.top_k,
        "R_LOW": reader.rank,
    }


@triton.jit
def columns(
    p_columns, p_chosen, p_gates, o_x, m_x, i_t,
    STRIDE: tl.constexpr, G: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """[rows, choices * members, R] of A turned [I, STRIDE] for inputs `o_x` of token `i_t`; of a choice without a gate
    nothing is read. The ranks have a dimension of their own, so that addresses along it are seen to be neighbours.
    """
    o_p = tl.arange(0, triton.next_power_of_2(K * G))
    o_r = tl.arange(0, triton.next_power_of_2(R))
    o_choice = i_t * K + o_p // G
    i_e = tl.load(p_chosen + o_choice, mask=o_p < K * G, other=0).to(tl.int32)
    m_p = (o_p < K * G) & is_slot(tl.load(p_gates + o_choice, mask=o_p < K * G, other=0.0))
    p_block = p_columns + o_x.to(tl.int64)[:, None, None] * STRIDE
    p_block += ((o_p % G * E + i_e) * R)[None, :, None] + o_r[None, None, :]
    m_block = m_x[:, None, None] & m_p[None, :, None] & (o_r < R)[None, None, :]
    return tl.load(p_block, mask=m_block, other=0.0)


@triton.jit
def shrink(b_columns, b_x):
    """[choices * members, R]: the part of h that these inputs have, x [rows] in fp32."""
    return tl.sum(b_columns.to(tl.float32) * b_x[:, None, None], 0)


@triton.jit
def add_low(
    b_low, p_low, i_program, i_t, tokens, G: tl.constexpr, K: tl.constexpr, R: tl.constexpr,
    COPIES: tl.constexpr,
):  # fmt: skip
    """h of token `i_t` += `b_low`, in the program's copy; p_low [COPIES, T, K * G * R] in fixed point."""
    o_p = tl.arange(0, triton.next_power_of_2(K * G))[:, None]
    o_r = tl.arange(0, triton.next_power_of_2(R))[None, :]
    p_own = p_low + (i_program % COPIES * tokens + i_t) * (K * G * R) + o_p * R + o_r
    # who reads h starts when this launch has ended: there is no order to keep
    tl.atomic_add(p_own, (b_low * FIXED).to(tl.int64), mask=(o_p < K * G) & (o_r < R), sem="relaxed")
