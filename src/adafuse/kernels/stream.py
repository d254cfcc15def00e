"""The machine's own speed: a copy, a read and a rewrite in place that do nothing else, and launches that do nothing at
all, as the floor of every other kernel.

In: contiguous tensors on the device, large against its caches. Out: the copy, one partial sum per program (the loads
would otherwise be optimised away), or the tensor times a factor. torch's own `copy_` is a transfer of the copy engines,
not of the multiprocessors, and its `sum` is not written for bandwidth alone. Next: bench/calibration.py, which times
them.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# of fp32 one, two or four loads of 16 bytes per thread, all in flight at once; the fastest counts. On an H200 a copy in
# pieces of 8 KiB reached 4.17 TB/s where pieces of 16 KiB reached 3.92: a floor must not flatter what is held to it.
BLOCKS = (1024, 2048, 4096)
NUM_WARPS = 8


@triton.jit
def copy_kernel(target_ptr, source_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(source_ptr + i, mask=i < count, eviction_policy="evict_first")
    tl.store(target_ptr + i, b, mask=i < count, eviction_policy="evict_first")


@triton.jit
def read_kernel(source_ptr, sums_ptr, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(source_ptr + i, mask=i < count, other=0.0, eviction_policy="evict_first")
    tl.store(sums_ptr + tl.program_id(0), tl.sum(b.to(tl.float32), axis=0))


@triton.jit
def scale_kernel(values_ptr, factor, count, BLOCK: tl.constexpr):
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    b = tl.load(values_ptr + i, mask=i < count, eviction_policy="evict_first")
    scaled = (b.to(tl.float32) * factor).to(b.dtype)
    tl.store(values_ptr + i, scaled, mask=i < count, eviction_policy="evict_first")


@triton.jit
def empty_kernel(value_ptr):
    pass


@triton.jit
def tiny_kernel(value_ptr):
    tl.store(value_ptr, tl.load(value_ptr) + 1.0)


def copy_(target: Tensor, source: Tensor, block: int) -> None:
    """target = source, element by element; same shape and dtype, both contiguous."""
    count = source.numel()
    copy_kernel[(triton.cdiv(count, block),)](target, source, count, BLOCK=block, num_warps=NUM_WARPS)


def read(source: Tensor, block: int) -> Tensor:
    """Sums of every `block` elements of a contiguous tensor, in fp32."""
    count = source.numel()
    sums = torch.empty(triton.cdiv(count, block), dtype=torch.float32, device=source.device)
    read_kernel[(sums.numel(),)](source, sums, count, BLOCK=block, num_warps=NUM_WARPS)
    return sums


def scale_(values: Tensor, factor: float, block: int) -> None:
    """values *= factor, in place: every element is read once and written once; contiguous."""
    count = values.numel()
    scale_kernel[(triton.cdiv(count, block),)](values, factor, count, BLOCK=block, num_warps=NUM_WARPS)


def empty(value: Tensor) -> None:
    """One program that does nothing, not even with `value`: what is left is the launch."""
    empty_kernel[(1,)](value, num_warps=1)


def tiny_(value: Tensor) -> None:
    """value += 1 for a tensor of one element, by one program: the shortest work that depends on the launch before."""
    tiny_kernel[(1,)](value, num_warps=1)
