"""Which linears of which block carry experts, how many parameters that makes, and the ranks that make as many.

In: a `Method`, the expert geometry of the cell, the sizes of a transformers config. Out: names, counts, or the method
with other ranks. A comparison of accuracies says little if one method has twice the parameters, and the papers' own
settings have. Nothing heavy is imported: a configuration is complete before a model is loaded. Next: build.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from adafuse.config import LINEARS, OF_PREVIOUS, ExpertKind, Experts, Method, RouterInput, Routing
from adafuse.shape import widths


def expert_count(method: Method, geometry: Experts, block: int, depth: int) -> int:
    """Number of experts of a block; MoLA may have another one in each quarter of the depth."""
    if method.experts_by_quarter is not None:
        return method.experts_by_quarter[block * 4 // depth]
    return method.count or geometry.count


def expert_targets(method: Method, geometry: Experts, block: int) -> list[str]:
    """Linears with experts in a block; none where the gates are not known yet."""
    watched = watched_block(method)
    first = max(method.first_expert_block, 0 if watched is None else watched + 1)
    if method.expert_kind is not ExpertKind.lora or block < first:
        return []
    return geometry.targets if method.expert_targets is None else method.expert_targets


def watched_block(method: Method) -> int | None:
    """The block whose output the gate of all later ones is taken from, if it is taken there."""
    token, point = method.routing is Routing.token, method.router_input
    if not token or point not in (RouterInput.block0_output, RouterInput.block_output):
        return None
    return method.router_block if point is RouterInput.block_output else 0


def follows(method: Method) -> bool:
    """Whether the gate of a token is taken from what the token before ended as."""
    return method.routing is Routing.token and method.router_input in OF_PREVIOUS


def decision_blocks(method: Method, geometry: Experts, depth: int) -> list[int]:
    """The blocks in whose first adapted linear routing=token decides; of none with experts the first."""
    adapted = [block for block in range(depth) if expert_targets(method, geometry, block)] or [0]
    return adapted[:: method.blocks_per_decision or depth]


def trainable_parameters(method: Method, experts: Experts, shape: dict[str, Any]) -> int:
    """Parameters that training `method` changes: experts, routers, ordinary LoRA. Not for full fine-tuning."""
    blocks = shape["num_hidden_layers"]
    decisions = len(decision_blocks(method, experts, blocks)) if method.routing is Routing.token else 0
    routers = decisions * (experts.count + method.null_expert) * shape["hidden_size"]
    return routers + sum(_of_block(method, experts, shape, block) for block in range(blocks))


def at_equal_budget(method: Method, experts: Experts, shape: dict[str, Any], budget: int) -> Method:
    """`method` with the ranks (and the width of PESC's adapters) whose count comes nearest to `budget`.

    All its ranks move together, in the proportions of its file, and alpha with its rank. A method whose own ranks are
    the nearest stays as it is, so that it is trained once for both budgets.
    """
    if not method.has_experts:
        return method
    best, missed = method, abs(trainable_parameters(method, experts, shape) - budget)
    for rank in range(1, budget):
        candidate = _at_rank(method, experts, rank)
        miss = trainable_parameters(candidate, experts, shape) - budget
        if abs(miss) < missed:
            best, missed = candidate, abs(miss)
        if miss > 0:
            break
    return best


def _of_block(method: Method, experts: Experts, shape: dict[str, Any], block: int) -> int:
    sizes, hidden = widths(shape), shape["hidden_size"]
    count = expert_count(method, experts, block, shape["num_hidden_layers"])
    rank = method.rank or experts.rank
    total = sum(method.static_rank * sum(sizes[name]) for name in method.static_targets)
    if method.routing is Routing.blockwise:
        total += count * hidden
    if method.expert_kind is ExpertKind.bottleneck:
        return total + count * 2 * hidden * method.bottleneck_dim
    mixture = method.expert_kind is ExpertKind.mlp_lora
    targets = LINEARS[4:] if mixture else expert_targets(method, experts, block)
    total += sum(count * rank * sum(sizes[name]) for name in targets)
    if method.routing is Routing.layerwise:
        total += sum(count * sizes[name][0] for name in targets)
    return total


def _at_rank(method: Method, experts: Experts, rank: int) -> Method:
    moved = dataclasses.replace(method)
    if method.static_targets:
        moved.static_rank, moved.static_alpha = rank, method.static_alpha / method.static_rank * rank
    if method.expert_kind is ExpertKind.bottleneck:
        moved.bottleneck_dim = rank
    else:
        moved.rank = rank
        moved.alpha = (method.alpha or experts.alpha) / (method.rank or experts.rank) * rank
    return moved
