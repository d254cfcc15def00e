"""Layer-wise routing inside the expand: what a linear's own router chooses is found out where it is used.

The routers' rows stand behind the A rows in the joined weight, so the base product gives their logits too, and every
program of gather.py's kernels repeats the few dozen instructions of one token's softmax and top-k: a launch less per
projection. In: the row [y | u | logits] of every token. Out: y, and what was chosen, for whoever checks. Letters and
meaning: naive.py; how the work is cut: gather_config.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from adafuse.kernels.config import ExpandConfig
from adafuse.kernels.gather import launch_expand
from adafuse.kernels.naive import Members


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
    logits_TS = logits_TGE.flatten(1)
    logits_TS = logits_TS if logits_TS.stride(1) == 1 else logits_TS.contiguous()
    assert logits_TS.shape == (tokens, groups * experts), logits_TS.shape
    assert 1 <= top_k <= experts <= 32, "a kernel notes whom it has taken in the bits of a word"
    index_TGK = torch.empty(tokens, groups, top_k, dtype=torch.int64, device=y_TO.device)
    weight_TGK = torch.empty(tokens, groups, top_k, dtype=torch.float32, device=y_TO.device)
    chosen = index_TGK, weight_TGK, logits_TS
    launch_expand(y_TO, u_TS, lora_B_EOR, *chosen, members, scaling, raw, False, config)
    return index_TGK, weight_TGK
