"""Routers in one launch: logits, softmax and top-k of every token, which are half a dozen launches in PyTorch.

In: the hidden states that the routers look at and their fp32 rows. Out: the chosen experts, their weights and the whole
softmax. Token-level routing runs it once per token step, block-wise routing once per block; gather.py uses what was
chosen. Layer-wise routing gets its logits with the base product and chooses in gather_kernels.py (`choose_alone`).
`is_slot` is what the kernels ask of a gate: one of exactly zero is no choice at all.
Letters as in naive.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# measured on an H200, 8 experts: 3.67 us at 4096 inputs, and 6.6 us at 11008; twice the tile, with twice the warps and
# 5 stages, takes 3.96 and 6.2 us
TILE = 4096  # weights of a router that are read at once
WARPS = 4
STAGES = 8  # one more than there are tiles in flight: 112 of the 128 KB of 8 rows of 4096 inputs


@triton.jit
def choose(logits, E: tl.constexpr, K: tl.constexpr, RAW: tl.constexpr):
    """rank[E] of every expert, its weight[E] (zero for rank >= K) and softmax[E]; padding beyond E comes last.

    An expert's rank is the number of experts before it. Equal logits rank by index, so that ranks are distinct and an
    index made from them is always a valid one: NaN sorts last and still spoils the weights.
    """
    i_e = tl.arange(0, logits.shape[0])
    logits = tl.where(i_e < E, logits, float("-inf"))
    p_logits = tl.where(logits == logits, logits, float("-inf"))
    before = (p_logits[None, :] > p_logits[:, None]) | (
        (p_logits[None, :] == p_logits[:, None]) & (i_e[None, :] < i_e[:, None])
    )
    rank = tl.sum(before.to(tl.int32), axis=1)
    share = tl.exp(logits - tl.max(p_logits, axis=0))
    chosen = tl.where(rank < K, share, 0.0)
    total = tl.sum(share, axis=0)
    weight = chosen / (total if RAW else tl.sum(chosen, axis=0))
    return rank, weight, share / total


@triton.jit
def choose_alone(p_logits, E: tl.constexpr, K: tl.constexpr, RAW: tl.constexpr):
    """Tuples (index, weight) of the K best of E logits that lie one after the other, from the best on.

    `p_logits` is a pointer, or one for each token. Each thread chooses by itself: no step waits for another thread, as
    the reductions of `choose` do. Ties go by index there too; NaN counts as minus infinity.
    """
    logits: tl.tuple = ()
    for e in tl.static_range(E):
        logit = tl.load(p_logits + e).to(tl.float32)
        logits += (tl.where(logit == logit, logit, float("-inf")),)
    index: tl.tuple = ()
    best: tl.tuple = ()
    taken = 0
    for _ in tl.static_range(K):
        found = -1
        most = float("-inf")
        for e in tl.static_range(E):
            better = ((logits[e] > most) | (found < 0)) & ((taken & (1 << e)) == 0)
            found = tl.where(better, e, found)
            most = tl.where(better, logits[e], most)
        taken |= 1 << found
        index += (found,)
        best += (most,)
    total = tl.zeros_like(best[0])
    if RAW:
        for e in tl.static_range(E):
            total += tl.exp(logits[e] - best[0])
    else:
        for k in tl.static_range(K):
            total += tl.exp(best[k] - best[0])
    weight: tl.tuple = ()
    for k in tl.static_range(K):
        weight += (tl.exp(best[k] - best[0]) / total,)
    return index, weight


@triton.jit
def is_slot(gate):
    """Whether there is anything to do for a scalar gate. An integer says so, not the comparison of floats itself, which
    Triton's interpreter cannot spread over a block.
    """
    return (gate != 0).to(tl.int32) > 0


@triton.jit
def route_kernel(
    x_ptr,
    router_ptr,
    index_ptr,
    weight_ptr,
    probs_ptr,
    x_stride,
    I,
    E: tl.constexpr,
    K: tl.constexpr,
    RAW: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_I: tl.constexpr,
    STEPS: tl.constexpr,
    STAGES: tl.constexpr,
):
    t = tl.program_id(0)
    g = tl.program_id(1)
    i_e = tl.arange(0, BLOCK_E)
    p_x = x_ptr + t.to(tl.int64) * x_stride
    p_rows = router_ptr + (g * E + i_e) * I
    partial = tl.zeros((BLOCK_E, BLOCK_I), tl.float32)
    for start in tl.range(0, STEPS * BLOCK_I, BLOCK_I, num_stages=STAGES):
        i_i = start + tl.arange(0, BLOCK_I)
        mask = (i_e < E)[:, None] & (i_i < I)[None, :]
        b_rows = tl.load(p_rows[:, None] + i_i[None, :], mask=mask, other=0.0)
        b_x = tl.load(p_x + i_i, mask=i_i < I, other=0.0).to(tl.float32)
        partial += b_rows * b_x[None, :]
    rank, weight, probs = choose(tl.sum(partial, axis=1), E, K, RAW)
    row = t * tl.num_programs(1) + g
    slot = row * K + rank
    tl.store(index_ptr + slot, i_e.to(tl.int64), mask=rank < K)
    tl.store(weight_ptr + slot, weight, mask=rank < K)
    tl.store(probs_ptr + row * E + i_e, probs, mask=i_e < E)


def route(x_TI: Tensor, router_GEI: Tensor, top_k: int, raw: bool) -> tuple[Tensor, Tensor, Tensor]:
    """`naive.route`: index[T, G, K] (int64), weight[T, G, K] and softmax[T, G, E] (fp32); the routers are fp32."""
    x_TI = x_TI if x_TI.stride(-1) == 1 else x_TI.contiguous()
    (tokens, inputs), (groups, experts, _) = x_TI.shape, router_GEI.shape
    index_TGK = torch.empty(tokens, groups, top_k, dtype=torch.int64, device=x_TI.device)
    weight_TGK = torch.empty(tokens, groups, top_k, dtype=torch.float32, device=x_TI.device)
    probs_TGE = torch.empty(tokens, groups, experts, dtype=torch.float32, device=x_TI.device)
    block_e = triton.next_power_of_2(experts)
    block_i = min(TILE // block_e, triton.next_power_of_2(inputs))
    route_kernel[(tokens, groups)](
        x_TI,
        router_GEI.contiguous(),
        index_TGK,
        weight_TGK,
        probs_TGE,
        x_TI.stride(0),
        inputs,
        E=experts,
        K=top_k,
        RAW=raw,
        BLOCK_E=block_e,
        BLOCK_I=block_i,
        STEPS=triton.cdiv(inputs, block_i),
        STAGES=STAGES,
        num_warps=WARPS,
    )
    return index_TGK, weight_TGK, probs_TGE
