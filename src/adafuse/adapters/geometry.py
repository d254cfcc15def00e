"""Which linears of which block carry experts, how many, and how wide those linears are.

In: a `Method`, the expert geometry of the cell, sizes of a transformers config. Out: names and numbers; nothing heavy
is imported, because configurations are completed with it. Next: budget.py, build.py.
"""

from __future__ import annotations

from typing import Any

from adafuse.config import LINEARS, ExpertKind, Experts, Method, RouterInput, Routing


def widths(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of the seven linears of one block."""
    hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    head = shape.get("head_dim") or hidden // heads
    keys = (shape.get("num_key_value_heads") or heads) * head
    ins = (hidden, hidden, hidden, heads * head, hidden, hidden, inner)
    outs = (heads * head, keys, keys, hidden, inner, inner, hidden)
    return {name: (i, o) for name, i, o in zip(LINEARS, ins, outs, strict=True)}


def expert_count(method: Method, geometry: Experts, block: int, depth: int) -> int:
    """Number of experts of a block; MoLA may have another one in each quarter of the depth."""
    if method.experts_by_quarter is not None:
        return method.experts_by_quarter[block * 4 // depth]
    return method.count or geometry.count


def expert_targets(method: Method, geometry: Experts, block: int) -> list[str]:
    """Linears with experts in a block; none where the gates are not known yet."""
    late = method.routing is Routing.token and method.router_input is RouterInput.block0_output
    first = max(method.first_expert_block, int(late))
    if method.expert_kind is not ExpertKind.lora or block < first:
        return []
    return geometry.targets if method.expert_targets is None else method.expert_targets
