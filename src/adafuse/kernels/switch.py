"""One launch that merges the chosen experts into every adapted linear: the paper's fused switch, and a drift-free form.

In: the weights W [O, I] of all adapted linears and the adapter's own lora_A [E, R, I] and lora_B [E, O, R] of each,
which `plan` turns once into a table on the device; then, at each switch, S slots of (expert, gate). Out: W, in place.
The work is cut into strips, BLOCK_I columns wide and many rows long. A strip is one program: it keeps the chosen
experts' A of its columns on the chip and streams W and B past them, so that each weight is read once and written
once. What the functions mean is said by naive.py; ops.py is who calls them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
ALIGNMENT_BYTES = 16


@dataclass(frozen=True)
class Config:
    """Tile of W, tiles of one strip, and how the compiler is to build the kernel."""

    block_o: int
    block_i: int
    tiles: int
    num_warps: int
    num_stages: int
    max_registers: int | None


@dataclass(frozen=True)
class SwitchPlan:
    """What a switch needs to know on the device, and the tensors whose addresses it holds."""

    strips: Tensor
    weights: list[Tensor]
    clean: list[Tensor] | None
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    row_step: int  # every row of every W begins at a multiple of so many elements
    config: Config


def plan(
    weights: list[Tensor],
    clean: list[Tensor] | None,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    config: Config | None = None,
) -> SwitchPlan:
    """Addresses and strips of weights[l] [O, I], clean[l] [O, I], lora_A[l] [E, R, I] and lora_B[l] [E, O, R].

    All of one dtype and device, contiguous, 16-byte aligned and of one rank; otherwise ValueError. The plan keeps the
    tensors alive. It is stale once a parameter is re-assigned (values may change freely): then plan again.
    """
    _check(weights, clean, lora_A, lora_B)
    config = config or _config(weights[0].dtype, lora_A[0].shape[1])
    sources = weights if clean is None else clean
    parts = [_strips(*linear, config) for linear in zip(weights, sources, lora_A, lora_B, strict=True)]
    strips = torch.cat(parts).to(weights[0].device)
    row_step = math.gcd(16, *(weight.shape[1] for weight in weights))
    return SwitchPlan(strips, weights, clean, lora_A, lora_B, row_step, config)


def switch_(plan: SwitchPlan, index_S: Tensor, gate_S: Tensor) -> None:
    """W += sum_s gate_s B[e_s] A[e_s], rounded once: new experts with their gates, old ones with minus theirs.

    index_S: int64 or int32 [S], gate_S: fp32 [S], both on the plan's device; an expert may stand in several slots.
    """
    _launch(plan, index_S, gate_S, source=0)


def rebase_(plan: SwitchPlan, index_S: Tensor, gate_S: Tensor) -> None:
    """W = W_0 + sum_s gate_s B[e_s] A[e_s], rounded once, whatever W held before; arguments as in `switch_`."""
    if plan.clean is None:
        raise ValueError("rebase_ needs a plan with clean weights: plan(weights, clean, lora_A, lora_B)")
    _launch(plan, index_S, gate_S, source=1)


def _config(dtype: torch.dtype, rank: int) -> Config:
    """On the chip are A of a tile's columns and B of its rows for every slot: high ranks need small tiles."""
    row_bytes = rank * dtype.itemsize
    if row_bytes > 512:
        raise ValueError(
            f"the switch kernel takes ranks up to {512 // dtype.itemsize} in {dtype}, not {rank}"
        )
    if row_bytes > 128 or dtype == torch.float32:
        block_i = 32 if row_bytes > 256 else 64
        return Config(32, block_i, tiles=32, num_warps=4, num_stages=1, max_registers=None)
    if rank > 32:
        return Config(64, 64, tiles=32, num_warps=4, num_stages=2, max_registers=None)
    # 80 registers a thread let three programs share a multiprocessor: one computes while others wait for bytes
    return Config(64, 128, tiles=32 if rank <= 8 else 16, num_warps=8, num_stages=2, max_registers=80)


def _check(
    weights: list[Tensor], clean: list[Tensor] | None, lora_A: list[Tensor], lora_B: list[Tensor]
) -> None:
    if not weights or not len(weights) == len(lora_A) == len(lora_B) == len(clean or weights):
        raise ValueError(
            "plan needs at least one weight, and as many lora_A, lora_B and clean weights as weights"
        )
    tensors = [*weights, *(clean or []), *lora_A, *lora_B]
    first, rank = weights[0], lora_A[0].shape[1]
    if first.dtype not in ELEMENTS or {(t.dtype, t.device) for t in tensors} != {(first.dtype, first.device)}:
        raise ValueError("plan needs all tensors in one dtype (bfloat16, float16 or float32) on one device")
    if not all(t.is_contiguous() and t.data_ptr() % ALIGNMENT_BYTES == 0 for t in tensors):
        raise ValueError(f"plan needs contiguous tensors at multiples of {ALIGNMENT_BYTES} bytes: clone them")
    for weight, source, down, up in zip(weights, clean or weights, lora_A, lora_B, strict=True):
        (out_size, in_size), experts = weight.shape, down.shape[0]
        wanted = [(out_size, in_size), (experts, rank, in_size), (experts, out_size, rank)]
        got = [tuple(t.shape) for t in (source, down, up)]
        if got != wanted:
            raise ValueError(f"plan needs clean weight, lora_A and lora_B of shapes {wanted}, got {got}")


def _strips(
    weight_OI: Tensor, clean_OI: Tensor, lora_A_ERI: Tensor, lora_B_EOR: Tensor, config: Config
) -> Tensor:
    """[strips, 8]: where the strip's W, W_0, A and B begin, O, I, and the rows and columns that are left from there.

    Neighbouring programs work on neighbouring columns of the same rows, so that they share B while it is in L2.
    """
    out_size, in_size = weight_OI.shape
    height = config.block_o * config.tiles
    rows = torch.arange(0, out_size, height)
    columns = torch.arange(0, in_size, config.block_i)
    row, column = (grid.flatten() for grid in torch.meshgrid(rows, columns, indexing="ij"))
    element, rank = weight_OI.element_size(), lora_A_ERI.shape[1]
    tile = (row * in_size + column) * element
    table = [
        weight_OI.data_ptr() + tile,
        clean_OI.data_ptr() + tile,
        lora_A_ERI.data_ptr() + column * element,
        lora_B_EOR.data_ptr() + row * rank * element,
        torch.full_like(row, out_size),
        torch.full_like(row, in_size),
        (out_size - row).clamp(max=height),
        in_size - column,
    ]
    return torch.stack(table, dim=1)


def _launch(plan: SwitchPlan, index_S: Tensor, gate_S: Tensor, source: int) -> None:
    if index_S.shape != gate_S.shape or gate_S.dtype != torch.float32:
        raise ValueError(
            f"a switch needs one fp32 gate per slot, got {[*index_S.shape]} and {[*gate_S.shape]}"
        )
    element, slots = ELEMENTS[plan.weights[0].dtype], index_S.shape[0]
    switch_kernel[(plan.strips.shape[0],)](
        plan.strips,
        index_S,
        gate_S,
        SOURCE=source,
        ELEMENT=element,
        # Triton's interpreter, which runs the tests on a CPU, computes bfloat16 wrongly
        DOT=element if plan.strips.is_cuda else tl.float32,
        **contraction(plan.lora_A[0].shape[1], slots),
        ROW_STEP=plan.row_step,
        BLOCK_O=plan.config.block_o,
        BLOCK_I=plan.config.block_i,
        num_warps=plan.config.num_warps,
        num_stages=plan.config.num_stages,
        maxnreg=plan.config.max_registers,
    )


def contraction(rank: int, slots: int) -> dict[str, int | bool]:
    """How slots and ranks are laid side by side in one product, whose depth is a power of two and at least 16."""
    padded_slots = triton.next_power_of_2(slots)
    block_r = max(triton.next_power_of_2(rank), 16 // padded_slots)
    depth = padded_slots * block_r
    padded = padded_slots != slots or block_r != rank
    return {"SLOTS": slots, "RANK": rank, "BLOCK_R": block_r, "DEPTH": depth, "PADDED": padded}


@triton.jit
def switch_kernel(
    strips,  # [strips, 8] int64, see _strips
    index_S,  # [S] int64 or int32
    gate_S,  # [S] fp32
    SOURCE: tl.constexpr,
    SLOTS: tl.constexpr,
    ELEMENT: tl.constexpr,
    DOT: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_R: tl.constexpr,
    DEPTH: tl.constexpr,
    PADDED: tl.constexpr,
    ROW_STEP: tl.constexpr,
    BLOCK_O: tl.constexpr,
    BLOCK_I: tl.constexpr,
):
    strip = strips + tl.program_id(0) * 8
    p_target = _address(strip, ELEMENT)
    p_source = _address(strip + SOURCE, ELEMENT)
    p_A = _address(strip + 2, ELEMENT)
    p_B = _address(strip + 3, ELEMENT)
    out_size = tl.load(strip + 4)
    in_size = tl.multiple_of(tl.load(strip + 5).to(tl.int32), ROW_STEP)
    rows = tl.load(strip + 6).to(tl.int32)
    columns = tl.multiple_of(tl.load(strip + 7).to(tl.int32), ROW_STEP)

    o = tl.arange(0, BLOCK_O)[:, None]
    i = tl.arange(0, BLOCK_I)[None, :]
    o_tile = o * in_size + i
    step = in_size.to(tl.int64) * BLOCK_O
    # asked for first: everything below is work that hides the latency of these bytes
    b_weight = tl.load(p_source + o_tile, mask=(o < rows) & (i < columns), eviction_policy="evict_first")

    # all slots are one contraction: row d of A and column d of B belong to slot d // BLOCK_R
    d_A = tl.arange(0, DEPTH)[:, None]
    m_A = (d_A // BLOCK_R < SLOTS) & (d_A % BLOCK_R < RANK)
    expert_A = tl.load(index_S + d_A // BLOCK_R, mask=m_A, other=0).to(tl.int64)
    gate_A = tl.load(gate_S + d_A // BLOCK_R, mask=m_A, other=0.0)
    p_down = p_A + (expert_A * RANK + d_A % BLOCK_R) * in_size + i
    b_A = tl.load(p_down, mask=m_A & (i < columns), other=0.0, eviction_policy="evict_last")
    b_A = (b_A.to(tl.float32) * gate_A).to(DOT)

    d_B = tl.arange(0, DEPTH)[None, :]
    m_B = (d_B // BLOCK_R < SLOTS) & (d_B % BLOCK_R < RANK)
    expert_B = tl.load(index_S + d_B // BLOCK_R, mask=m_B, other=0).to(tl.int64)
    p_up = p_B + expert_B * out_size * RANK + d_B % BLOCK_R + o * RANK

    for start in range(0, rows, BLOCK_O):
        left = rows - start
        p_source += step
        m_next = (o < left - BLOCK_O) & (i < columns)
        b_next = tl.load(p_source + o_tile, mask=m_next, eviction_policy="evict_first")
        m_up = o < left
        if PADDED:
            m_up = m_up & m_B
        b_B = tl.load(p_up + start * RANK, mask=m_up, other=0.0, eviction_policy="evict_last").to(DOT)
        b_delta = tl.dot(b_B, b_A, input_precision="ieee")
        b_sum = (b_weight.to(tl.float32) + b_delta).to(ELEMENT)
        m_tile = (o < left) & (i < columns)
        tl.store(p_target + o_tile, b_sum, mask=m_tile, eviction_policy="evict_first")
        p_target += step
        b_weight = b_next


@triton.jit
def _address(entry, ELEMENT: tl.constexpr) -> tl.tensor:
    """A pointer out of the table; told to be aligned, or the compiler would fall back to loads of one element."""
    return tl.multiple_of(tl.load(entry).to(tl.pointer_type(ELEMENT)), 16)
