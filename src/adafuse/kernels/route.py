"""Routers in one launch: logits, softmax and top-k of every token, which are half a dozen launches in PyTorch.

In: the hidden states that the routers look at and their fp32 rows. Out: the chosen experts, their weights and the whole
softmax. Token-level routing runs it once per token step, block-wise routing once per block; gather.py uses what was
chosen. Layer-wise routing gets its logits with the base product and chooses in gather.py (`choose_alone`).
`is_slot` is what the kernels ask of a gate: one of exactly zero is no choice at all. Letters as in naive.py, names as
in gather.py. Next: gather.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adafuse.kernels.config import ROUTE_STAGES, ROUTE_TILE, ROUTE_WARPS, cdiv, rows_of


def route(x_TI: Tensor, router_GEI: Tensor, top_k: int, raw: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`naive.route`: index[T, G, K] (int64), weight[T, G, K] and softmax[T, G, E] (fp32); the routers are fp32."""
    x_TI = rows_of(x_TI)
    (tokens, inputs), (groups, experts, _) = x_TI.shape, router_GEI.shape
    index_TGK = torch.empty(tokens, groups, top_k, dtype=torch.int64, device=x_TI.device)
    weight_TGK = torch.empty(tokens, groups, top_k, dtype=torch.float32, device=x_TI.device)
    probs_TGE = torch.empty(tokens, groups, experts, dtype=torch.float32, device=x_TI.device)
    block_e = triton.next_power_of_2(experts)
    block_i = min(ROUTE_TILE // block_e, triton.next_power_of_2(inputs))
    route_kernel[(tokens, groups)](
        p_x=x_TI,
        p_router=router_GEI.contiguous(),
        p_index=index_TGK,
        p_weight=weight_TGK,
        p_probs=probs_TGE,
        x_stride=x_TI.stride(0),
        inputs=inputs,
        E=experts,
        K=top_k,
        RAW=raw,
        BLOCK_E=block_e,
        BLOCK_I=block_i,
        STEPS=cdiv(inputs, block_i),
        STAGES=ROUTE_STAGES,
        num_warps=ROUTE_WARPS,
    )
    return index_TGK, weight_TGK, probs_TGE


@triton.jit
def route_kernel(
    p_x, p_router, p_index, p_weight, p_probs,
    x_stride, inputs,
    E: tl.constexpr, K: tl.constexpr, RAW: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_I: tl.constexpr,
    STEPS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Logits of one router for one token, their softmax and its K best, in fp32 throughout.

    Grid: tokens, routers. Eight rows of 4096 inputs are 131 KB through one multiprocessor, so STAGES tiles of BLOCK_E
    (>= E) rows by BLOCK_I inputs are under way at once, STEPS in all; the sum over threads comes once, after the loop.
    p_x [T, I], rows `x_stride` apart; p_router [G, E, I] in fp32; out: p_index [T, G, K] int64, p_weight [T, G, K] and
    p_probs [T, G, E] in fp32. RAW: weights are shares of the whole softmax, not of the chosen ones.
    """
    i_t = tl.program_id(0)
    i_g = tl.program_id(1)
    o_e = tl.arange(0, BLOCK_E)
    p_x_t = p_x + i_t.to(tl.int64) * x_stride
    p_rows = p_router + (i_g * E + o_e) * inputs
    b_sum = tl.zeros((BLOCK_E, BLOCK_I), tl.float32)
    for start in tl.range(0, STEPS * BLOCK_I, BLOCK_I, num_stages=STAGES):
        o_i = start + tl.arange(0, BLOCK_I)
        m_rows = (o_e < E)[:, None] & (o_i < inputs)[None, :]
        b_rows = tl.load(p_rows[:, None] + o_i[None, :], mask=m_rows, other=0.0)
        b_x = tl.load(p_x_t + o_i, mask=o_i < inputs, other=0.0).to(tl.float32)
        b_sum += b_rows * b_x[None, :]
    b_rank, b_weight, b_probs = choose(tl.sum(b_sum, axis=1), E, K, RAW)
    i_row = i_t * tl.num_programs(1) + i_g
    o_slot = i_row * K + b_rank
    tl.store(p_index + o_slot, o_e.to(tl.int64), mask=b_rank < K)
    tl.store(p_weight + o_slot, b_weight, mask=b_rank < K)
    tl.store(p_probs + i_row * E + o_e, b_probs, mask=o_e < E)


@triton.jit
def choose(b_logits, E: tl.constexpr, K: tl.constexpr, RAW: tl.constexpr):
    """rank[E] of every expert, its weight[E] (zero for rank >= K) and softmax[E]; padding beyond E comes last.

    An expert's rank is the number of experts before it. Equal logits rank by index, so that ranks are distinct and an
    index made from them is always a valid one: NaN sorts last and still spoils the weights.
    """
    o_e = tl.arange(0, b_logits.shape[0])
    b_logits = tl.where(o_e < E, b_logits, float("-inf"))
    b_known = tl.where(b_logits == b_logits, b_logits, float("-inf"))
    m_before = (b_known[None, :] > b_known[:, None]) | (
        (b_known[None, :] == b_known[:, None]) & (o_e[None, :] < o_e[:, None])
    )
    b_rank = tl.sum(m_before.to(tl.int32), axis=1)
    b_share = tl.exp(b_logits - tl.max(b_known, axis=0))
    b_chosen = tl.where(b_rank < K, b_share, 0.0)
    b_total = tl.sum(b_share, axis=0)
    b_weight = b_chosen / (b_total if RAW else tl.sum(b_chosen, axis=0))
    return b_rank, b_weight, b_share / b_total


@triton.jit
def choose_alone(p_logits, E: tl.constexpr, K: tl.constexpr, RAW: tl.constexpr, CACHE: tl.constexpr = ""):
    """Tuples (index, weight) of the K best of E logits that lie one after the other, from the best on.

    `p_logits` is a pointer, or one for each token; loads are cached as CACHE says. Each thread chooses by itself: no
    step waits for another thread, as the reductions of `choose` do. Ties go by index there too; NaN counts as minus
    infinity.
    """
    b_logits: tl.tuple = ()
    for e in tl.static_range(E):
        b_logit = tl.load(p_logits + e, cache_modifier=CACHE).to(tl.float32)
        b_logits += (tl.where(b_logit == b_logit, b_logit, float("-inf")),)
    b_index: tl.tuple = ()
    b_best: tl.tuple = ()
    # the bits of a word
    taken = 0
    for _ in tl.static_range(K):
        b_found = -1
        b_most = float("-inf")
        for e in tl.static_range(E):
            m_better = ((b_logits[e] > b_most) | (b_found < 0)) & ((taken & (1 << e)) == 0)
            b_found = tl.where(m_better, e, b_found)
            b_most = tl.where(m_better, b_logits[e], b_most)
        taken |= 1 << b_found
        b_index += (b_found,)
        b_best += (b_most,)
    b_total = tl.zeros_like(b_best[0])
    if RAW:
        for e in tl.static_range(E):
            b_total += tl.exp(b_logits[e] - b_best[0])
    else:
        for k in tl.static_range(K):
            b_total += tl.exp(b_best[k] - b_best[0])
    b_weight: tl.tuple = ()
    for k in tl.static_range(K):
        b_weight += (tl.exp(b_best[k] - b_best[0]) / b_total,)
    return b_index, b_weight


@triton.jit
def is_slot(b_gate):
    """Whether there is anything to do for a scalar gate. An integer says so, not the comparison of floats itself, which
    Triton's interpreter cannot spread over a block.
    """
    return (b_gate != 0).to(tl.int32) > 0
