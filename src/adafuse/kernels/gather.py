"""Experts applied beside the weights, chosen by the gates, for all linears that share an input.

With many tokens every expert's A is read whatever is chosen, so the caller appends them all as rows to the joined
weight: the library's product then leaves u = A x of all experts behind y, and `expand_all_` adds B u of the chosen
ones to y in place. Where every linear has a router of its own its rows stand there too, and `expand_routed_` chooses
for itself: a launch less per projection. For at most FEW_TOKENS, `shrink` and `expand_` read the chosen experts alone.
In: the joined factors, each token's experts (index) and gates (weight). Out: y, in place. Letters and meaning:
naive.py; why the kernels look as they do: README.md, section gather. Next: config.py, which cuts the work.

Names in all kernels: `p_` pointers, `b_` values (of a block or one), `o_` offsets of a block, `m_` masks, `i_` numbers
of what a program works on, capitals for what is known when it is compiled. A signature has pointers, numbers, members
and capitals on lines of their own. A projection has up to three members: member g owns `width_g` columns of y from
`column_g` on, and so many rows of the joined B.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adafuse.kernels.config import (
    FEW_TOKENS,
    ROUTED_MAX_EXPERTS,
    ExpandConfig,
    Members,
    ShrinkConfig,
    cdiv,
    check_tokens,
    expand_config,
    flat,
    output_tiles,
    rows_of,
    shrink_config,
    stride_unit,
)
from adafuse.kernels.route import choose_alone, is_slot


def shrink(x_TI: Tensor, lora_A_ECI: Tensor, index_TK: Tensor, config: ShrinkConfig | None = None) -> Tensor:
    """`naive.shrink` of at most FEW_TOKENS: h[P, T, K, C] in fp32; the P partial sums are left to `expand_`."""
    (tokens, top_k), (_, rows_A, inputs) = index_TK.shape, lora_A_ECI.shape
    check_tokens(tokens, FEW_TOKENS)
    x_TI = rows_of(x_TI)
    cut = config or shrink_config(tokens, top_k, rows_A, inputs)
    planes = cdiv(inputs, cut.block_i * cut.steps)
    h_PTKC = torch.empty(planes, tokens, top_k, rows_A, dtype=torch.float32, device=x_TI.device)
    shrink_kernel[(cdiv(rows_A, cut.block_c), planes, tokens * top_k)](
        p_x=x_TI,
        p_A=lora_A_ECI.contiguous(),
        p_index=index_TK.contiguous(),
        p_h=h_PTKC,
        x_stride=x_TI.stride(0),
        tokens=tokens,
        rows_A=rows_A,
        inputs=inputs,
        K=top_k,
        BLOCK_C=cut.block_c,
        BLOCK_I=cut.block_i,
        STEPS=cut.steps,
        num_warps=cut.warps,
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
    check_tokens(len(index_TK), FEW_TOKENS)
    chosen = index_TK[:, None].contiguous(), weight_TK[:, None].contiguous()
    _expand(y_TO, h_PTKC, lora_B_EOR, *chosen, members, scaling, gelu=gelu, config=config)


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
    assert index_TGK.shape[1] in (1, len(members)), index_TGK.shape
    chosen = index_TGK.contiguous(), weight_TGK.contiguous()
    _expand(y_TO, rows_of(u_TS), lora_B_EOR, *chosen, members, scaling, gelu=gelu, config=config)


def expand_routed_(
    y_TO: Tensor,
    u_TS: Tensor,
    logits_TGE: Tensor,
    lora_B_EOR: Tensor,
    members: Members,
    top_k: int,
    raw: bool,
    scaling: float,
    config: ExpandConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive.expand_routed_`: adds to y in place; returns index[T, G, K] (int64) and weight[T, G, K] (fp32).

    The logits, [T, G * E] or [T, G, E], are read as they are rounded; equal ones are chosen from the first on, and NaN
    counts as minus infinity. Rows may be strided; 128-bit loads need strides that are multiples of 8.
    """
    tokens, groups, experts = len(y_TO), len(members), len(lora_B_EOR)
    logits_TS = rows_of(logits_TGE.flatten(1))
    assert logits_TS.shape == (tokens, groups * experts), logits_TS.shape
    assert 1 <= top_k <= experts <= ROUTED_MAX_EXPERTS, (top_k, experts)
    index_TGK = torch.empty(tokens, groups, top_k, dtype=torch.int64, device=y_TO.device)
    weight_TGK = torch.empty(tokens, groups, top_k, dtype=torch.float32, device=y_TO.device)
    chosen = index_TGK, weight_TGK
    _expand(y_TO, u_TS, lora_B_EOR, *chosen, members, scaling, logits_TS, raw, config=config)
    return index_TGK, weight_TGK


def _expand(
    y_TO: Tensor,
    h: Tensor,
    lora_B_EOR: Tensor,
    index_TGK: Tensor,
    weight_TGK: Tensor,
    members: Members,
    scaling: float,
    logits_TS: Tensor | None = None,
    raw: bool = False,
    gelu: bool = False,
    config: ExpandConfig | None = None,
) -> None:
    """One launch for all expands: h is u[T, S] of all experts or planes [P, T, K, C] of the chosen ones.

    With logits [T, G * E], index and weight are written; without, they are read.
    """
    (tokens, groups, top_k), (experts, rows_B, rank) = index_TGK.shape, lora_B_EOR.shape
    edges, of_all = flat(members), h.dim() == 2
    assert y_TO.stride(-1) == 1, "y is written in place: its columns must be contiguous"
    assert h.shape[-1] == len(members) * rank * (experts if of_all else 1), h.shape
    cut = config or expand_config(tokens, experts, rank, rows_B, y_TO.itemsize)
    unit = stride_unit(y_TO.stride(0), h.stride(-2))
    shared = {
        "p_y": y_TO,
        "p_B": lora_B_EOR.contiguous(),
        "p_index": index_TGK,
        "p_weight": weight_TGK,
        "p_logits": logits_TS,
        "y_stride": y_TO.stride(0) // unit,
        "logits_stride": 0 if logits_TS is None else logits_TS.stride(0),
        "tokens": tokens,
        "rows_B": rows_B,
        **edges,
        "scaling": scaling,
        "G": groups,
        "K": top_k,
        "E": experts,
        "R": rank,
        "ROUTED": logits_TS is not None,
        "RAW": raw,
        "GELU": gelu,
        "UNIT": unit,
        "BLOCK_O": cut.block_o,
        "num_warps": cut.warps,
    }
    grid = output_tiles(members, cut.block_o), cdiv(tokens, cut.block_t)
    if cut.block_t == 1:
        expand_kernel[grid](
            **shared,
            p_h=h,
            h_stride=h.stride(-2) // unit,
            P=1 if of_all else len(h),
            ALL=of_all,
            BLOCK_R=cut.block_c,
        )
        return
    expand_all_kernel[grid](
        **shared,
        p_u=h,
        u_stride=h.stride(-2) // unit,
        DOT=_dot_type(y_TO),
        BLOCK_T=cut.block_t,
        BLOCK_C=cut.block_c,
        BLOCK_E=triton.next_power_of_2(experts),
        LINES=triton.next_power_of_2(cdiv(cut.block_o * rank * y_TO.itemsize, 128)),
        num_stages=cut.stages,
    )


def _dot_type(like: Tensor) -> tl.dtype:
    """The operands' type in `tl.dot`; a CPU tensor means the interpreter, where only fp32 products are right."""
    wide = like.device.type == "cpu" or like.dtype == torch.float32
    return tl.float32 if wide else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[like.dtype]


@triton.jit
def shrink_kernel(
    p_x, p_A, p_index, p_h,
    x_stride, tokens, rows_A, inputs,
    K: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_I: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """h[P, T, K, C] = A[e] x of the chosen experts, as P sums over a part (plane) of the inputs each.

    Grid: tiles of BLOCK_C rows of A, planes of STEPS * BLOCK_I inputs, slots T * K. Planes are for more programs; they
    are summed by whoever reads h: no atomics, no zero fill, and the same bits every time.
    p_x [T, I], its rows `x_stride` apart; p_A [E, C = rows_A, I]; p_index [T, K]; p_h [P, T, K, C] in fp32.
    """
    i_plane = tl.program_id(1)
    i_slot = tl.program_id(2)
    i_e = tl.load(p_index + i_slot).to(tl.int64)
    o_c = tl.program_id(0) * BLOCK_C + tl.arange(0, BLOCK_C)
    p_x_t = p_x + (i_slot // K).to(tl.int64) * x_stride
    p_rows = p_A + i_e * rows_A * inputs + o_c * inputs
    start = i_plane * STEPS * BLOCK_I
    m_c = o_c < rows_A
    b_sum = tl.zeros((BLOCK_C, BLOCK_I), tl.float32)
    for step in tl.static_range(STEPS):
        o_i = start + step * BLOCK_I + tl.arange(0, BLOCK_I)
        b_x = tl.load(p_x_t + o_i, mask=o_i < inputs, other=0.0).to(tl.float32)
        m_rows = m_c[:, None] & (o_i < inputs)[None, :]
        b_rows = tl.load(p_rows[:, None] + o_i[None, :], mask=m_rows, other=0.0).to(tl.float32)
        b_sum += b_rows * b_x[None, :]
    # the sum across threads comes once, after the loop
    b_h = tl.sum(b_sum, axis=1)
    tl.store(p_h + (i_plane * tokens * K + i_slot) * rows_A + o_c, b_h, mask=m_c)


@triton.jit
def expand_kernel(
    p_y, p_h, p_B, p_index, p_weight, p_logits,
    y_stride, h_stride, logits_stride, tokens, rows_B,
    column_0, width_0, column_1, width_1, column_2, width_2,
    scaling,
    P: tl.constexpr, G: tl.constexpr, K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, ALL: tl.constexpr,
    ROUTED: tl.constexpr, RAW: tl.constexpr, GELU: tl.constexpr, UNIT: tl.constexpr, BLOCK_O: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """y += scaling * sum_k weight_k B[e_k] h_k for few tokens: of B and h only the chosen experts are read.

    Grid: tiles of BLOCK_O columns of y (none crosses members), tokens. All R ranks of an expert are one tile, BLOCK_R.
    p_y [T, O], rows `y_stride * UNIT` apart, written in place; p_B [E, rows_B, R].
    p_h: with ALL u[T, G, E, R] = A x of all experts, tokens `h_stride * UNIT` apart; else P planes [P, T, K, G, R] of
    the chosen ones (shrink_kernel), to be added up, slots as far apart. GELU: of gelu(h), for PESC.
    p_index, p_weight [T, G or 1, K]: each token's experts and gates, shared by all members if G = 1. With ROUTED they
    are written, from p_logits [T, G * E], rows `logits_stride` apart; RAW says how they are normalised (route.py).
    """
    i_t = tl.program_id(1)
    i_g, column, row, offset, left = _locate(
        tl.program_id(0), column_0, width_0, column_1, width_1, column_2, width_2, BLOCK_O
    )
    o_o = tl.arange(0, BLOCK_O)
    o_r = tl.arange(0, BLOCK_R)
    m_o = o_o < left
    p_tile = p_y + i_t.to(tl.int64) * (y_stride * UNIT) + column + o_o
    b_y = tl.load(p_tile, mask=m_o, other=0.0).to(tl.float32)
    first = (i_t * G + (i_g if G > 1 else 0)) * K
    if ROUTED:
        b_index, b_share = choose_alone(p_logits + i_t.to(tl.int64) * logits_stride + i_g * E, E, K, RAW)
    m_y = m_o if ROUTED else o_o < 0
    b_sum = tl.zeros((BLOCK_O, BLOCK_R), tl.float32)
    for k in tl.static_range(K):
        m_r = o_r < R
        if ROUTED:
            i_e = b_index[k].to(tl.int64)
            b_weight = b_share[k] * scaling
        else:
            i_e = tl.load(p_index + first + k).to(tl.int64)
            b_weight = tl.load(p_weight + first + k) * scaling
            # a gate of zero is no slot; it arrives with the expert's number, so that no load waits longer for it
            m_r = m_r & is_slot(b_weight)
            m_y = m_y | (m_o & is_slot(b_weight))
        p_up = p_B + (i_e * rows_B + row) * R + o_o[:, None] * R + o_r[None, :]
        b_B = tl.load(p_up, mask=m_o[:, None] & m_r[None, :], other=0.0).to(tl.float32)
        if ALL:
            p_low = p_h + i_t.to(tl.int64) * (h_stride * UNIT) + (i_g * E + i_e) * R + o_r
        else:
            p_low = p_h + (i_t * K + k) * (h_stride * UNIT) + i_g * R + o_r
        b_h = tl.zeros((BLOCK_R,), tl.float32)
        for plane in tl.static_range(P):
            b_h += tl.load(p_low + plane * tokens * K * (h_stride * UNIT), mask=m_r, other=0.0).to(tl.float32)
        if GELU:
            b_h = _exact_gelu(b_h)
        b_sum += b_B * (b_h * b_weight)[None, :]
        if ROUTED:
            # by the member's first tile alone
            tl.store(p_index + first + k, i_e, mask=offset == 0)
            tl.store(p_weight + first + k, b_share[k], mask=offset == 0)
    tl.store(p_tile, (b_y + tl.sum(b_sum, axis=1)).to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def expand_all_kernel(
    p_y, p_u, p_B, p_index, p_weight, p_logits,
    y_stride, u_stride, logits_stride, tokens, rows_B,
    column_0, width_0, column_1, width_1, column_2, width_2,
    scaling,
    G: tl.constexpr, K: tl.constexpr, E: tl.constexpr, R: tl.constexpr, ROUTED: tl.constexpr,
    RAW: tl.constexpr, GELU: tl.constexpr, UNIT: tl.constexpr, DOT: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_C: tl.constexpr, BLOCK_E: tl.constexpr, LINES: tl.constexpr,
):  # fmt: skip
    """y += scaling * sum_k weight_k B[e_k] u[e_k] for many tokens, as one product over all experts on the tensor cores.

    The sum over experts and ranks is one contraction of C = E R terms, in which u is multiplied by
    g[t, c] = scaling * sum_k weight_k [e_k = c / R]: a comparison and no gather, rounded to type DOT, summed in fp32.
    No address hangs on what was chosen, so B, u and y are asked for before that is known; experts that nobody chose are
    multiplied by zero rather than skipped, which would make the loads wait.
    Grid: tiles of BLOCK_O columns of y (none crosses members), tiles of BLOCK_T tokens. BLOCK_C terms are one step.
    Arguments as in `expand_kernel` with ALL; BLOCK_E >= E and LINES, of 128 bytes in a tile of one expert's B, are for
    ROUTED.
    """
    i_g, column, row, offset, left = _locate(
        tl.program_id(0), column_0, width_0, column_1, width_1, column_2, width_2, BLOCK_O
    )
    o_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_o = tl.arange(0, BLOCK_O)
    m_t = o_t < tokens
    o_slot = (o_t * G + (i_g if G > 1 else 0)) * K
    p_tile = p_y + o_t.to(tl.int64)[:, None] * (y_stride * UNIT) + column + o_o[None, :]
    m_y = m_t[:, None] & (o_o < left)[None, :]
    b_y = tl.load(p_tile, mask=m_y, other=0.0)
    if ROUTED:
        # what is chosen has to be known before the loop: until then B comes closer, a word of each 128 bytes
        WORD: tl.constexpr = 1024 // p_B.dtype.element_ty.primitive_bitwidth
        o_e = tl.arange(0, BLOCK_E * LINES) // LINES
        o_w = tl.arange(0, BLOCK_E * LINES) % LINES * WORD
        p_word = p_B + (o_e.to(tl.int64) * rows_B + row) * R + o_w
        tl.load(p_word, mask=(o_e < E) & (o_w < left * R), volatile=True)
        p_own = p_logits + tl.minimum(o_t, tokens - 1).to(tl.int64) * logits_stride + i_g * E
        b_index, b_share = choose_alone(p_own, E, K, RAW)
        for k in tl.static_range(K):
            tl.store(p_index + o_slot + k, b_index[k].to(tl.int64), mask=m_t & (offset == 0))
            tl.store(p_weight + o_slot + k, b_share[k], mask=m_t & (offset == 0))
    else:
        # a token without a gate keeps its y; its rows of B belong to other tokens too, so they are read all the same
        m_used = o_t < 0
        for k in tl.static_range(K):
            m_used = m_used | (tl.load(p_weight + o_slot + k, mask=m_t, other=0.0) != 0)
        m_y = m_y & m_used[:, None]
    b_sum = tl.zeros((BLOCK_T, BLOCK_O), tl.float32)
    for first in range(0, E * R, BLOCK_C):
        o_c = first + tl.arange(0, BLOCK_C)
        o_expert = o_c // R
        m_c = (o_c < E * R)[None, :]
        p_low = p_u + o_t.to(tl.int64)[:, None] * (u_stride * UNIT) + i_g * E * R + o_c[None, :]
        b_u = tl.load(p_low, mask=m_t[:, None] & m_c, other=0.0)
        b_gate = tl.zeros((BLOCK_T, BLOCK_C), tl.float32)
        for k in tl.static_range(K):
            if ROUTED:
                b_chosen = b_index[k]
                b_weight = b_share[k] * scaling
            else:
                b_chosen = tl.load(p_index + o_slot + k, mask=m_t, other=-1).to(tl.int32)
                b_weight = tl.load(p_weight + o_slot + k, mask=m_t, other=0.0) * scaling
            b_gate += tl.where(b_chosen[:, None] == o_expert[None, :], b_weight[:, None], 0.0)
        # the last load, because its way to the tensor cores waits for it: all others are in flight by then
        p_up = p_B + (o_expert.to(tl.int64) * rows_B * R + o_c % R)[None, :] + (row + o_o)[:, None] * R
        b_B = tl.load(p_up, mask=(o_o < left)[:, None] & m_c, other=0.0).to(DOT)
        b_h = b_u.to(tl.float32)
        if GELU:
            b_h = _exact_gelu(b_h)
        b_sum = tl.dot((b_h * b_gate).to(DOT), tl.trans(b_B), b_sum, input_precision="ieee")
    tl.store(p_tile, (b_y.to(tl.float32) + b_sum).to(p_y.dtype.element_ty), mask=m_y)


@triton.jit
def _locate(tile, column_0, width_0, column_1, width_1, column_2, width_2, BLOCK_O: tl.constexpr):
    """(member, first column of y, first row of the joined B, rows before it in the member, rows left) of a tile."""
    tiles_0 = tl.cdiv(width_0, BLOCK_O)
    tiles_1 = tl.cdiv(width_1, BLOCK_O)
    in_0 = tile < tiles_0
    in_1 = tile < tiles_0 + tiles_1
    i_g = tl.where(in_0, 0, tl.where(in_1, 1, 2))
    column = tl.where(in_0, column_0, tl.where(in_1, column_1, column_2))
    width = tl.where(in_0, width_0, tl.where(in_1, width_1, width_2))
    row = tl.where(in_0, 0, tl.where(in_1, width_0, width_0 + width_1))
    offset = (tile - tl.where(in_0, 0, tl.where(in_1, tiles_0, tiles_0 + tiles_1))) * BLOCK_O
    return i_g, column + offset, row + offset, offset, width - offset


@triton.jit
def _exact_gelu(b_h):
    return 0.5 * b_h * (1.0 + tl.erf(b_h * 0.7071067811865476))
