"""Experts applied beside the weights, chosen by the gates, for all linears that share an input.

With many tokens every expert's A is read whatever is chosen, so the caller appends them all as rows to the joined
weight: the library's product then leaves u = A x of all experts behind y, and `expand_all_` adds B u of the chosen
ones to y in place. For at most FEW_TOKENS, `shrink` and `expand_` read the chosen experts alone. In: the joined
factors, each token's experts (index) and gates (weight). gather_config.py cuts the work into programs;
gather_routed.py launches the same kernels where every linear has a router of its own; letters and meaning: naive.py.
"""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from adafuse.kernels.config import (
    ExpandConfig,
    ShrinkConfig,
    check_few,
    dot_type,
    expand_config,
    flat,
    output_tiles,
    row_stride,
    shrink_config,
    stride_unit,
)
from adafuse.kernels.gather_kernels import expand_all_kernel, expand_kernel, shrink_kernel
from adafuse.kernels.naive import Members


def shrink(x_TI: Tensor, lora_A_ECI: Tensor, index_TK: Tensor, config: ShrinkConfig | None = None) -> Tensor:
    """`naive.shrink` of at most FEW_TOKENS: h[P, T, K, C] in fp32; the P partial sums are left to `expand_`."""
    check_few(index_TK)
    x_TI = x_TI if x_TI.stride(-1) == 1 else x_TI.contiguous()
    (tokens, top_k), (_, rows, inputs) = index_TK.shape, lora_A_ECI.shape
    c = config or shrink_config(tokens, top_k, rows, inputs)
    planes = triton.cdiv(inputs, c.block_i * c.steps)
    h_PTKC = torch.empty(planes, tokens, top_k, rows, dtype=torch.float32, device=x_TI.device)
    shrink_kernel[(triton.cdiv(rows, c.block_c), planes, tokens * top_k)](
        x_TI,
        lora_A_ECI.contiguous(),
        index_TK.contiguous(),
        h_PTKC,
        x_TI.stride(0),
        tokens,
        rows,
        inputs,
        K=top_k,
        BLOCK_C=c.block_c,
        BLOCK_I=c.block_i,
        STEPS=c.steps,
        num_warps=c.warps,
    )
    return h_PTKC


def expand_(
    y_TO: Tensor,
    h_PTKC: Tensor,
    lora_B_EOR: Tensor,
    index_TK: Tensor,
    weight_TK: Tensor,
    members: Members,
    scaling: float,
    gelu: bool = False,
    config: ExpandConfig | None = None,
) -> None:
    """`naive.expand_` of at most FEW_TOKENS: adds to the members' columns of y in place and rounds once."""
    check_few(index_TK)
    chosen = index_TK[:, None].contiguous(), weight_TK[:, None].contiguous()
    launch_expand(y_TO, h_PTKC, lora_B_EOR, *chosen, None, members, scaling, False, gelu, config)


def expand_all_(
    y_TO: Tensor,
    u_TS: Tensor,
    lora_B_EOR: Tensor,
    index_TGK: Tensor,
    weight_TGK: Tensor,
    members: Members,
    scaling: float,
    gelu: bool = False,
    config: ExpandConfig | None = None,
) -> None:
    """`naive.expand_all_`: adds to the members' columns of y in place and rounds once; rows of y and u may be strided.

    More than FEW_TOKENS go through tensor cores, for which gated u is rounded to its own type.
    """
    u_TS = u_TS if u_TS.stride(-1) == 1 else u_TS.contiguous()
    assert index_TGK.shape[1] in (1, len(members)), index_TGK.shape
    chosen = index_TGK.contiguous(), weight_TGK.contiguous()
    launch_expand(y_TO, u_TS, lora_B_EOR, *chosen, None, members, scaling, False, gelu, config)


def launch_expand(
    y_TO: Tensor,
    h: Tensor,
    lora_B_EOR: Tensor,
    index_TGK: Tensor,
    weight_TGK: Tensor,
    logits_TS: Tensor | None,
    members: Members,
    scaling: float,
    raw: bool,
    gelu: bool,
    config: ExpandConfig | None,
) -> None:
    """One launch for all expands: h is u[T, S] of all experts or planes [P, T, K, C] of the chosen ones.

    With logits [T, G * E], index and weight are written; without, they are read.
    """
    (tokens, groups, top_k), (experts, outputs, rank) = index_TGK.shape, lora_B_EOR.shape
    sizes = (tokens, outputs, *flat(members), scaling)
    of_all = h.dim() == 2
    assert h.shape[-1] == len(members) * rank * (experts if of_all else 1), h.shape
    c = config or expand_config(tokens, experts, rank, outputs, y_TO.dtype)
    grid = (output_tiles(members, c.block_o), triton.cdiv(tokens, c.block_t))
    unit = stride_unit(row_stride(y_TO), h.stride(-2))
    strides = (
        row_stride(y_TO) // unit,
        h.stride(-2) // unit,
        0 if logits_TS is None else logits_TS.stride(0),
    )
    operands = (y_TO, h, lora_B_EOR.contiguous(), index_TGK, weight_TGK, logits_TS, *strides)
    shape = {"G": groups, "K": top_k, "E": experts, "R": rank, "UNIT": unit, "BLOCK_O": c.block_o}
    shape |= {"ROUTED": logits_TS is not None, "RAW": raw, "GELU": gelu}
    if c.block_t == 1:
        few = {"P": 1 if of_all else len(h), "ALL": of_all, "BLOCK_R": c.block_c}
        expand_kernel[grid](*operands, *sizes, **shape, **few, num_warps=c.warps)
    else:
        lines = triton.next_power_of_2(triton.cdiv(c.block_o * rank * y_TO.itemsize, 128))
        many = {"DOT": dot_type(y_TO), "BLOCK_T": c.block_t, "BLOCK_C": c.block_c}
        many |= {"BLOCK_E": triton.next_power_of_2(experts), "LINES": lines}
        expand_all_kernel[grid](*operands, *sizes, **shape, **many, num_warps=c.warps, num_stages=c.stages)
