"""One launch that merges the chosen experts into every adapted linear: the paper's fused switch, and a drift-free form.

In: the weights W [O, I] of all adapted linears and the adapter's own lora_A [E, R, I] and lora_B [E, O, R] of each,
which `plan` turns once into a table on the device; then, at each switch, S slots of (expert, gate). Out: W, in place.
The work is cut into strips, BLOCK_I columns wide and many rows long, one program each. What the functions mean is said
by naive.py; names in the kernel are those of gather.py. Next: strategies/merge.py, which calls them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from adafuse.kernels.config import SWITCH_ALIGNMENT_BYTES, SwitchConfig, switch_config, switch_stages
from adafuse.kernels.route import is_slot

ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}


@dataclass(frozen=True)
class SwitchPlan:
    """What a switch needs to know on the device, and the tensors whose addresses it holds."""

    strips: Tensor
    weights: list[Tensor]
    clean: list[Tensor] | None
    lora_A: list[Tensor]
    lora_B: list[Tensor]
    row_step: int  # every row of every W begins at a multiple of so many elements
    config: SwitchConfig


def plan(
    weights: list[Tensor],
    clean: list[Tensor] | None,
    lora_A: list[Tensor],
    lora_B: list[Tensor],
    config: SwitchConfig | None = None,
) -> SwitchPlan:
    """Addresses and strips of weights[l] [O, I], clean[l] [O, I], lora_A[l] [E, R, I] and lora_B[l] [E, O, R].

    All of one dtype and device, contiguous, 16-byte aligned and of one rank; otherwise ValueError. The plan keeps the
    tensors alive. It is stale once a parameter is re-assigned (values may change freely): then plan again.
    """
    _check(weights, clean, lora_A, lora_B)
    config = config or switch_config(weights[0].itemsize, lora_A[0].shape[1])
    sources = weights if clean is None else clean
    parts = [_strips(*linear, config) for linear in zip(weights, sources, lora_A, lora_B, strict=True)]
    strips = torch.cat(parts).to(weights[0].device)
    row_step = math.gcd(16, *(weight.shape[1] for weight in weights))
    return SwitchPlan(strips, weights, clean, lora_A, lora_B, row_step, config)


def switch_(plan: SwitchPlan, index_S: Tensor, gate_S: Tensor) -> None:
    """W += sum_s gate_s B[e_s] A[e_s], rounded once: new experts with their gates, old ones with minus theirs.

    index_S: int64 or int32 [S], gate_S: fp32 [S], both on the plan's device; an expert may stand in several slots.
    Factors of a slot whose gate is zero are not read, and without any gate no weight is.
    """
    _launch(plan, index_S, gate_S, None)


def rebase_(plan: SwitchPlan, index_S: Tensor, gate_S: Tensor, held_H: Tensor) -> None:
    """W = W_0 + sum_s gate_s B[e_s] A[e_s], rounded once, whatever W held before; arguments as in `switch_`.

    held_H: the fp32 gates of what W holds. All zero means that W is clean, and a clean weight is not written again.
    """
    if plan.clean is None:
        raise ValueError("rebase_ needs a plan with clean weights: plan(weights, clean, lora_A, lora_B)")
    _launch(plan, index_S, gate_S, held_H)


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
    if not all(t.is_contiguous() and t.data_ptr() % SWITCH_ALIGNMENT_BYTES == 0 for t in tensors):
        raise ValueError(
            f"plan needs contiguous tensors at multiples of {SWITCH_ALIGNMENT_BYTES} bytes: clone them"
        )
    for weight, source, down, up in zip(weights, clean or weights, lora_A, lora_B, strict=True):
        (outputs, inputs), experts = weight.shape, down.shape[0]
        wanted = [(outputs, inputs), (experts, rank, inputs), (experts, outputs, rank)]
        got = [tuple(t.shape) for t in (source, down, up)]
        if got != wanted:
            raise ValueError(f"plan needs clean weight, lora_A and lora_B of shapes {wanted}, got {got}")


def _strips(
    weight_OI: Tensor, clean_OI: Tensor, lora_A_ERI: Tensor, lora_B_EOR: Tensor, config: SwitchConfig
) -> Tensor:
    """[strips, 8]: where the strip's W, W_0, A and B begin, O, I, and the rows and columns that are left from there.

    Neighbouring programs work on neighbouring columns of the same rows, so that they share B while it is in L2.
    """
    outputs, inputs = weight_OI.shape
    height = config.block_o * config.tiles
    rows = torch.arange(0, outputs, height)
    columns = torch.arange(0, inputs, config.block_i)
    row, column = (grid.flatten() for grid in torch.meshgrid(rows, columns, indexing="ij"))
    element, rank = weight_OI.element_size(), lora_A_ERI.shape[1]
    tile = (row * inputs + column) * element
    table = [
        weight_OI.data_ptr() + tile,
        clean_OI.data_ptr() + tile,
        lora_A_ERI.data_ptr() + column * element,
        lora_B_EOR.data_ptr() + row * rank * element,
        torch.full_like(row, outputs),
        torch.full_like(row, inputs),
        (outputs - row).clamp(max=height),
        inputs - column,
    ]
    return torch.stack(table, dim=1)


def _launch(plan: SwitchPlan, index_S: Tensor, gate_S: Tensor, held_H: Tensor | None) -> None:
    if index_S.shape != gate_S.shape or gate_S.dtype != torch.float32:
        raise ValueError(
            f"a switch needs one fp32 gate per slot, got {[*index_S.shape]} and {[*gate_S.shape]}"
        )
    element, rank, slots = ELEMENTS[plan.weights[0].dtype], plan.lora_A[0].shape[1], index_S.shape[0]
    product, config = contraction(rank, slots), plan.config
    itemsize, limit = plan.weights[0].element_size(), shared_bytes(plan.strips.device)
    switch_kernel[(plan.strips.shape[0],)](
        p_strips=plan.strips,
        p_index=index_S,
        p_gate=gate_S,
        p_held=held_H,
        SOURCE=int(held_H is not None),
        HELD=0 if held_H is None else len(held_H),
        ELEMENT=element,
        # Triton's interpreter, which runs the tests on a CPU, computes bfloat16 wrongly
        DOT=element if plan.strips.is_cuda else tl.float32,
        **product,
        ROW_STEP=plan.row_step,
        BLOCK_O=config.block_o,
        BLOCK_I=config.block_i,
        STAGES=switch_stages(config, product["DEPTH"], itemsize, limit),
        num_warps=config.warps,
    )


def shared_bytes(device: torch.device) -> int:
    """What one program may have; off a GPU, where nothing is kept on a chip, an H100's."""
    if device.type != "cuda":
        return 227 * 1024
    return torch.cuda.get_device_properties(device).shared_memory_per_block_optin


def contraction(rank: int, slots: int) -> dict[str, int]:
    """How slots and ranks are laid side by side in one product, whose depth is a power of two and at least 16."""
    padded_slots = triton.next_power_of_2(slots)
    block_r = max(triton.next_power_of_2(rank), 16 // padded_slots)
    return {"SLOTS": slots, "RANK": rank, "BLOCK_R": block_r, "DEPTH": padded_slots * block_r}


@triton.jit
def switch_kernel(
    p_strips, p_index, p_gate, p_held,
    SOURCE: tl.constexpr, SLOTS: tl.constexpr, HELD: tl.constexpr, ELEMENT: tl.constexpr, DOT: tl.constexpr,
    RANK: tl.constexpr, BLOCK_R: tl.constexpr, DEPTH: tl.constexpr, ROW_STEP: tl.constexpr,
    BLOCK_O: tl.constexpr, BLOCK_I: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """W = W_source + sum_s gate_s B[e_s] A[e_s] for one strip of one weight, or nothing where there is nothing to do.

    Grid: strips. A program keeps the chosen experts' A of its columns on the chip, gates folded in, and streams W and B
    past them, STAGES tiles of BLOCK_O by BLOCK_I on their way at once: each weight is read once and written once.
    p_strips [strips, 8] int64, the table of `_strips`; SOURCE is the column of what is read (0: W itself, 1: W_0).
    p_index [S = SLOTS], p_gate [S] in fp32; p_held [HELD] in fp32, gates of what W holds where that is not a slot.
    ELEMENT is the weights' type, DOT that of the product's operands; RANK R padded to BLOCK_R, all slots to DEPTH; rows
    of W begin at multiples of ROW_STEP elements. README.md, section switch, has what else was tried.
    """
    p_strip = p_strips + tl.program_id(0) * 8
    p_target = _address(p_strip, ELEMENT)
    p_source = _address(p_strip + SOURCE, ELEMENT)
    p_A = _address(p_strip + 2, ELEMENT)
    p_B = _address(p_strip + 3, ELEMENT)
    outputs = tl.load(p_strip + 4)
    # told that rows and columns are multiples of 16 bytes the compiler loads 128 bits at a time, without that two bytes
    inputs = tl.multiple_of(tl.load(p_strip + 5).to(tl.int32), ROW_STEP)
    rows = tl.load(p_strip + 6).to(tl.int32)
    columns = tl.multiple_of(tl.load(p_strip + 7).to(tl.int32), ROW_STEP)

    # all slots are one contraction: row d of A and column d of B belong to slot d // BLOCK_R
    o_A = tl.arange(0, DEPTH)[:, None]
    o_B = tl.arange(0, DEPTH)[None, :]
    m_A = (o_A // BLOCK_R < SLOTS) & (o_A % BLOCK_R < RANK)
    m_B = (o_B // BLOCK_R < SLOTS) & (o_B % BLOCK_R < RANK)
    b_expert_A = tl.load(p_index + o_A // BLOCK_R, mask=m_A, other=0).to(tl.int64)
    b_expert_B = tl.load(p_index + o_B // BLOCK_R, mask=m_B, other=0).to(tl.int64)
    b_gate = tl.load(p_gate + o_A // BLOCK_R, mask=m_A, other=0.0)

    # A gate of zero is no slot: its factors are not read. Put slot by slot, the compiler sees that a mask is the same
    # all over a slot, so that loads stay wide. The gates come in with the table: nothing waits longer for them.
    merges = is_slot(tl.load(p_gate))
    for slot in tl.static_range(SLOTS):
        used = is_slot(tl.load(p_gate + slot))
        m_A = m_A & ((o_A // BLOCK_R != slot) | used)
        m_B = m_B & ((o_B // BLOCK_R != slot) | used)
        merges = merges | used
    writes = merges
    for held in tl.static_range(HELD):
        writes = writes | is_slot(tl.load(p_held + held))
    if not writes:
        return

    o_o = tl.arange(0, BLOCK_O)[:, None]
    o_i = tl.arange(0, BLOCK_I)[None, :]
    o_tile = o_o * inputs + o_i
    step = inputs.to(tl.int64) * BLOCK_O

    p_down = p_A + (b_expert_A * RANK + o_A % BLOCK_R) * inputs + o_i
    b_A = tl.load(p_down, mask=m_A & (o_i < columns), other=0.0, eviction_policy="evict_last")
    # Rounds g A to the weights' type: far below the rounding of W, and bit for bit the same when the selection is taken
    # out again. Gates in fp32 behind the product need a sum for each slot: 7.56 ms for 7.09 (rank 16, H200).
    b_A = (b_A.to(tl.float32) * b_gate).to(DOT)
    p_up = p_B + b_expert_B * outputs * RANK + o_B % BLOCK_R + o_o * RANK

    # one comparison a step for both masks of B: with two, rank 8 has no registers for two programs a multiprocessor
    b_left = tl.where(m_B, rows, 0) - o_o

    # the stages are a pipeline of W as well as of B: what is in flight is what the memory's speed is made of
    for start in tl.range(0, rows, BLOCK_O, num_stages=STAGES):
        left = rows - start
        m_tile = (o_o < left) & (o_i < columns)
        b_W = tl.load(p_source + o_tile, mask=m_tile, eviction_policy="evict_first")
        m_up = start < b_left
        b_B = tl.load(p_up + start * RANK, mask=m_up, other=0.0, eviction_policy="evict_last").to(DOT)
        b_delta = tl.dot(b_B, b_A, input_precision="ieee")
        b_sum = (b_W.to(tl.float32) + b_delta).to(ELEMENT)
        # without a slot a plain copy: minus zero plus zero would be zero
        b_sum = tl.where(merges, b_sum, b_W)
        tl.store(p_target + o_tile, b_sum, mask=m_tile, eviction_policy="evict_first")
        p_source += step
        p_target += step


@triton.jit
def _address(p_entry, ELEMENT: tl.constexpr) -> tl.tensor:
    """A pointer out of the table; told to be aligned, or the compiler would fall back to loads of one element."""
    return tl.multiple_of(tl.load(p_entry).to(tl.pointer_type(ELEMENT)), 16)
