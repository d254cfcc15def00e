"""How the experts in use change while an arm decodes: said beside every time, because a cost depends on it.

In: an adapter, and what its routers chose while a check decoded (checks.py). Out: the `routing` line of an arm, and the
`selections` line of a method. Next: cost.py, whose floor counts the experts seen. Letters: N steps, R routers, B
sequences, K chosen experts. All is reduced on the device: a MoLA of 32 blocks has thousands of such choices, and a
`float()` of each takes seconds.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from adafuse.adapters.adapter import Adapter
from adafuse.adapters.gate_table import GateTable

# of a table: as many as the shortest block has, which begins at the first row (latency.py)
STEPS = 64
DIGITS = 4


def shares(adapter: Adapter, choices: dict[str, Tensor]) -> dict[str, float]:
    """Over the decoded steps of the whole batch and all routers, given each router's `choices` [B, N, K], -1 for no
    expert: `changed_share`, the tokens whose experts are others than those of the token before; `distinct_experts`, how
    many the batch uses in a step; `touched_share`, the same as a share of all; `used_share`, the tokens that are not
    left to the backbone; `merged_share`, those of which that is true or was of the token before, so that merged weights
    change; and how many `routers` there are. A table of gates is read instead: it is what blocks will use.
    """
    routers, table = adapter.routers(), adapter.context.gate_table
    if table is not None:
        choices = dict.fromkeys(routers, _of_table(table))
    index_NRBK = _side_by_side([choices[name] for name in routers])
    counts = [router.weight.shape[0] - router.null_expert for router in routers.values()]
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


def selections(adapter: Adapter, choices: dict[str, Tensor]) -> dict[str, list[Any]]:
    """For each of the `routers` by name, given its `choices` [B, N, K]: `changed_share`, the tokens whose experts are
    others than those of the token before, and `lasts_tokens`, for how many tokens in a row a choice stands. A strategy
    that merges would save what does not change.
    """
    names = list(adapter.routers())
    index_NRBK = _side_by_side([choices[name] for name in names])
    changed_NRB = (index_NRBK[1:] != index_NRBK[:-1]).any(-1).float()
    stands_R = 1 + changed_NRB.sum(0).mean(-1)
    return {
        "routers": names,
        "changed_share": [round(share, DIGITS) for share in changed_NRB.mean((0, 2)).tolist()],
        "lasts_tokens": [round(tokens, DIGITS) for tokens in (index_NRBK.shape[0] / stands_R).tolist()],
    }


def _side_by_side(choices: list[Tensor]) -> Tensor:
    """[N, R, B, K] sorted; a router of fewer experts than the others' top-k has -1 in the places that it lacks."""
    top_k = max(index_BNK.shape[-1] for index_BNK in choices)
    wide = [F.pad(index_BNK, (0, top_k - index_BNK.shape[-1]), value=-1) for index_BNK in choices]
    return torch.stack(wide).permute(2, 0, 1, 3).sort(-1).values


def _of_table(table: GateTable) -> Tensor:
    """Its first STEPS rows as choices, [B, N, K]."""
    index_NBK = table.index_NBK[:STEPS]
    if table.used_NB is not None:
        index_NBK = index_NBK.where(table.used_NB[:STEPS, :, None], -1)
    return index_NBK.transpose(0, 1)


def _share(true_NRBK: Tensor) -> float:
    """Over steps, routers and sequences: how often it is true of any choice."""
    return float(true_NRBK.any(-1).float().mean())


def _distinct(index_NRBK: Tensor, count: int) -> Tensor:
    """How many of at most `count` experts the batch uses, [N, R]; -1 is none."""
    experts_E = torch.arange(count, device=index_NRBK.device)
    return (index_NRBK.flatten(2)[..., None] == experts_E).any(2).sum(-1)
