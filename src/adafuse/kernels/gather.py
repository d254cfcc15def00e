"""Experts applied beside the weights, chosen by the gates, for all linears that share an input.

With many tokens every expert's A is read whatever is chosen, so the caller appends them all as rows to the joined
weight: the library's product then leaves u = A x of all experts behind y, and `expand_all_` adds B u of the chosen
ones to y in place. For at most FEW_TOKENS, `shrink` and `expand_` read the chosen experts alone. In: the joined
factors, each token's experts (index) and gates (weight). gather_config.py cuts the work into programs;
gather_routed.py launches the same kernels where every linear has a router of its own; letters and meaning: naive.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adafuse.kernels.gather_config import (
    ExpandConfig,
    ShrinkConfig,
    check_few,
    dot_type,
    expand_config,
    flat,
    locate,
    output_tiles,
    row_stride,
    shrink_config,
    stride_unit,
)
from adafuse.kernels.naive import Members
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


def shrink(x_TI: Tensor, lora_A_ECI: Tensor, index_TK: Tensor, config: ShrinkConfig | None = None) -> Tensor:
    """`naive.shrink` of at most FEW_TOKENS: h[P, T, K, C] in fp32; the P partial sums are left to `expand_`."""
    check_few(index_TK)
    x_TI = x_TI if x_TI.stride(-1) == 1 else x_TI.contiguous()
    (tokens, top_k), (_, rows, inputs) = index_TK.shape, lora_A_ECI.shape
    c = config or shrink_config(tokens, top_k, rows, inputs)
    planes = triton.cdiv(inputs, c.block_i * c.steps)
    h_PTKC = torch.empty(planes, tokens, top_k, rows, dtype=torch.float32, device=x_TI.device)
    shrink_kernel[(triton.cdiv(rows, c.block_c), planes, tokens * top_k)](
        x_TI,
        lora_A_ECI.contiguous(),
        index_TK.contiguous(),
        h_PTKC,
        x_TI.stride(0),
        tokens,
        rows,
        inputs,
        K=top_k,
        BLOCK_C=c.block_c,
        BLOCK_I=c.block_i,
        STEPS=c.steps,
        num_warps=c.warps,
    )
    return h_PTKC


def expand_(
    y_TO: Tensor,
    h_PTKC: Tensor,
    lora_B_EOR: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    members: Members,
    scaling: float,
    gelu: bool = False,
    config: ExpandConfig | None = None,
) -> None:
    """`naive.expand_` of at most FEW_TOKENS: adds to the members' columns of y in place and rounds once."""
    check_few(index_TK)
    chosen = index_TK[:, None].contiguous(), weight_TK[:, None].contiguous()
    launch_expand(y_TO, h_PTKC, lora_B_EOR, *chosen, None, members, scaling, False, gelu, config)


def expand_all_(
    y_TO: Tensor,
    u_TS: Tensor,
    lora_B_EOR: Tensor,
    index_TGK: Tensor,
    weight_TGK: Tensor,
    members: Members,
    scaling: float,
    gelu: bool = False,
    config: ExpandConfig | None = None,
) -> None:
    """`naive.expand_all_`: adds to the members' columns of y in place and rounds once; rows of y and u may be strided.

    More than FEW_TOKENS go through tensor cores, for which gated u is rounded to its own type.
    """
    u_TS = u_TS if u_TS.stride(-1) == 1 else u_TS.contiguous()
    assert index_TGK.shape[1] in (1, len(members)), index_TGK.shape
    chosen = index_TGK.contiguous(), weight_TGK.contiguous()
    launch_expand(y_TO, u_TS, lora_B_EOR, *chosen, None, members, scaling, False, gelu, config)


def launch_expand(
    y_TO: Tensor,
    h: Tensor,
    lora_B_EOR: Tensor,
    index_TGK: Tensor,
    weight_TGK: Tensor,
    logits_TS: Tensor | None,
    members: Members,
    scaling: float,
    raw: bool,
    gelu: bool,
    config: ExpandConfig | None,
) -> None:
    """One launch for all expands: h is u[T, S] of all experts or planes [P, T, K, C] of the chosen ones.

    With logits [T, G * E], index and weight are written; without, they are read.
    """
    (tokens, groups, top_k), (experts, outputs, rank) = index_TGK.shape, lora_B_EOR.shape
    sizes = (tokens, outputs, *flat(members), scaling)
    of_all = h.dim() == 2
    assert h.shape[-1] == len(members) * rank * (experts if of_all else 1), h.shape
    c = config or expand_config(tokens, experts, rank, outputs, y_TO.dtype)
    grid = (output_tiles(members, c.block_o), triton.cdiv(tokens, c.block_t))
    unit = stride_unit(row_stride(y_TO), h.stride(-2))
    strides = (
        row_stride(y_TO) // unit,
        h.stride(-2) // unit,
        0 if logits_TS is None else logits_TS.stride(0),
    )
    operands = (y_TO, h, lora_B_EOR.contiguous(), index_TGK, weight_TGK, logits_TS, *strides)
    shape = {"G": groups, "K": top_k, "E": experts, "R": rank, "UNIT": unit, "BLOCK_O": c.block_o}
    shape |= {"ROUTED": logits_TS is not None, "RAW": raw, "GELU": gelu}
    if c.block_t == 1:
        few = {"P": 1 if of_all else len(h), "ALL": of_all, "BLOCK_R": c.block_c}
        expand_kernel[grid](*operands, *sizes, **shape, **few, num_warps=c.warps)
    else:
        lines = triton.next_power_of_2(triton.cdiv(c.block_o * rank * y_TO.itemsize, 128))
        many = {"DOT": dot_type(y_TO), "BLOCK_T": c.block_t, "BLOCK_C": c.block_c}
        many |= {"BLOCK_E": triton.next_power_of_2(experts), "LINES": lines}
        expand_all_kernel[grid](*operands, *sizes, **shape, **many, num_warps=c.warps, num_stages=c.stages)
