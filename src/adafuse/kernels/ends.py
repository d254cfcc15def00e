"""The first and the last launches of a lean decode step: the token's embedding, its gates, and the token after it.

In: ids, hidden states, logits. Out: the sum of all layers' outputs with what the first norm needs; experts and gates;
the next ids, and the position moved on. `embed` starts when the step before has ended, and all others after it:
whatever only the end of a step changes (the position, the cache's older slots) they may read early. Names as in
gather.py. Next: engine/lean.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adafuse.kernels.beside import _DOWN
from adafuse.kernels.config import NEXT_PIECES, ROUTE_TILE, ROUTE_WARPS, cdiv
from adafuse.kernels.lean import Norm, Residual, dependent
from adafuse.kernels.route import choose


@dataclass(frozen=True)
class Decision:
    """One router's word on x [T, I]: index [T, K] (int64), weight [T, K] and softmax [T, E] in fp32.

    `null`: the last row of the router is no expert, and where it leads all weights are zero. `normed`: x is read at a
    root mean square of one. With a table [N, T, K] (and which of its tokens have experts, [N, T]) it names the experts
    of step `step_1`; `raw`: weights are shares of the whole softmax.
    """

    x_TI: Tensor
    norm: Norm | None
    router_EI: Tensor
    index_TK: Tensor
    weight_TK: Tensor
    probs_TE: Tensor
    raw: bool
    null: bool
    normed: float | None
    table_NTK: Tensor | None = None
    used_NT: Tensor | None = None
    step_1: Tensor | None = None


@dataclass(frozen=True)
class Next:
    """Where the next ids go [T] and [T, M], what is counted on (`position`, and a table's step), and how it is chosen:
    the largest of logits + temperature * Gumbel noise of this seed; at a temperature of zero the largest logit.
    `flags` are those of all products of the step (lean.py).
    """

    logits_TV: Tensor
    token_T: Tensor
    ids_TM: Tensor
    position: Tensor
    step: Tensor | None
    temperature: Tensor
    seed: Tensor
    best: Tensor
    found: Tensor
    ended: Tensor
    flags: Tensor


def embed(token_T: Tensor, table_VD: Tensor, out: Residual) -> None:
    """The token's row into `out`, as the last layer of the token before would."""
    width = table_VD.shape[1]
    embed_kernel[(len(token_T),)](
        p_token=token_T,
        p_table=table_VD,
        p_sum=out.sum_TO,
        p_norm=out.norm_O,
        p_next=out.next_TO,
        p_squares=out.squares_TP,
        WIDTH=width,
        PARTS=out.squares_TP.shape[1],
        BLOCK=triton.next_power_of_2(width),
        BLOCK_P=triton.next_power_of_2(out.squares_TP.shape[1]),
        num_warps=8,
    )


def decide(work: Decision) -> None:
    """One program a token."""
    (rows, inputs), (tokens, top_k) = work.router_EI.shape, work.index_TK.shape
    block = triton.next_power_of_2(rows)
    decide_kernel[(tokens,)](
        p_x=work.x_TI,
        p_squares=work.norm and work.norm.squares_TP,
        p_router=work.router_EI,
        p_index=work.index_TK,
        p_weight=work.weight_TK,
        p_probs=work.probs_TE,
        p_table=work.table_NTK,
        p_used=work.used_NT,
        p_step=work.step_1,
        steps=1 if work.table_NTK is None else len(work.table_NTK),
        eps=work.norm.eps if work.norm else 0.0,
        normed_eps=work.normed or 0.0,
        INPUTS=inputs,
        PARTS=work.norm.squares_TP.shape[1] if work.norm else 0,
        E=rows - work.null,
        K=top_k,
        RAW=work.raw,
        NULL=work.null,
        NORMED=work.normed is not None,
        BLOCK_E=block,
        BLOCK_I=min(ROUTE_TILE // block, triton.next_power_of_2(inputs)),
        num_warps=ROUTE_WARPS,
        **dependent(work.x_TI.device),
    )


def choose_next(work: Next) -> None:
    """The vocabulary in pieces, and the last program to end picks from their best."""
    tokens, words = work.logits_TV.shape
    pieces = work.best.shape[1]
    next_kernel[(tokens, pieces)](
        p_logits=work.logits_TV,
        p_token=work.token_T,
        p_ids=work.ids_TM,
        p_position=work.position,
        p_step=work.step,
        p_temperature=work.temperature,
        p_seed=work.seed,
        p_best=work.best,
        p_found=work.found,
        p_ended=work.ended,
        p_flags=work.flags,
        slots=work.ids_TM.shape[1],
        FLAGS=len(work.flags),
        T=tokens,
        WORDS=words,
        PIECES=pieces,
        PIECE=cdiv(words, pieces),
        BLOCK_T=triton.next_power_of_2(tokens),
        BLOCK_P=triton.next_power_of_2(pieces),
        BLOCK=triton.next_power_of_2(cdiv(words, pieces)),
        num_warps=4,
        **dependent(work.logits_TV.device),
    )


def pieces_of(words: int) -> int:
    """How many programs look through a vocabulary."""
    return min(NEXT_PIECES, cdiv(words, 128))


@triton.jit
def embed_kernel(
    p_token, p_table, p_sum, p_norm, p_next, p_squares,
    WIDTH: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """sum [T, D] = table[token] in fp32, next = sum * norm, its square in the first of PARTS slots. Grid: tokens."""
    i_t = tl.program_id(0)
    o_d = tl.arange(0, BLOCK)
    o_p = tl.arange(0, BLOCK_P)
    m_d = o_d < WIDTH
    i_word = tl.load(p_token + i_t).to(tl.int64)
    b_sum = tl.load(p_table + i_word * WIDTH + o_d, mask=m_d, other=0.0).to(tl.float32)
    b_norm = tl.load(p_norm + o_d, mask=m_d, other=0.0).to(tl.float32)
    tl.store(p_sum + i_t * WIDTH + o_d, b_sum, mask=m_d)
    tl.store(p_next + i_t * WIDTH + o_d, (b_sum * b_norm).to(p_next.dtype.element_ty), mask=m_d)
    b_squares = tl.where(o_p == 0, tl.sum(b_sum * b_sum, 0), 0.0)
    tl.store(p_squares + i_t * PARTS + o_p, b_squares, mask=o_p < PARTS)


@triton.jit
def decide_kernel(
    p_x, p_squares, p_router, p_index, p_weight, p_probs, p_table, p_used, p_step,
    steps, eps, normed_eps,
    INPUTS: tl.constexpr, PARTS: tl.constexpr, E: tl.constexpr, K: tl.constexpr, RAW: tl.constexpr,
    NULL: tl.constexpr, NORMED: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_I: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`Decision`. Grid: tokens. The sums over threads come once, after the loop, as in route_kernel."""
    i_t = tl.program_id(0)
    o_e = tl.arange(0, BLOCK_E)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    b_terms = tl.zeros((BLOCK_E, BLOCK_I), tl.float32)
    b_squares = tl.zeros((BLOCK_I,), tl.float32)
    for start in range(0, INPUTS, BLOCK_I):
        o_i = start + tl.arange(0, BLOCK_I)
        m_i = o_i < INPUTS
        m_rows = (o_e < E + NULL)[:, None] & m_i[None, :]
        b_rows = tl.load(p_router + o_e[:, None] * INPUTS + o_i[None, :], mask=m_rows, other=0.0)
        b_x = tl.load(p_x + i_t * INPUTS + o_i, mask=m_i, other=0.0).to(tl.float32)
        b_terms += b_rows * b_x[None, :]
        b_squares += b_x * b_x
    scale = 1.0
    if PARTS > 0:
        o_p = tl.arange(0, triton.next_power_of_2(PARTS))
        b_parts = tl.load(p_squares + i_t * PARTS + o_p, mask=o_p < PARTS, other=0.0)
        scale = 1.0 / tl.sqrt(tl.sum(b_parts, 0) / INPUTS + eps)
    if NORMED:
        scale = scale / tl.sqrt(tl.sum(b_squares, 0) * scale * scale / INPUTS + normed_eps)
    b_logits = tl.sum(b_terms, 1) * scale
    b_rank, b_weight, b_probs = choose(b_logits, E, K, RAW)
    used = 1.0
    if NULL:
        b_null = tl.sum(tl.where(o_e == E, b_logits, 0.0), 0)
        b_lead = tl.max(tl.where(o_e < E, b_logits, float("-inf")), 0)
        used = tl.where(b_lead > b_null, 1.0, 0.0)
    tl.store(p_probs + i_t * E + o_e, b_probs, mask=o_e < E)
    if p_table is None:
        tl.store(p_index + i_t * K + b_rank, o_e.to(tl.int64), mask=(b_rank < K) & (o_e < E))
        tl.store(p_weight + i_t * K + b_rank, b_weight * used, mask=(b_rank < K) & (o_e < E))
    else:
        i_row = (tl.load(p_step) % steps) * tl.num_programs(0) + i_t
        if p_used is not None:
            used = tl.load(p_used + i_row).to(tl.float32)
        else:
            used = 1.0
        total = 0.0
        for k in tl.static_range(K):
            total += tl.sum(tl.where(o_e == tl.load(p_table + i_row * K + k), b_probs, 0.0), 0)
        if RAW:
            total = 1.0
        for k in tl.static_range(K):
            i_e = tl.load(p_table + i_row * K + k)
            weight = tl.sum(tl.where(o_e == i_e, b_probs, 0.0), 0) / total * used
            tl.store(p_index + i_t * K + k, i_e)
            tl.store(p_weight + i_t * K + k, weight)


@triton.jit
def next_kernel(
    p_logits, p_token, p_ids, p_position, p_step, p_temperature, p_seed, p_best, p_found, p_ended, p_flags,
    slots,
    T: tl.constexpr, WORDS: tl.constexpr, PIECES: tl.constexpr, PIECE: tl.constexpr, BLOCK_T: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK: tl.constexpr, FLAGS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`Next`. Grid: tokens, PIECES of the vocabulary. p_best, p_found [T, PIECES]; p_ended [1], which is lowered again,
    as p_flags [FLAGS] of all products of the step are.

    Of equal words the first; one is chosen even if all are NaN. The next id of slot `position` goes to slot
    `position + 1` of ids, where it will be read from.
    """
    i_t = tl.program_id(0)
    i_piece = tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    position = tl.load(p_position)
    temperature = tl.load(p_temperature)
    o_v = i_piece * PIECE + tl.arange(0, BLOCK)
    m_v = (o_v < WORDS) & (o_v < i_piece * PIECE + PIECE)
    b_score = tl.load(p_logits + i_t * WORDS + o_v, mask=m_v, other=float("-inf")).to(tl.float32)
    if temperature > 0:
        # of each word of each step a number of its own
        offset = ((position * T + i_t) * WORDS).to(tl.int32)
        b_uniform = tl.maximum(tl.rand(tl.load(p_seed), offset + o_v), 1e-12)
        b_score += temperature * -tl.log(-tl.log(b_uniform))
    best = tl.max(b_score, 0)
    tl.store(p_best + i_t * PIECES + i_piece, best)
    tl.store(p_found + i_t * PIECES + i_piece, tl.min(tl.where(m_v & (b_score == best), o_v, WORDS - 1), 0))
    tl.debug_barrier()
    if tl.atomic_add(p_ended, 1, sem="acq_rel") < T * PIECES - 1:
        return
    o_t = tl.arange(0, BLOCK_T)
    o_p = tl.arange(0, BLOCK_P)
    m_t = o_t < T
    m_all = m_t[:, None] & (o_p < PIECES)[None, :]
    o_all = o_t[:, None] * PIECES + o_p[None, :]
    b_best = tl.load(p_best + o_all, mask=m_all, other=float("-inf"), cache_modifier=".cg")
    b_found = tl.load(p_found + o_all, mask=m_all, other=WORDS - 1, cache_modifier=".cg")
    m_best = b_best == tl.max(b_best, 1)[:, None]
    b_token = tl.min(tl.where(m_best, b_found, WORDS - 1), 1).to(tl.int64)
    tl.store(p_token + o_t, b_token, mask=m_t)
    tl.store(p_ids + o_t * slots + position + 1, b_token, mask=m_t)
    tl.store(p_position, position + 1)
    if p_step is not None:
        tl.store(p_step, tl.load(p_step) + 1)
    tl.store(p_ended, 0)
    for start in range(0, FLAGS, 4096):
        o_flag = start + tl.arange(0, 4096)
        tl.store(p_flags + o_flag, _DOWN, mask=o_flag < FLAGS)
