"""Experts beside a lean product, in its own launch: the first programs shrink, the others expand what they have shrunk.

In: x, the factors, gates that are known or logits that are not. Out: h = A x by the programs in front, a flag that
counts them, and [T, rows] of B h for whoever has waited for it. The hardware starts programs in the order of their
numbers and nobody waits for a later one, so it ends. One or two tokens read the chosen experts alone; more, and routers
of the linear's own, have all A multiplied. Names as in gather.py. Next: lean.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_wait

from adafuse.kernels.config import (
    GEMV_TOKENS,
    MULTIPROCESSORS,
    ROUTED_MAX_EXPERTS,
    WIDE_TERMS,
    LeanCut,
    Members,
    Neighbours,
    cdiv,
    flat,
    power_of_2,
)
from adafuse.kernels.gather import _exact_gelu
from adafuse.kernels.route import choose_alone, is_slot
from adafuse.kernels.times import early_rows, load_squares, rstd, times_x

# a flag that no program has raised yet; the bits of h that is not there yet, which no sum has
DOWN = -1
_DOWN = tl.constexpr(DOWN)
WIDE = tl.constexpr(WIDE_TERMS)


@dataclass(frozen=True)
class Beside:
    """Experts beside a product: `rows_SI` are all A, [G * E * R, I] by member, expert and rank, then its routers' rows.

    `lora_B_EOR` None: the rows are shrunk and left in `h`. `logits` None: index and weight [T, K] were chosen before,
    `ready` says how long before: by a launch that had ended when the one before this one began. Else the member's
    logits are `logits` [T, G * E] (part of h, or of another product's), and index and weight [T, G, K] are written;
    members that share one router have [T, 1, K]. `slots` [T * K, M] of MixLoRA, an input of its own for each choice: a
    gated product leaves each choice's there (and in y their weighted sum), another one's A reads them.
    """

    rows_SI: Tensor
    lora_B_EOR: Tensor | None
    members: Members
    experts: int
    rank: int
    top_k: int
    scaling: float
    index: Tensor
    weight: Tensor
    h: Tensor
    flags: Tensor
    turn: int
    logits: Tensor | None = None
    raw: bool = False
    gelu: bool = False
    ready: bool = False
    slots: Tensor | None = None


def scratch(
    tokens: int, beside_rows: int, members: int, rank: int, top_k: int, known: bool, slots: bool = False
) -> tuple[int, int]:
    """Shape of `Beside.h`: of the chosen experts' rows alone where they are known and tokens are few, else of all."""
    few = known and tokens <= GEMV_TOKENS
    return (tokens * top_k, members * rank) if few else (tokens * (top_k if slots else 1), beside_rows)


def neighbours(beside: Beside | None) -> Neighbours:
    """How a product's cut (config.py) calls these experts."""
    if beside is None:
        return "none"
    if beside.logits is not None:
        return "own"
    return "wide" if beside.top_k * beside.rank >= WIDE_TERMS else "known"


def arguments(beside: Beside | None, tokens: int, cut: LeanCut) -> dict[str, Any]:
    """What product_kernel is told about experts."""
    if beside is None:
        nothing = dict.fromkeys(
            ("p_A", "p_B", "p_index", "p_weight", "p_h", "p_logits", "p_flags", "p_slots")
        )
        numbers = dict.fromkeys(("turn", "logits_stride"), 0) | {"scaling": 0.0}
        sizes = dict.fromkeys(("FRONT", "ROWS_A", "ROWS_B", "G"), 0) | dict.fromkeys(
            ("E", "K", "R", "ROUTERS"), 1
        )
        flags = dict.fromkeys(("CHOSEN", "EXPAND", "ROUTED", "RAW", "GELU", "READY"), False)
        return nothing | numbers | sizes | flags | _edges([]) | {"FRONT_ROWS": 1, "FRONT_BLOCK": 1}
    routed, groups = beside.logits is not None, len(beside.members)
    assert not routed or beside.experts <= ROUTED_MAX_EXPERTS, beside.experts
    chosen = beside.lora_B_EOR is not None and not routed and tokens <= GEMV_TOKENS
    rows = groups * beside.rank if chosen else beside.rows_SI.shape[0]
    pairs = tokens * beside.top_k if chosen else 1
    front_rows, front_block = cut.front_rows, cut.block
    if tokens <= GEMV_TOKENS:
        # at most a program a multiprocessor, or those that read W would have to wait for a place
        front_rows = max(front_rows, min(cut.rows, power_of_2(cdiv(rows * pairs, MULTIPROCESSORS))))
        # most of its rows are on their way before x is known
        room = 2 * cut.rows * cut.block // front_rows
        front_block = max(cut.block, min(power_of_2(beside.rows_SI.shape[1]), room))
    front = cdiv(rows, front_rows) * pairs
    return {
        "p_A": beside.rows_SI,
        "p_B": beside.lora_B_EOR,
        "p_index": beside.index,
        "p_weight": beside.weight,
        "p_h": beside.h,
        "p_logits": beside.logits,
        "p_flags": beside.flags,
        "p_slots": beside.slots,
        "turn": beside.turn,
        "logits_stride": beside.logits.stride(0) if beside.logits is not None else 0,
        "scaling": beside.scaling,
        "FRONT": front,
        "ROWS_A": beside.rows_SI.shape[0],
        "ROWS_B": 0 if beside.lora_B_EOR is None else beside.lora_B_EOR.shape[1],
        "G": groups,
        "E": beside.experts,
        "K": beside.top_k,
        "R": beside.rank,
        "CHOSEN": chosen,
        "EXPAND": beside.lora_B_EOR is not None,
        "ROUTED": routed,
        "ROUTERS": beside.index.shape[1] if routed else 1,
        "RAW": beside.raw,
        "GELU": beside.gelu,
        "READY": beside.ready,
        "FRONT_ROWS": front_rows,
        "FRONT_BLOCK": front_block,
        **_edges(beside.members),
    }


def _edges(members: Members) -> dict[str, int]:
    """Columns and widths as constants of the kernel."""
    edges = flat(members or [(0, 0)])
    return {name.upper(): number for name, number in edges.items()}


@triton.jit
def front(
    i_program, p_x, p_squares, p_A, p_index, p_weight, p_h, p_flags, p_slots, turn, eps,
    T: tl.constexpr, PADDED: tl.constexpr, INPUTS: tl.constexpr, PARTS: tl.constexpr, FRONT_ROWS: tl.constexpr,
    ROWS_A: tl.constexpr, G: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, CHOSEN: tl.constexpr,
    EXPAND: tl.constexpr, READY: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
    TENSOR_CORES: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """h = A x of some rows, scaled as the norm says: of one (token, choice) pair's expert, or of all for all tokens."""
    ROWS: tl.constexpr = T * K if p_slots is not None else T
    OWN: tl.constexpr = 1 if CHOSEN else ROWS
    LEAST: tl.constexpr = triton.next_power_of_2(ROWS)
    OWN_PADDED: tl.constexpr = 1 if CHOSEN else (PADDED if PADDED > LEAST else LEAST)
    if CHOSEN:
        TILES: tl.constexpr = (G * R + FRONT_ROWS - 1) // FRONT_ROWS
        i_pair = i_program // TILES
        o_c = i_program % TILES * FRONT_ROWS + tl.arange(0, FRONT_ROWS)
        if PDL and not READY:
            gdc_wait()
        i_e = tl.load(p_index + i_pair).to(tl.int32)
        m_h = o_c < G * R
        # of a slot without a gate nothing is read, here or below
        m_row = m_h & is_slot(tl.load(p_weight + i_pair))
        o_row = (o_c // R * E + i_e) * R + o_c % R
        i_t = i_pair // K
        o_h = i_pair * (G * R) + o_c
    else:
        o_row = i_program * FRONT_ROWS + tl.arange(0, FRONT_ROWS)
        m_row = o_row < ROWS_A
        m_h = m_row
        i_t = 0
        o_h = o_row
    o_t = tl.arange(0, OWN_PADDED)
    p_rows = p_A + o_row.to(tl.int64) * INPUTS
    p_own = p_x + i_t * INPUTS
    if p_slots is not None:
        p_own = p_slots
        if CHOSEN:
            p_own += i_pair * INPUTS
    b_A = early_rows(p_rows, m_row, INPUTS, BLOCK, False, 1, TENSOR_CORES)
    if PDL and (READY or not CHOSEN):
        gdc_wait()
    if PARTS > 0:
        b_squares = load_squares(p_squares + i_t * PARTS, OWN, PARTS, OWN_PADDED)
    b_h = times_x(
        b_A, p_rows, m_row, p_own, INPUTS, OWN, OWN_PADDED, BLOCK, False, 1, STAGES, TENSOR_CORES, DOT
    )
    if PARTS > 0:
        b_h *= rstd(b_squares, eps, INPUTS)[:, None]
    tl.store(p_h + o_t[:, None] * ROWS_A + o_h[None, :], b_h, mask=(o_t < OWN)[:, None] & m_h[None, :])
    if EXPAND and not CHOSEN:
        # every thread's h is stored before the one thread that holds the atomic releases it
        tl.debug_barrier()
        tl.atomic_add(p_flags + turn, 1, sem="release")


@triton.jit
def few_gates(
    p_index, p_weight, p_logits, logits_stride, b_g, m_row, m_first, known,
    T: tl.constexpr, PADDED: tl.constexpr, ROUTERS: tl.constexpr, E: tl.constexpr, K: tl.constexpr,
    R: tl.constexpr, ROUTED: tl.constexpr, RAW: tl.constexpr,
):  # fmt: skip
    """Expert and gate of each term of each row, [T, rows, K * R] (choices side by side), for few tokens; zeros where
    there is none, or not `known`.

    ROUTED: each row's member `b_g` [rows] chooses by its own logits, and tells in p_index and p_weight where `m_first`.
    """
    TERMS: tl.constexpr = triton.next_power_of_2(K * R)
    o_t = tl.arange(0, PADDED)[:, None, None]
    o_k = (tl.arange(0, TERMS) // R)[None, None, :]
    m_term = (o_t < T) & (b_g >= 0)[None, :, None] & (tl.arange(0, TERMS) < K * R)[None, None, :] & known
    if ROUTED:
        o_row = tl.arange(0, PADDED)[:, None]
        # of members that share a router the first tells
        b_own = tl.minimum(tl.maximum(b_g, 0), ROUTERS - 1)[None, :]
        # past the L1 cache, where a program that came before the flag would have left what was there before
        b_index, b_share = choose_alone(
            p_logits + tl.minimum(o_row, T - 1) * logits_stride + b_own * E, E, K, RAW, ".cg"
        )
        b_e = tl.zeros((PADDED, b_g.shape[0], TERMS), tl.int32)
        b_gate = tl.zeros((PADDED, b_g.shape[0], TERMS), tl.float32)
        m_told = (o_row < T) & m_first[None, :] & (b_g < ROUTERS)[None, :] & known
        for k in tl.static_range(K):
            o_told = (o_row * ROUTERS + b_own) * K + k
            tl.store(p_index + o_told, b_index[k].to(tl.int64), mask=m_told)
            tl.store(p_weight + o_told, b_share[k], mask=m_told)
            b_e = tl.where(o_k == k, b_index[k][:, :, None], b_e)
            b_gate = tl.where(m_term & (o_k == k), b_share[k][:, :, None], b_gate)
    elif K * R >= WIDE:
        b_e = tl.zeros((PADDED, b_g.shape[0], TERMS), tl.int32)
        b_gate = tl.zeros((PADDED, b_g.shape[0], TERMS), tl.float32)
        for k in tl.static_range(K):
            b_index_k = tl.load(p_index + o_t * K + k, mask=o_t < T, other=0).to(tl.int32)
            b_share_k = tl.load(p_weight + o_t * K + k, mask=o_t < T, other=0.0)
            # what a wide load reads for a slot without a gate, whose expert's number says nothing, is expert 0's
            b_e = tl.where((o_k == k) & is_slot(b_share_k), b_index_k, b_e)
            b_gate = tl.where(m_term & (o_k == k), b_share_k, b_gate)
    else:
        b_e = tl.load(p_index + o_t * K + o_k, mask=m_term, other=0).to(tl.int32)
        b_gate = tl.load(p_weight + o_t * K + o_k, mask=m_term, other=0.0)
    return b_e, b_gate


@triton.jit
def few_ups(p_B, b_e, b_gate, b_g, o_B, ROWS_B: tl.constexpr, K: tl.constexpr, R: tl.constexpr):
    """[T, rows, K * R] of B for rows `o_B` of it, which are none of B's where `b_g` is no member. Of a term without a
    gate nothing is used, and of those that are not WIDE nothing is read, here or below.
    """
    o_B = tl.where(b_g >= 0, o_B, 0)
    o_r = (tl.arange(0, triton.next_power_of_2(K * R)) % R)[None, None, :]
    o_up = (b_e.to(tl.int64) * ROWS_B + o_B[None, :, None]) * R + o_r
    if K * R >= WIDE and R % 8 == 0:
        # eight terms side by side are one expert's: read at once, and without a mask, which would hide that
        o_up = tl.max_contiguous(tl.multiple_of(o_up, (1, 1, 8)), (1, 1, 8))
        b_B = tl.load(p_B + o_up)
        return tl.where(is_slot(b_gate), b_B, 0.0)
    return tl.load(p_B + o_up, mask=is_slot(b_gate), other=0.0)


@triton.jit
def few_lows(
    p_h, b_e, b_gate, b_g, known, ROWS_A: tl.constexpr, E: tl.constexpr, K: tl.constexpr, R: tl.constexpr
):
    """[T, rows, K * R] of h of all rows of A, past the L1 cache, which does not see what other processors wrote."""
    o_t = tl.arange(0, b_gate.shape[0])[:, None, None]
    o_c = tl.arange(0, triton.next_power_of_2(K * R))[None, None, :]
    o_low = o_t * ROWS_A + (tl.maximum(b_g, 0)[None, :, None] * E + b_e) * R + o_c % R
    return _load_lows(p_h, o_low, is_slot(b_gate) & known, K, R)


@triton.jit
def chosen_lows(p_h, b_chosen, b_g, G: tl.constexpr, K: tl.constexpr, R: tl.constexpr, COPIES: tl.constexpr):
    """[T, rows * COPIES, K * R] of h of the chosen rows of A, whether it is there or not; each row COPIES times.

    With as many elements as threads no two threads read the same one. Else the compiler would have several read it,
    each for itself, and while h is written one could find what another does not: `is_missing` asks one of them alone.
    """
    ROWS: tl.constexpr = b_g.shape[0]
    o_t = tl.arange(0, b_chosen.shape[0])[:, None, None]
    o_c = tl.arange(0, triton.next_power_of_2(K * R))[None, None, :]
    b_own = tl.reshape(tl.broadcast_to(b_g[:, None], (ROWS, COPIES)), (ROWS * COPIES,))[None, :, None]
    # terms beyond the last choice are masked behind a wide load, not before it
    o_low = (o_t * K + tl.minimum(o_c // R, K - 1)) * (G * R) + tl.maximum(b_own, 0) * R + o_c % R
    return _load_lows(p_h, o_low, is_slot(b_chosen) & (b_own >= 0), K, R)


@triton.jit
def _load_lows(p_h, o_low, m_low, K: tl.constexpr, R: tl.constexpr):
    if K * R >= WIDE and R % 8 == 0:
        o_low = tl.max_contiguous(tl.multiple_of(o_low, (1, 1, 4)), (1, 1, 4))
        b_h = tl.load(p_h + o_low, volatile=True)
        return tl.where(m_low, b_h, 0.0)
    return tl.load(p_h + o_low, mask=m_low, other=0.0, volatile=True)


@triton.jit
def is_missing(b_h):
    """Whether any of h is as a step's last launch leaves it (ends.py): not shrunk yet. No sum has these bits."""
    return tl.max(tl.max(tl.max((b_h.to(tl.int32, bitcast=True) == _DOWN).to(tl.int32), 2), 1), 0) > 0


@triton.jit
def one_copy(b_h, COPIES: tl.constexpr):
    """[T, rows, K * R] of [T, rows * COPIES, K * R], which are alike."""
    if COPIES == 1:
        return b_h
    T: tl.constexpr = b_h.shape[0]
    ROWS: tl.constexpr = b_h.shape[1] // COPIES
    return tl.max(tl.reshape(b_h, (T, ROWS, COPIES, b_h.shape[2])), 2)


@triton.jit
def few_sum(b_B, b_gate, b_h, scaling, GELU: tl.constexpr):
    """[T, rows] of scaling * sum_k gate_k B[e_k] h_k, for any factor `b_gate` of the terms."""
    if GELU:
        b_h = _exact_gelu(b_h)
    return tl.sum(b_B.to(tl.float32) * (b_h * (b_gate * scaling)), 2)


@triton.jit
def expand_all(
    b_first, p_B, p_index, p_weight, p_h, p_logits, logits_stride, scaling, i_g, exists, o_B, m_own, starts,
    ROWS_A: tl.constexpr, ROWS_B: tl.constexpr, T: tl.constexpr, PADDED: tl.constexpr, ROUTERS: tl.constexpr,
    E: tl.constexpr, K: tl.constexpr, R: tl.constexpr, ROUTED: tl.constexpr, RAW: tl.constexpr,
    GELU: tl.constexpr, SLOT: tl.constexpr, OF_SLOTS: tl.constexpr, BLOCK_C: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The same for many tokens, on the tensor cores: one contraction over all experts and ranks, in which a gate is a
    factor of h. Of an expert that nobody chose neither h nor B counts, whatever they hold. `b_first` are the first
    BLOCK_C terms of B, which were asked for long before.
    """
    o_t = tl.arange(0, PADDED)
    m_t = o_t < T
    i_router = tl.minimum(i_g, ROUTERS - 1)
    o_slot = (o_t * ROUTERS + i_router) * K
    if ROUTED:
        p_own = p_logits + tl.minimum(o_t, T - 1) * logits_stride + i_router * E
        b_index, b_share = choose_alone(p_own, E, K, RAW)
        for k in tl.static_range(K):
            m_told = m_t & starts & exists & (i_g < ROUTERS)
            tl.store(p_index + o_slot + k, b_index[k].to(tl.int64), mask=m_told)
            tl.store(p_weight + o_slot + k, b_share[k], mask=m_told)
    b_sum = tl.zeros((o_B.shape[0], PADDED), tl.float32)
    for first in tl.static_range(0, E * R, BLOCK_C):
        o_c = first + tl.arange(0, BLOCK_C)
        o_e = o_c // R
        o_h = (i_g * E * R + o_c)[None, :]
        m_h = m_t[:, None] & (o_c < E * R)[None, :] & exists
        b_gate = tl.zeros((PADDED, BLOCK_C), tl.float32)
        b_gated = tl.zeros((PADDED, BLOCK_C), tl.float32)
        for k in tl.static_range(K):
            if ROUTED:
                b_e = b_index[k]
                b_weight = b_share[k]
            else:
                b_e = tl.load(p_index + o_slot + k, mask=m_t, other=-1).to(tl.int32)
                b_weight = tl.load(p_weight + o_slot + k, mask=m_t, other=0.0)
            if SLOT >= 0:
                # of one choice alone, as if it had all the weight
                b_weight = tl.where(is_slot(b_weight), 1.0 if k == SLOT else 0.0, 0.0)
            b_own = tl.where(m_t & exists, b_weight * scaling, 0.0)
            b_own = tl.where(o_e[None, :] == b_e[:, None], b_own[:, None], 0.0)
            b_gate += b_own
            if OF_SLOTS:
                p_low = p_h + (o_t * K + k)[:, None] * ROWS_A + o_h
                b_h = tl.load(p_low, mask=m_h & (b_own != 0), other=0.0, cache_modifier=".cg")
                b_gated += b_h * b_own
        if not OF_SLOTS:
            b_h = tl.load(p_h + o_t[:, None] * ROWS_A + o_h, mask=m_h, other=0.0, cache_modifier=".cg")
            if GELU:
                b_h = _exact_gelu(b_h)
            b_gated = tl.where(b_gate != 0, b_h * b_gate, 0.0)
        m_used = (o_c < E * R) & (tl.max((b_gate != 0).to(tl.int32), 0) > 0)
        b_rows = b_first if first == 0 else load_terms(p_B, first, o_B, m_own, ROWS_B, E, R, BLOCK_C)
        b_rows = tl.where(m_used[None, :], b_rows, 0.0).to(DOT)
        b_sum = tl.dot(b_rows, tl.trans(b_gated.to(DOT)), b_sum, input_precision="ieee")
    return tl.trans(b_sum)


@triton.jit
def load_terms(
    p_B, first, o_B, m_own, ROWS_B: tl.constexpr, E: tl.constexpr, R: tl.constexpr, BLOCK_C: tl.constexpr
):
    """[rows, BLOCK_C] of B of all experts, side by side, from term `first` on."""
    o_c = first + tl.arange(0, BLOCK_C)
    p_up = p_B + ((o_c // R).to(tl.int64) * ROWS_B * R + o_c % R)[None, :] + o_B[:, None] * R
    return tl.load(p_up, mask=m_own[:, None] & (o_c < E * R)[None, :], other=0.0)


@triton.jit
def member(
    column, COLUMN_0: tl.constexpr, WIDTH_0: tl.constexpr, COLUMN_1: tl.constexpr, WIDTH_1: tl.constexpr,
    COLUMN_2: tl.constexpr, WIDTH_2: tl.constexpr,
):  # fmt: skip
    """The member that `column` of y belongs to (or -1), and what leads from it to a row of the joined B."""
    in_0 = (column >= COLUMN_0) & (column < COLUMN_0 + WIDTH_0)
    in_1 = (column >= COLUMN_1) & (column < COLUMN_1 + WIDTH_1)
    in_2 = (column >= COLUMN_2) & (column < COLUMN_2 + WIDTH_2)
    i_g = tl.where(in_0, 0, tl.where(in_1, 1, tl.where(in_2, 2, -1)))
    shift = tl.where(in_0, -COLUMN_0, tl.where(in_1, WIDTH_0 - COLUMN_1, WIDTH_0 + WIDTH_1 - COLUMN_2))
    return i_g, shift


@triton.jit
def member_start(i_g, COLUMN_0: tl.constexpr, COLUMN_1: tl.constexpr, COLUMN_2: tl.constexpr):
    """Where member `i_g` begins in y."""
    return tl.where(i_g == 0, COLUMN_0, tl.where(i_g == 1, COLUMN_1, COLUMN_2))
