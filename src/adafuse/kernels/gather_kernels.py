"""The Triton kernels that apply chosen experts beside the weights: shrink (A x), expand (B u), for few tokens and many.

In: pointers, strides and the cut into programs that gather_config.py chose. gather.py launches them with gates that
exist, gather_routed.py with routers' logits; letters and meaning: naive.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from adafuse.kernels.config import locate
from adafuse.kernels.route import choose_alone, is_slot


@triton.jit
def sum_rows(p_x, p_rows, I, start, m_row, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, STEPS: tl.constexpr):
    """[C] = rows[C, I] x[I] over one plane of the inputs; the sum across threads comes once, after the loop."""
    partial = tl.zeros((BLOCK_C, BLOCK_I), tl.float32)
    for step in tl.static_range(STEPS):
        i_i = start + step * BLOCK_I + tl.arange(0, BLOCK_I)
        b_x = tl.load(p_x + i_i, mask=i_i < I, other=0.0).to(tl.float32)
        mask = m_row[:, None] & (i_i < I)[None, :]
        b_rows = tl.load(p_rows[:, None] + i_i[None, :], mask=mask, other=0.0).to(tl.float32)
        partial += b_rows * b_x[None, :]
    return tl.sum(partial, axis=1)


@triton.jit
def exact_gelu(h):
    return 0.5 * h * (1.0 + tl.erf(h * 0.7071067811865476))


@triton.jit
def shrink_kernel(
    x_ptr,
    a_ptr,
    index_ptr,
    h_ptr,
    x_stride,
    T,
    C,
    I,
    K: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STEPS: tl.constexpr,
):
    plane = tl.program_id(1)
    slot = tl.program_id(2)
    e = tl.load(index_ptr + slot).to(tl.int64)
    i_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p_x = x_ptr + (slot // K).to(tl.int64) * x_stride
    p_rows = a_ptr + e * C * I + i_c * I
    h = sum_rows(p_x, p_rows, I, plane * STEPS * BLOCK_I, i_c < C, BLOCK_C, BLOCK_I, STEPS)
    tl.store(h_ptr + (plane * T * K + slot) * C + i_c, h, mask=i_c < C)


@triton.jit
def expand_kernel(
    y_ptr,
    h_ptr,
    b_ptr,
    index_ptr,
    weight_ptr,
    logits_ptr,
    y_stride,
    h_stride,
    logits_stride,
    T,
    rows,
    column0,
    width0,
    column1,
    width1,
    column2,
    width2,
    scaling,
    P: tl.constexpr,
    G: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    ALL: tl.constexpr,
    ROUTED: tl.constexpr,
    RAW: tl.constexpr,
    GELU: tl.constexpr,
    UNIT: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    t = tl.program_id(1)
    member, column, row, offset, left = locate(
        tl.program_id(0), column0, width0, column1, width1, column2, width2, BLOCK_O
    )
    i_o = tl.arange(0, BLOCK_O)
    i_r = tl.arange(0, BLOCK_R)
    m_o = i_o < left
    p_y = y_ptr + t.to(tl.int64) * (y_stride * UNIT) + column + i_o
    b_y = tl.load(p_y, mask=m_o, other=0.0).to(tl.float32)
    first = (t * G + (member if G > 1 else 0)) * K
    if ROUTED:
        chosen, share = choose_alone(logits_ptr + t.to(tl.int64) * logits_stride + member * E, E, K, RAW)
    m_y = m_o if ROUTED else i_o < 0
    partial = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    for k in tl.static_range(K):
        m_r = i_r < R
        if ROUTED:
            e = chosen[k].to(tl.int64)
            weight = share[k] * scaling
        else:
            e = tl.load(index_ptr + first + k).to(tl.int64)
            weight = tl.load(weight_ptr + first + k) * scaling
            # a gate of zero is no slot; it arrives with the expert's number, so that no load waits longer for it
            m_r = m_r & is_slot(weight)
            m_y = m_y | (m_o & is_slot(weight))
        p_b = b_ptr + (e * rows + row) * R + i_o[:, None] * R + i_r[None, :]
        b_b = tl.load(p_b, mask=m_o[:, None] & m_r[None, :], other=0.0).to(tl.float32)
        if ALL:  # h[T, G, E, R] of all experts
            p_h = h_ptr + t.to(tl.int64) * (h_stride * UNIT) + (member * E + e) * R + i_r
        else:  # planes h[P, T, K, G, R] of the chosen ones
            p_h = h_ptr + (t * K + k) * (h_stride * UNIT) + member * R + i_r
        h = tl.zeros((BLOCK_R,), tl.float32)
        for plane in tl.static_range(P):
            h += tl.load(p_h + plane * T * K * (h_stride * UNIT), mask=m_r, other=0.0).to(tl.float32)
        if GELU:
            h = exact_gelu(h)
        partial += b_b * (h * weight)[None, :]
        if ROUTED:
            tl.store(index_ptr + first + k, e, mask=offset == 0)
            tl.store(weight_ptr + first + k, share[k], mask=offset == 0)
    tl.store(p_y, (b_y + tl.sum(partial, axis=1)).to(y_ptr.dtype.element_ty), mask=m_y)


@triton.jit
def expand_all_kernel(
    y_ptr,
    u_ptr,
    b_ptr,
    index_ptr,
    weight_ptr,
    logits_ptr,
    y_stride,
    u_stride,
    logits_stride,
    T,
    rows,
    column0,
    width0,
    column1,
    width1,
    column2,
    width2,
    scaling,
    G: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    R: tl.constexpr,
    ROUTED: tl.constexpr,
    RAW: tl.constexpr,
    GELU: tl.constexpr,
    UNIT: tl.constexpr,
    DOT: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_E: tl.constexpr,
    LINES: tl.constexpr,
):
    member, column, row, offset, left = locate(
        tl.program_id(0), column0, width0, column1, width1, column2, width2, BLOCK_O
    )
    i_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    i_o = tl.arange(0, BLOCK_O)
    m_t = i_t < T
    slot = (i_t * G + (member if G > 1 else 0)) * K
    p_y = y_ptr + i_t.to(tl.int64)[:, None] * (y_stride * UNIT) + column + i_o[None, :]
    m_y = m_t[:, None] & (i_o < left)[None, :]
    b_y = tl.load(p_y, mask=m_y, other=0.0)
    if ROUTED:
        # what is chosen has to be known before the loop: until then B comes closer, a word of each 128 bytes
        WORD: tl.constexpr = 1024 // b_ptr.dtype.element_ty.primitive_bitwidth
        i_e = tl.arange(0, BLOCK_E * LINES) // LINES
        i_w = tl.arange(0, BLOCK_E * LINES) % LINES * WORD
        p_w = b_ptr + (i_e.to(tl.int64) * rows + row) * R + i_w
        tl.load(p_w, mask=(i_e < E) & (i_w < left * R), volatile=True)
        p_logits = logits_ptr + tl.minimum(i_t, T - 1).to(tl.int64) * logits_stride + member * E
        chosen, share = choose_alone(p_logits, E, K, RAW)
        for k in tl.static_range(K):
            tl.store(index_ptr + slot + k, chosen[k].to(tl.int64), mask=m_t & (offset == 0))
            tl.store(weight_ptr + slot + k, share[k], mask=m_t & (offset == 0))
    else:
        # a token without a gate keeps its y; its rows of B belong to other tokens too, so they are read all the same
        used = i_t < 0
        for k in tl.static_range(K):
            used = used | (tl.load(weight_ptr + slot + k, mask=m_t, other=0.0) != 0)
        m_y = m_y & used[:, None]
    acc = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for first in range(0, E * R, BLOCK_C):
        i_c = first + tl.arange(0, BLOCK_C)
        e = i_c // R
        m_c = (i_c < E * R)[None, :]
        p_u = u_ptr + i_t.to(tl.int64)[:, None] * (u_stride * UNIT) + member * E * R + i_c[None, :]
        b_u = tl.load(p_u, mask=m_t[:, None] & m_c, other=0.0)
        gate = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for k in tl.static_range(K):
            if ROUTED:
                index = chosen[k]
                weight = share[k] * scaling
            else:
                index = tl.load(index_ptr + slot + k, mask=m_t, other=-1).to(tl.int32)
                weight = tl.load(weight_ptr + slot + k, mask=m_t, other=0.0) * scaling
            gate += tl.where(index[:, None] == e[None, :], weight[:, None], 0.0)
        # the last load, because its way to the tensor cores waits for it: all others are in flight by then
        p_b = b_ptr + (e.to(tl.int64) * rows * R + i_c % R)[None, :] + (row + i_o)[:, None] * R
        b_b = tl.load(p_b, mask=(i_o < left)[:, None] & m_c, other=0.0).to(DOT)
        h = b_u.to(tl.float32)
        if GELU:
            h = exact_gelu(h)
        acc = tl.dot((h * gate).to(DOT), tl.trans(b_b), acc, input_precision="ieee")
    tl.store(p_y, (b_y.to(tl.float32) + acc).to(y_ptr.dtype.element_ty), mask=m_y)
