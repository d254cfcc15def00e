"""One launch that merges the chosen experts into every adapted linear: the paper's fused switch, and a drift-free form.

In: the weights W [O, I] of all adapted linears and the adapter's own lora_A [E, R, I] and lora_B [E, O, R] of each,
which `plan` turns once into a table on the device; then, at each switch, S slots of (expert, gate). Out: W, in place.
The work is cut into strips, BLOCK_I columns wide and many rows long, one program each. What the functions mean is said
by naive.py; who calls them: strategies/merge.py. Next: switch_kernel.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from adafuse.kernels.switch_kernel import switch_kernel

ELEMENTS = {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float32: tl.float32}
ALIGNMENT_BYTES = 16
# beyond four tiles in flight nothing was gained (README.md)
MAX_STAGES = 4
# of a program's shared memory, kept by the driver and by the compiler
RESERVED_BYTES = 2048


@dataclass(frozen=True)
class Config:
    """Tile of W, tiles of one strip, and warps of a program."""

    block_o: int
    block_i: int
    tiles: int
    num_warps: int


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
    Factors of a slot whose gate is zero are not read, and without any gate no weight is.
    """
    _launch(plan, index_S, gate_S, None, source=0)


def rebase_(plan: SwitchPlan, index_S: Tensor, gate_S: Tensor, held_H: Tensor) -> None:
    """W = W_0 + sum_s gate_s B[e_s] A[e_s], rounded once, whatever W held before; arguments as in `switch_`.

    held_H: the fp32 gates of what W holds. All zero means that W is clean, and a clean weight is not written again.
    """
    if plan.clean is None:
        raise ValueError("rebase_ needs a plan with clean weights: plan(weights, clean, lora_A, lora_B)")
    _launch(plan, index_S, gate_S, held_H, source=1)


def _config(dtype: torch.dtype, rank: int) -> Config:
    """On the chip are A of a tile's columns and B of its rows for every slot: high ranks need small tiles."""
    row_bytes = rank * dtype.itemsize
    if row_bytes > 512:
        raise ValueError(
            f"the switch kernel takes ranks up to {512 // dtype.itemsize} in {dtype}, not {rank}"
        )
    if row_bytes > 128 or dtype == torch.float32:
        block_i = 32 if row_bytes > 256 else 64
        return Config(32, block_i, tiles=32, num_warps=4)
    # a long strip loads its A seldom, which is much at high ranks; a short one leaves no multiprocessor without work
    return Config(64, 128, tiles=16 if rank <= 32 else 32, num_warps=8)


def stages(config: Config, depth: int, itemsize: int, shared_bytes: int) -> int:
    """How many tiles of W and B may be on their way at once: as many as fit beside A, but no more than help."""
    kept = depth * config.block_i * itemsize
    each = config.block_o * (depth + config.block_i) * itemsize
    return max(1, min(MAX_STAGES, (shared_bytes - kept - RESERVED_BYTES) // each))


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


def _launch(plan: SwitchPlan, index_S: Tensor, gate_S: Tensor, held_H: Tensor | None, source: int) -> None:
    if index_S.shape != gate_S.shape or gate_S.dtype != torch.float32:
        raise ValueError(
            f"a switch needs one fp32 gate per slot, got {[*index_S.shape]} and {[*gate_S.shape]}"
        )
    element, slots = ELEMENTS[plan.weights[0].dtype], index_S.shape[0]
    product = contraction(plan.lora_A[0].shape[1], slots)
    itemsize, limit = plan.weights[0].element_size(), shared_bytes(plan.strips.device)
    switch_kernel[(plan.strips.shape[0],)](
        plan.strips,
        index_S,
        gate_S,
        held_H,
        SOURCE=source,
        HELD=0 if held_H is None else len(held_H),
        ELEMENT=element,
        # Triton's interpreter, which runs the tests on a CPU, computes bfloat16 wrongly
        DOT=element if plan.strips.is_cuda else tl.float32,
        **product,
        ROW_STEP=plan.row_step,
        BLOCK_O=plan.config.block_o,
        BLOCK_I=plan.config.block_i,
        STAGES=stages(plan.config, product["DEPTH"], itemsize, limit),
        num_warps=plan.config.num_warps,
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
