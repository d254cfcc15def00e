"""The machine's own speed: a copy, a read and a rewrite in place that do nothing else, and launches that do nothing at
all, as the floor of every other kernel.

In: contiguous tensors on the device, large against its caches. Out: the copy, one partial sum per program (the loads
would otherwise be optimised away), or the tensor times a factor. torch's own `copy_` is a transfer of the copy engines,
not of the multiprocessors, and its `sum` is not written for bandwidth alone. Next: bench/calibration.py, which times
them.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from adafuse.kernels.config import STREAM_WARPS, cdiv


def copy_(target: Tensor, source: Tensor, block: int) -> None:
    """target = source, element by element; same shape and dtype, both contiguous."""
    _stream(copy_kernel, source.numel(), block, p_target=target, p_source=source)


def read(source: Tensor, block: int) -> Tensor:
    """Sums of every `block` elements of a contiguous tensor, in fp32."""
    sums = torch.empty(cdiv(source.numel(), block), dtype=torch.float32, device=source.device)
    _stream(read_kernel, source.numel(), block, p_source=source, p_sums=sums)
    return sums


def scale_(values: Tensor, factor: float, block: int) -> None:
    """values *= factor, in place: every element is read once and written once; contiguous."""
    _stream(scale_kernel, values.numel(), block, p_values=values, factor=factor)


def _stream(kernel: Any, count: int, block: int, **operands: Any) -> None:
    kernel[(cdiv(count, block),)](**operands, count=count, BLOCK=block, num_warps=STREAM_WARPS)


def empty(value: Tensor) -> None:
    """One program that does nothing, not even with `value`: what is left is the launch."""
    empty_kernel[(1,)](p_value=value, num_warps=1)


def tiny_(value: Tensor) -> None:
    """value += 1 for a tensor of one element, by one program: the shortest work that depends on the launch before."""
    tiny_kernel[(1,)](p_value=value, num_warps=1)


@triton.jit
def copy_kernel(p_target, p_source, count, BLOCK: tl.constexpr):
    """target = source, [count] each. Grid, here and in the next two: pieces of BLOCK elements."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_value = tl.load(p_source + o_n, mask=o_n < count, eviction_policy="evict_first")
    tl.store(p_target + o_n, b_value, mask=o_n < count, eviction_policy="evict_first")


@triton.jit
def read_kernel(p_source, p_sums, count, BLOCK: tl.constexpr):
    """sums [programs] in fp32 of source [count]: without them the loads would be optimised away."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_value = tl.load(p_source + o_n, mask=o_n < count, other=0.0, eviction_policy="evict_first")
    tl.store(p_sums + tl.program_id(0), tl.sum(b_value.to(tl.float32), axis=0))


@triton.jit
def scale_kernel(p_values, factor, count, BLOCK: tl.constexpr):
    """values [count] *= factor, rounded once."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b_value = tl.load(p_values + o_n, mask=o_n < count, eviction_policy="evict_first")
    b_scaled = (b_value.to(tl.float32) * factor).to(b_value.dtype)
    tl.store(p_values + o_n, b_scaled, mask=o_n < count, eviction_policy="evict_first")


@triton.jit
def empty_kernel(p_value):
    """Nothing, once."""


@triton.jit
def tiny_kernel(p_value):
    """value [1] += 1: one program."""
    tl.store(p_value, tl.load(p_value) + 1.0)
