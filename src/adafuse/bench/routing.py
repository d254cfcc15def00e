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

STEPS = 16


def watch(adapter: Adapter, model: nn.Module, prompt: Tensor) -> dict[str, float]:
    """Over STEPS greedy steps of the whole batch and all routers: `changed_share`, the tokens whose experts are others
    than those of the token before; `distinct_experts`, how many the batch uses in a step; `touched_share`, the same
    as a share of all; and how many `routers` there are.
    """
    chosen = _choices(adapter, model, prompt)
    counts = [router.weight.shape[0] for router in adapter.routers().values()]
    changed = [
        float((now != before).any(-1).float().mean())
        for step, last in pairwise(chosen)
        for now, before in zip(last, step, strict=True)
    ]
    distinct = [[len(index_TK.unique()) for index_TK in step] for step in chosen]
    shares = [n / count for step in distinct for n, count in zip(step, counts, strict=True)]
    return {
        "changed_share": mean(changed),
        "distinct_experts": mean(n for step in distinct for n in step),
        "touched_share": mean(shares),
        "routers": float(len(counts)),
    }


def _choices(adapter: Adapter, model: nn.Module, prompt: Tensor) -> list[list[Tensor]]:
    """By step and router, [B, K] sorted; through the table of gates where there is one."""
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
                chosen.append([gates.index_TK.sort(-1).values for _, gates in said])
    finally:
        adapter.remove()
    return chosen
