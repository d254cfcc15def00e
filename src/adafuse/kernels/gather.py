"""Experts applied beside the weights, chosen by the gates, for all linears that share an input.

With many tokens every expert's A is read whatever is chosen, so the caller appends them all as rows to the joined
weight: the library's product then leaves u = A x of all experts behind y, and `expand_all_` adds B u of the chosen
ones to y in place. Where every linear has a router of its own its rows stand there too, and `expand_routed_` chooses
for itself: a launch less per projection. For at most FEW_TOKENS, `shrink` and `expand_` read the chosen experts alone.
In: the joined factors, each token's experts (index) and gates (weight). Out: y, in place. Letters and meaning:
naive.py. Next: gather_kernels.py, and config.py, which cuts the work into programs.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from adafuse.kernels.config import (
    FEW_TOKENS,
    ROUTED_MAX_EXPERTS,
    ExpandConfig,
    Members,
    ShrinkConfig,
    cdiv,
    check_tokens,
    expand_config,
    flat,
    output_tiles,
    shrink_config,
    stride_unit,
)
from adafuse.kernels.gather_kernels import expand_all_kernel, expand_kernel, shrink_kernel
from adafuse.kernels.gemv import rows_of


def shrink(x_TI: Tensor, lora_A_ECI: Tensor, index_TK: Tensor, config: ShrinkConfig | None = None) -> Tensor:
    """`naive.shrink` of at most FEW_TOKENS: h[P, T, K, C] in fp32; the P partial sums are left to `expand_`."""
    (tokens, top_k), (_, rows_A, inputs) = index_TK.shape, lora_A_ECI.shape
    check_tokens(tokens, FEW_TOKENS)
    x_TI = rows_of(x_TI)
    cut = config or shrink_config(tokens, top_k, rows_A, inputs)
    planes = cdiv(inputs, cut.block_i * cut.steps)
    h_PTKC = torch.empty(planes, tokens, top_k, rows_A, dtype=torch.float32, device=x_TI.device)
    shrink_kernel[(cdiv(rows_A, cut.block_c), planes, tokens * top_k)](
        p_x=x_TI,
        p_A=lora_A_ECI.contiguous(),
        p_index=index_TK.contiguous(),
        p_h=h_PTKC,
        x_stride=x_TI.stride(0),
        tokens=tokens,
        rows_A=rows_A,
        inputs=inputs,
        K=top_k,
        BLOCK_C=cut.block_c,
        BLOCK_I=cut.block_i,
        STEPS=cut.steps,
        num_warps=cut.warps,
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
    check_tokens(len(index_TK), FEW_TOKENS)
    chosen = index_TK[:, None].contiguous(), weight_TK[:, None].contiguous()
    _expand(y_TO, h_PTKC, lora_B_EOR, *chosen, members, scaling, gelu=gelu, config=config)


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
    assert index_TGK.shape[1] in (1, len(members)), index_TGK.shape
    chosen = index_TGK.contiguous(), weight_TGK.contiguous()
    _expand(y_TO, rows_of(u_TS), lora_B_EOR, *chosen, members, scaling, gelu=gelu, config=config)


def expand_routed_(
    y_TO: Tensor,
    u_TS: Tensor,
    logits_TGE: Tensor,
    lora_B_EOR: Tensor,
    members: Members,
    top_k: int,
    raw: bool,
    scaling: float,
    config: ExpandConfig | None = None,
) -> tuple[Tensor, Tensor]:
    """`naive.expand_routed_`: adds to y in place; returns index[T, G, K] (int64) and weight[T, G, K] (fp32).

    The logits, [T, G * E] or [T, G, E], are read as they are rounded; equal ones are chosen from the first on, and NaN
    counts as minus infinity. Rows may be strided; 128-bit loads need strides that are multiples of 8.
    """
    tokens, groups, experts = len(y_TO), len(members), len(lora_B_EOR)
    logits_TS = rows_of(logits_TGE.flatten(1))
    assert logits_TS.shape == (tokens, groups * experts), logits_TS.shape
    assert 1 <= top_k <= experts <= ROUTED_MAX_EXPERTS, (top_k, experts)
    index_TGK = torch.empty(tokens, groups, top_k, dtype=torch.int64, device=y_TO.device)
    weight_TGK = torch.empty(tokens, groups, top_k, dtype=torch.float32, device=y_TO.device)
    chosen = index_TGK, weight_TGK
    _expand(y_TO, u_TS, lora_B_EOR, *chosen, members, scaling, logits_TS, raw, config=config)
    return index_TGK, weight_TGK


def _expand(
    y_TO: Tensor,
    h: Tensor,
    lora_B_EOR: Tensor,
    index_TGK: Tensor,
    weight_TGK: Tensor,
    members: Members,
    scaling: float,
    logits_TS: Tensor | None = None,
    raw: bool = False,
    gelu: bool = False,
    config: ExpandConfig | None = None,
) -> None:
    """One launch for all expands: h is u[T, S] of all experts or planes [P, T, K, C] of the chosen ones.

    With logits [T, G * E], index and weight are written; without, they are read.
    """
    (tokens, groups, top_k), (experts, rows_B, rank) = index_TGK.shape, lora_B_EOR.shape
    edges, of_all = flat(members), h.dim() == 2
    assert y_TO.stride(-1) == 1, "y is written in place: its columns must be contiguous"
    assert h.shape[-1] == len(members) * rank * (experts if of_all else 1), h.shape
    cut = config or expand_config(tokens, experts, rank, rows_B, y_TO.itemsize)
    unit = stride_unit(y_TO.stride(0), h.stride(-2))
    shared = {
        "p_y": y_TO,
        "p_B": lora_B_EOR.contiguous(),
        "p_index": index_TGK,
        "p_weight": weight_TGK,
        "p_logits": logits_TS,
        "y_stride": y_TO.stride(0) // unit,
        "logits_stride": 0 if logits_TS is None else logits_TS.stride(0),
        "tokens": tokens,
        "rows_B": rows_B,
        **edges,
        "scaling": scaling,
        "G": groups,
        "K": top_k,
        "E": experts,
        "R": rank,
        "ROUTED": logits_TS is not None,
        "RAW": raw,
        "GELU": gelu,
        "UNIT": unit,
        "BLOCK_O": cut.block_o,
        "num_warps": cut.warps,
    }
    grid = output_tiles(members, cut.block_o), cdiv(tokens, cut.block_t)
    if cut.block_t == 1:
        expand_kernel[grid](
            **shared,
            p_h=h,
            h_stride=h.stride(-2) // unit,
            P=1 if of_all else len(h),
            ALL=of_all,
            BLOCK_R=cut.block_c,
        )
        return
    expand_all_kernel[grid](
        **shared,
        p_u=h,
        u_stride=h.stride(-2) // unit,
        DOT=_dot_type(y_TO),
        BLOCK_T=cut.block_t,
        BLOCK_C=cut.block_c,
        BLOCK_E=triton.next_power_of_2(experts),
        LINES=triton.next_power_of_2(cdiv(cut.block_o * rank * y_TO.itemsize, 128)),
        num_stages=cut.stages,
    )


def _dot_type(like: Tensor) -> tl.dtype:
    """The operands' type in `tl.dot`; a CPU tensor means the interpreter, where only fp32 products are right."""
    wide = like.device.type == "cpu" or like.dtype == torch.float32
    return tl.float32 if wide else {torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}[like.dtype]
