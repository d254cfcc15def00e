"""How the experts in use change while an arm decodes: said beside every time, because a cost depends on it.

In: an adapter, prompts [B, S]. Out: the `routing` line of one arm. Next: cost.py, whose floor counts the experts seen.
"""

from __future__ import annotations

from itertools import pairwise
from statistics import mean

from torch import Tensor, nn
from transformers import DynamicCache

from adafuse.adapters.adapter import Adapter
from adafuse.config import StrategyName
from adafuse.engine.decode import decode_one_token, decoding, prefill

# as many as the shortest block has
STEPS = 64


def watch(adapter: Adapter, model: nn.Module, prompt: Tensor) -> dict[str, float]:
    """Over STEPS greedy steps of the whole batch and all routers: `changed_share`, the tokens whose experts are others
    than those of the token before; `distinct_experts`, how many the batch uses in a step; `touched_share`, the same
    as a share of all; `used_share`, the tokens that are not left to the backbone; `merged_share`, those of which that
    is true or was of the token before, so that merged weights change; and how many `routers` there are.
    """
    chosen = _choices(adapter, model, prompt)
    counts = [router.weight.shape[0] - router.null_expert for router in adapter.routers().values()]
    pairs = [pair for step, last in pairwise(chosen) for pair in zip(step, last, strict=True)]
    distinct = [[len(index_BK[index_BK >= 0].unique()) for index_BK in step] for step in chosen]
    shares = [n / count for step in distinct for n, count in zip(step, counts, strict=True)]
    return {
        "changed_share": mean(_share(now != before) for before, now in pairs),
        "distinct_experts": mean(n for step in distinct for n in step),
        "touched_share": mean(shares),
        "used_share": mean(_share(index_BK >= 0) for step in chosen for index_BK in step),
        "merged_share": mean(_share((now >= 0) | (before >= 0)) for before, now in pairs),
        "routers": float(len(counts)),
    }


def _share(true_BK: Tensor) -> float:
    """Of the batch: the sequences where it is true of any choice."""
    return float(true_BK.any(-1).float().mean())


def _choices(adapter: Adapter, model: nn.Module, prompt: Tensor) -> list[list[Tensor]]:
    """By step and router, [B, K] sorted, -1 for no expert; through the table of gates where there is one."""
    adapter.install(StrategyName.dense)
    chosen = []
    try:
        cache = DynamicCache()
        token = prefill(model, prompt, None, cache).argmax(-1, keepdim=True)
        if adapter.context.gate_table is not None:
            adapter.context.gate_table.restart()
        with decoding(adapter):
            for _ in range(STEPS):
                with adapter.collecting() as said:
                    token = decode_one_token(model, token, None, cache).argmax(-1, keepdim=True)
                choices = adapter.by_name(said, len(token)).values()
                chosen.append([index_BSK[:, 0].sort(-1).values for index_BSK in choices])
    finally:
        adapter.remove()
    return chosen
