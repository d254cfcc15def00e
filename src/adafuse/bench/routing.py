"""How the experts in use change while an arm decodes: said beside every time, because a cost depends on it.

In: an adapter, prompts [B, S]. Out: the `routing` line of one arm. Next: cost.py, whose floor counts the experts seen.
Letters: N steps, R routers, B sequences, K chosen experts. All of it is reduced on the device: a MoLA of 32 blocks has
14,000 such choices, and a `float()` of each takes longer than the steps.
"""

from __future__ import annotations

import torch
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
    index_NRBK = _choices(adapter, model, prompt)
    counts = [router.weight.shape[0] - router.null_expert for router in adapter.routers().values()]
    counts_R = torch.tensor(counts, device=index_NRBK.device)
    distinct_NR = _distinct(index_NRBK, max(counts)).float()
    used_NRBK = index_NRBK >= 0
    return {
        "changed_share": _share(index_NRBK[1:] != index_NRBK[:-1]),
        "distinct_experts": float(distinct_NR.mean()),
        "touched_share": float((distinct_NR / counts_R).mean()),
        "used_share": _share(used_NRBK),
        "merged_share": _share(used_NRBK[1:] | used_NRBK[:-1]),
        "routers": float(len(counts)),
    }


def _share(true_NRBK: Tensor) -> float:
    """Over steps, routers and sequences: how often it is true of any choice."""
    return float(true_NRBK.any(-1).float().mean())


def _distinct(index_NRBK: Tensor, count: int) -> Tensor:
    """How many of at most `count` experts the batch uses, [N, R]; -1 is none."""
    experts_E = torch.arange(count, device=index_NRBK.device)
    return (index_NRBK.flatten(2)[..., None] == experts_E).any(2).sum(-1)


def _choices(adapter: Adapter, model: nn.Module, prompt: Tensor) -> Tensor:
    """By step and router, [N, R, B, K], sorted, -1 for no expert; through the table of gates where there is one."""
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
                chosen.append(torch.stack([index_BSK[:, 0] for index_BSK in choices]))
    finally:
        adapter.remove()
    return torch.stack(chosen).sort(-1).values
