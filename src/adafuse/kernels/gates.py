"""Routers of a fit: what lies around their one product, of thousands of tokens, in a launch each.

In: a router's fp32 weight, logits, what became of them, gradients. Out: the weight as three parts that tensor cores
multiply, gates, the logits' gradient; adapters/router.py has the products between. Letters as in naive.py, names as in
gather.py. Next: gather.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adafuse.kernels.config import GATES_PAIRS, GATES_WARPS, THIRDS_BLOCK, cdiv


def thirds(weight_EI: Tensor, dtype: torch.dtype) -> Tensor:
    """`naive.thirds`: [3 * E, I] in bf16."""
    parts = torch.empty(3 * weight_EI.shape[0], weight_EI.shape[1], dtype=dtype, device=weight_EI.device)
    size = weight_EI.numel()
    thirds_kernel[(cdiv(size, THIRDS_BLOCK),)](weight_EI.contiguous(), parts, size, THIRDS_BLOCK)
    return parts


def gates(parts_TS: Tensor, routers: int, top_k: int, raw: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """`naive.gates`: index[G, T, K] (int64), weight[G, T, K], softmax and weight of all experts [G, T, E] (fp32)."""
    (tokens, parts), device = parts_TS.shape, parts_TS.device
    experts = parts // (3 * routers)
    index_GTK = torch.empty(routers, tokens, top_k, dtype=torch.int64, device=device)
    weight_GTK = torch.empty(routers, tokens, top_k, dtype=torch.float32, device=device)
    probs_GTE = torch.empty(routers, tokens, experts, dtype=torch.float32, device=device)
    dense_GTE = torch.empty(routers, tokens, experts, dtype=torch.float32, device=device)
    grid, cut = _cut(routers, tokens, experts)
    outputs = index_GTK, weight_GTK, probs_GTE, dense_GTE
    gates_kernel[grid](
        parts_TS.contiguous(), *outputs, tokens, experts, top_k, raw, *cut, num_warps=GATES_WARPS
    )
    return outputs


def gates_backward(
    of_weight_GTK: Tensor | None,
    of_probs_GTE: Tensor | None,
    of_dense_GTE: Tensor | None,
    chosen: tuple[Tensor, Tensor, Tensor],
    raw: bool,
    dtype: torch.dtype,
) -> Tensor:
    """`naive.gates_backward`: the gradient of the logits, [T, G * E]."""
    (routers, tokens, top_k), experts = chosen[0].shape, chosen[1].shape[2]
    of_logits_TS = torch.empty(tokens, routers * experts, dtype=dtype, device=chosen[1].device)
    given = [None if of is None else of.contiguous() for of in (of_weight_GTK, of_probs_GTE, of_dense_GTE)]
    grid, cut = _cut(routers, tokens, experts)
    gates_backward_kernel[grid](
        *given, *chosen, of_logits_TS, tokens, experts, top_k, raw, *cut, num_warps=GATES_WARPS
    )
    return of_logits_TS


def _cut(routers: int, tokens: int, experts: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The grid, and BLOCK_T and BLOCK_E of a program: so many tokens that their pairs of experts fit into registers."""
    block_e = triton.next_power_of_2(experts)
    block_t = max(1, GATES_PAIRS // block_e**2)
    return (cdiv(tokens, block_t), routers), (block_t, block_e)


@triton.jit
def thirds_kernel(p_weight, p_parts, size, BLOCK: tl.constexpr):
    """Three numbers of p_parts' type whose sum is the weight: what each leaves is exact, and is the next one's.

    Grid: blocks of the weight's `size` numbers. p_parts [3, size].
    """
    o_w = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    b_rest = tl.load(p_weight + o_w, mask=o_w < size, other=0.0)
    for third in tl.static_range(3):
        b_part = b_rest.to(p_parts.dtype.element_ty)
        tl.store(p_parts + third * size + o_w, b_part, mask=o_w < size)
        b_rest -= b_part.to(tl.float32)


@triton.jit
def gates_kernel(
    p_parts, p_index, p_weight, p_probs, p_dense,
    tokens,
    E: tl.constexpr, K: tl.constexpr, RAW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """Softmax and the K best of one router's logits of BLOCK_T tokens, sums of three parts, in fp32.

    Grid: blocks of tokens, routers. p_parts [T, 3, G, E], the largest first; out: p_index [G, T, K] int64, p_weight
    [G, T, K], p_probs and p_dense [G, T, E] in fp32, all contiguous. An expert's rank is the number of experts before
    it, equal ones by index, as in `route.choose`: ranks are distinct whatever the logits. RAW: as in `route_kernel`.
    """
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    o_e = tl.arange(0, BLOCK_E)[None, :]
    m_te = (o_t < tokens) & (o_e < E)
    i_g, parts = tl.program_id(1), tl.num_programs(1) * E
    p_high = p_parts + o_t * (3 * parts) + i_g * E + o_e
    # the small parts first
    b_logits = tl.load(p_high + 2 * parts, mask=m_te, other=0.0) + tl.load(
        p_high + parts, mask=m_te, other=0.0
    )
    b_logits = tl.where(o_e < E, b_logits + tl.load(p_high, mask=m_te, other=0.0), float("-inf"))
    b_known = tl.where(b_logits == b_logits, b_logits, float("-inf"))
    b_one, b_other = b_known[:, :, None], b_known[:, None, :]
    m_before = (b_other > b_one) | ((b_other == b_one) & (o_e[:, None, :] < o_e[:, :, None]))
    b_rank = tl.sum(m_before.to(tl.int32), axis=2)
    b_share = tl.exp(b_logits - tl.max(b_known, axis=1)[:, None])
    b_total = tl.sum(b_share, axis=1)[:, None]
    b_chosen = tl.where(b_rank < K, b_share, 0.0)
    b_dense = b_chosen / (b_total if RAW else tl.sum(b_chosen, axis=1)[:, None])
    m_slot = m_te & (b_rank < K)
    o_row = i_g * tokens + o_t
    tl.store(p_index + o_row * K + b_rank, o_e.to(tl.int64) + tl.zeros_like(b_rank), mask=m_slot)
    tl.store(p_weight + o_row * K + b_rank, b_dense, mask=m_slot)
    tl.store(p_probs + o_row * E + o_e, b_share / b_total, mask=m_te)
    tl.store(p_dense + o_row * E + o_e, b_dense, mask=m_te)


@triton.jit
def gates_backward_kernel(
    p_of_weight, p_of_probs, p_of_dense, p_index, p_probs, p_dense, p_of_logits,
    tokens,
    E: tl.constexpr, K: tl.constexpr, RAW: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr,
):  # fmt: skip
    """The logits' gradient of one router and BLOCK_T tokens, from those of what `gates_kernel` wrote; None is zero.

    Grid: blocks of tokens, routers. Shapes as there; p_of_logits [T, G, E] has the type of its gradients' products. A
    softmax s has s * (ds - sum(s ds)): s is the whole softmax of p_probs, and of p_dense that of the chosen ones, which
    is zero elsewhere, or (RAW) the whole one of which the others have no gradient.
    """
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)[:, None]
    o_e = tl.arange(0, BLOCK_E)[None, :]
    m_te = (o_t < tokens) & (o_e < E)
    i_g = tl.program_id(1)
    o_row = i_g * tokens + o_t
    o_te = o_row * E + o_e
    b_probs = tl.load(p_probs + o_te, mask=m_te, other=0.0)
    b_dense = tl.load(p_dense + o_te, mask=m_te, other=0.0)
    b_of_dense = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if p_of_dense is not None:
        b_of_dense += tl.load(p_of_dense + o_te, mask=m_te, other=0.0)
    if p_of_weight is not None:
        for k in tl.static_range(K):
            b_index = tl.load(p_index + o_row * K + k, mask=o_t < tokens, other=0)
            b_of_slot = tl.load(p_of_weight + o_row * K + k, mask=o_t < tokens, other=0.0)
            b_of_dense += tl.where(b_index == o_e, b_of_slot, 0.0)
    b_terms = b_dense * b_of_dense
    b_of_logits = b_terms - (b_probs if RAW else b_dense) * tl.sum(b_terms, axis=1)[:, None]
    if p_of_probs is not None:
        b_terms = b_probs * tl.load(p_of_probs + o_te, mask=m_te, other=0.0)
        b_of_logits += b_terms - b_probs * tl.sum(b_terms, axis=1)[:, None]
    o_out = (o_t * tl.num_programs(1) + i_g) * E + o_e
    tl.store(p_of_logits + o_out, b_of_logits.to(p_of_logits.dtype.element_ty), mask=m_te)
