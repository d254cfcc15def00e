"""Attention of a lean decode step: norms of q and k, RoPE, the cache's new slot, the sum over the others; one launch.

In: q, k and v of one token of each sequence, as their product left them; the cache of one block; the slot they go to.
Out: the heads' outputs, rounded. A program takes all query heads of one key head over a part of the filled slots: how
many parts there are hangs on how many slots are filled, which the device knows, so a captured graph replays at any
position. Of several parts the last to end adds them up, in their order: the same bits every time.
Names as in gather.py. Next: ends.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from adafuse.kernels.config import AttendCut
from adafuse.kernels.gather import _dot_type
from adafuse.kernels.lean import dependent


@dataclass(frozen=True)
class Partial:
    """Room for the parts of a head's context: weighted sums, their maxima and totals, and who has ended (zeros)."""

    sums: Tensor
    totals: Tensor
    ended: Tensor


@dataclass(frozen=True)
class Attend:
    """`qkv` [B, (heads + 2 kv heads) * width] in fp32 -> `out` [B, heads * width].

    Cache [B, kv heads, slots, width]; `cos`, `sin` [positions, width / 2] in fp32; `position` [1] the slot that is
    written, `pads_B` how many slots of each sequence come before its first token; norms of q and k [width], or None.
    """

    qkv: Tensor
    keys: Tensor
    values: Tensor
    out: Tensor
    cos: Tensor
    sin: Tensor
    position: Tensor
    pads_B: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    eps: float
    scale: float
    window: int | None
    partial: Partial
    cut: AttendCut


def room(
    sequences: int, kv_heads: int, group: int, width: int, cut: AttendCut, device: torch.device
) -> Partial:
    """For one launch at a time; `group` query heads share a key head."""
    pairs, block = sequences * kv_heads, _group_block(group)
    sums = torch.empty(pairs, cut.splits, block, width, dtype=torch.float32, device=device)
    totals = torch.empty(pairs, cut.splits, 2, block, dtype=torch.float32, device=device)
    return Partial(sums, totals, torch.zeros(pairs, dtype=torch.int32, device=device))


def attend(work: Attend) -> None:
    """Launch it."""
    sequences, kv_heads, slots, width = work.keys.shape
    group = work.out.shape[1] // (kv_heads * width)
    assert work.qkv.is_contiguous() and work.keys.is_contiguous() and work.values.is_contiguous()
    attend_kernel[(sequences * kv_heads, work.cut.splits)](
        p_qkv=work.qkv,
        p_keys=work.keys,
        p_values=work.values,
        p_out=work.out,
        p_cos=work.cos,
        p_sin=work.sin,
        p_position=work.position,
        p_pads=work.pads_B,
        p_q_norm=work.q_norm,
        p_k_norm=work.k_norm,
        p_sums=work.partial.sums,
        p_totals=work.partial.totals,
        p_ended=work.partial.ended,
        slots=slots,
        eps=work.eps,
        scale=work.scale,
        WINDOW=work.window or 0,
        KV_HEADS=kv_heads,
        GROUP=group,
        WIDTH=width,
        BLOCK_G=_group_block(group),
        BLOCK_D=max(16, triton.next_power_of_2(width)),
        BLOCK_N=work.cut.block,
        SPLITS=work.cut.splits,
        LEAST=work.cut.least,
        DOT=_dot_type(work.keys),
        num_warps=work.cut.warps,
        **dependent(work.qkv.device),
    )


def _group_block(group: int) -> int:
    """A side of a product on tensor cores is 16 at least."""
    return max(16, triton.next_power_of_2(group))


@triton.jit
def attend_kernel(
    p_qkv, p_keys, p_values, p_out, p_cos, p_sin, p_position, p_pads, p_q_norm, p_k_norm, p_sums, p_totals, p_ended,
    slots, eps, scale,
    WINDOW: tl.constexpr, KV_HEADS: tl.constexpr, GROUP: tl.constexpr, WIDTH: tl.constexpr,
    BLOCK_G: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_N: tl.constexpr, SPLITS: tl.constexpr,
    LEAST: tl.constexpr, DOT: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """`Attend`. Grid: sequences * key heads, SPLITS parts, of which those beyond the filled slots end at once.

    A part has LEAST slots or more, in whole blocks of BLOCK_N. The part of the newest slots also takes the token itself
    and writes its k and v; nobody reads them from the cache in this launch. p_sums [pairs, SPLITS, BLOCK_G, WIDTH],
    p_totals [pairs, SPLITS, 2, BLOCK_G] (maximum, sum of weights), p_ended [pairs], which the last part lowers again.
    """
    i_pair = tl.program_id(0)
    i_split = tl.program_id(1)
    i_b = i_pair // KV_HEADS
    i_kv = i_pair % KV_HEADS
    if PDL:
        gdc_launch_dependents()
    # of this step nobody writes the position, and none of the slots before it: they can be asked for already
    position = tl.load(p_position).to(tl.int32)
    pads = tl.load(p_pads + i_b).to(tl.int32)
    lowest = pads
    if WINDOW > 0:
        lowest = tl.maximum(lowest, position - (WINDOW - 1))
    filled = position - lowest
    parts = tl.minimum(tl.maximum(tl.cdiv(filled, LEAST), 1), SPLITS)
    part = tl.cdiv(tl.cdiv(filled, parts), BLOCK_N) * BLOCK_N
    parts = tl.maximum(tl.cdiv(filled, tl.maximum(part, 1)), 1)
    if i_split >= parts:
        return
    begin = lowest + i_split * part
    end = tl.minimum(begin + part, position)
    o_g = tl.arange(0, BLOCK_G)
    o_d = tl.arange(0, BLOCK_D)
    o_n = tl.arange(0, BLOCK_N)
    m_d = o_d < WIDTH
    m_q = (o_g < GROUP)[:, None] & m_d[None, :]
    p_slots = i_pair.to(tl.int64) * slots * WIDTH
    b_K = load_slots(p_keys + p_slots, begin + o_n, end, o_d, WIDTH)
    b_V = load_slots(p_values + p_slots, begin + o_n, end, o_d, WIDTH)
    if PDL:
        gdc_wait()
    p_row = p_qkv + i_b * ((GROUP + 2) * KV_HEADS * WIDTH)
    p_q = p_row + (i_kv * GROUP + o_g)[:, None] * WIDTH
    b_q = turned(p_q, o_d[None, :], m_q, p_cos, p_sin, p_q_norm, position - pads, eps, WIDTH, 1)
    b_q = (b_q * scale).to(p_keys.dtype.element_ty)
    b_most = tl.full((BLOCK_G,), float("-inf"), tl.float32)
    b_total = tl.zeros((BLOCK_G,), tl.float32)
    b_sum = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
    if i_split == parts - 1:
        p_k = p_row + (KV_HEADS * GROUP + i_kv) * WIDTH
        b_k = turned(p_k, o_d, m_d, p_cos, p_sin, p_k_norm, position - pads, eps, WIDTH, 0)
        b_k = b_k.to(p_keys.dtype.element_ty)
        b_v = tl.load(p_k + KV_HEADS * WIDTH + o_d, mask=m_d, other=0.0).to(p_values.dtype.element_ty)
        p_own = p_slots + position * WIDTH + o_d
        tl.store(p_keys + p_own, b_k, mask=m_d)
        tl.store(p_values + p_own, b_v, mask=m_d)
        b_most = tl.sum(b_q.to(tl.float32) * b_k.to(tl.float32)[None, :], 1)
        b_total += 1.0
        b_sum += b_v.to(tl.float32)[None, :]
    for start in range(begin, end, BLOCK_N):
        # the next block is on its way while this one is multiplied
        b_next_K = load_slots(p_keys + p_slots, start + BLOCK_N + o_n, end, o_d, WIDTH)
        b_next_V = load_slots(p_values + p_slots, start + BLOCK_N + o_n, end, o_d, WIDTH)
        b_score = tl.dot(b_q.to(DOT), tl.trans(b_K.to(DOT)), input_precision="ieee")
        b_score = tl.where((start + o_n < end)[None, :], b_score, float("-inf"))
        b_higher = tl.maximum(b_most, tl.max(b_score, 1))
        b_fade = tl.exp(b_most - b_higher)
        b_weight = tl.exp(b_score - b_higher[:, None])
        b_total = b_total * b_fade + tl.sum(b_weight, 1)
        b_product = tl.dot(
            b_weight.to(p_values.dtype.element_ty).to(DOT), b_V.to(DOT), input_precision="ieee"
        )
        b_sum = b_sum * b_fade[:, None] + b_product
        b_most = b_higher
        b_K = b_next_K
        b_V = b_next_V
    o_out = ((i_b * KV_HEADS + i_kv) * GROUP + o_g)[:, None] * WIDTH + o_d[None, :]
    if parts > 1:
        o_part = i_pair * SPLITS + i_split
        o_sum = o_g[:, None] * WIDTH + o_d[None, :]
        tl.store(p_sums + o_part * (BLOCK_G * WIDTH) + o_sum, b_sum, mask=m_q)
        tl.store(p_totals + o_part * (2 * BLOCK_G) + o_g, b_most)
        tl.store(p_totals + o_part * (2 * BLOCK_G) + BLOCK_G + o_g, b_total)
        # every thread's part is stored before the one thread that holds the atomic releases it
        tl.debug_barrier()
        if tl.atomic_add(p_ended + i_pair, 1, sem="acq_rel") < parts - 1:
            return
        b_most = tl.full((BLOCK_G,), float("-inf"), tl.float32)
        b_total = tl.zeros((BLOCK_G,), tl.float32)
        b_sum = tl.zeros((BLOCK_G, BLOCK_D), tl.float32)
        for i_part in range(parts):
            o_part = i_pair * SPLITS + i_part
            b_own = tl.load(p_totals + o_part * (2 * BLOCK_G) + o_g, cache_modifier=".cg")
            b_own_total = tl.load(p_totals + o_part * (2 * BLOCK_G) + BLOCK_G + o_g, cache_modifier=".cg")
            b_own_sum = tl.load(
                p_sums + o_part * (BLOCK_G * WIDTH) + o_sum, mask=m_q, other=0.0, cache_modifier=".cg"
            )
            b_higher = tl.maximum(b_most, b_own)
            b_fade = tl.exp(b_most - b_higher)
            b_share = tl.exp(b_own - b_higher)
            b_total = b_total * b_fade + b_own_total * b_share
            b_sum = b_sum * b_fade[:, None] + b_own_sum * b_share[:, None]
            b_most = b_higher
        tl.store(p_ended + i_pair, 0)
    tl.store(p_out + o_out, (b_sum / b_total[:, None]).to(p_out.dtype.element_ty), mask=m_q)


@triton.jit
def load_slots(p_cache, o_slot, end, o_d, WIDTH: tl.constexpr):
    """[slots, width] of keys or values; zeros from `end` on, where anything may lie."""
    p_block = p_cache + o_slot.to(tl.int64)[:, None] * WIDTH + o_d[None, :]
    return tl.load(p_block, mask=(o_slot < end)[:, None] & (o_d < WIDTH)[None, :], other=0.0)


@triton.jit
def turned(p_head, o_d, m_d, p_cos, p_sin, p_norm, position, eps, WIDTH: tl.constexpr, AXIS: tl.constexpr):
    """Heads (along AXIS their numbers) at a root mean square of one, where they have a norm, turned to `position`."""
    HALF: tl.constexpr = WIDTH // 2
    o_fellow = (o_d + HALF) % WIDTH
    o_angle = o_d % HALF
    m_angle = o_d < WIDTH
    b_head = tl.load(p_head + o_d, mask=m_d, other=0.0)
    b_fellow = tl.load(p_head + o_fellow, mask=m_d, other=0.0)
    if p_norm is not None:
        b_rstd = 1.0 / tl.sqrt(tl.sum(b_head * b_head, AXIS, keep_dims=True) / WIDTH + eps)
        b_head = b_head * b_rstd * tl.load(p_norm + o_d, mask=m_angle, other=0.0).to(tl.float32)
        b_fellow = b_fellow * b_rstd * tl.load(p_norm + o_fellow, mask=m_angle, other=0.0).to(tl.float32)
    b_cos = tl.load(p_cos + position * HALF + o_angle, mask=m_angle, other=0.0)
    b_sin = tl.load(p_sin + position * HALF + o_angle, mask=m_angle, other=0.0)
    return b_head * b_cos + tl.where(o_d < HALF, -b_fellow, b_fellow) * b_sin
