"""After a fit: the loss on held-out rows, and how each router spreads its choices over them, family by family.

In: a model with a fitted `Adapter` (not installed) or fitted itself, rows with labels by family. Out: a `Validation`:
the mean loss per answer token; per router and family the load of every expert, the entropy and the share of tokens left
to the backbone; and for routers of several layers how much their choices tell of each other, the paper's unmeasured
motive.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

from adafuse import distributed, strategies
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.router import Gates, Router
from adafuse.config import StrategyName
from adafuse.engine.decode import collecting, installed
from adafuse.model.finite import useless
from adafuse.training.trainer import collate

DIGITS = 4
NO_USE = "logits are not finite, or all the same because activations overflow; lower the learning rate"
Rows = list[dict[str, list[int]]]


@dataclass
class Validation:
    """Mean cross-entropy in nats per answer token over `rows`; record lines of kinds `routing` and `agreement`."""

    loss: float
    rows: int
    routing: list[dict[str, Any]] = field(default_factory=list)
    agreement: dict[str, Any] | None = None


@torch.no_grad()
def validate(
    model: nn.Module,
    adapter: Adapter | None,
    rows_of: dict[str, Rows],
    batch: int,
) -> Validation:
    """Forward all rows of every family once, padding left out of everything.

    Raises ValueError, one line, at the first loss that is not finite.
    """
    names = {id(router): path for path, router in (adapter.routers() if adapter else {}).items()}
    together = _Together(list(names.values()), _most_experts(adapter))
    loss_sum, tokens, lines = 0.0, 0, []
    # a strategy joins weights, of which a process may hold a part
    strategy = None if distributed.sharded(model) else strategies.make(StrategyName.dense)
    with installed(adapter, strategy):
        for family, rows in rows_of.items():
            spread = {name: _Spread() for name in names.values()}
            for start in tqdm(range(0, len(rows), batch), desc=f"validation, {family}", unit="batch"):
                inputs = collate(rows[start : start + batch]).to(next(model.parameters()).device)
                more, count, said = _forward(model, adapter, inputs)
                if not math.isfinite(more):
                    last = start + len(inputs["labels"]) - 1
                    raise ValueError(
                        f"validation, {family}: no loss can be told for rows {start} to {last}: {NO_USE}"
                    )
                loss_sum, tokens = loss_sum + more, tokens + count
                keep_T = inputs["attention_mask"].bool().flatten()
                for router, gates in said:
                    spread[names[id(router)]].add(gates, keep_T)
                together.add([gates.index_TK[keep_T, 0] for _, gates in said])
            lines += [{"router": name, "family": family, **own.line()} for name, own in spread.items()]
    count = sum(map(len, rows_of.values()))
    return Validation(loss_sum / max(1, tokens), count, lines, together.line())


def _most_experts(adapter: Adapter | None) -> int:
    """MoLA's quarters may differ in it."""
    routers = adapter.routers().values() if adapter else ()
    return max((router.weight.shape[0] for router in routers), default=1)


def _forward(
    model: nn.Module, adapter: Adapter | None, inputs: dict[str, Tensor]
) -> tuple[float, int, list[tuple[Router, Gates]]]:
    """Summed loss (NaN if logits are of no use), the number of answer tokens, and what each router said, in the order
    in which they run.
    """
    with collecting(adapter) as said:
        logits = model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
    labels = inputs["labels"][:, 1:]
    loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
    loss = torch.where(useless(logits)[labels != -100].any(), torch.nan, loss)
    return float(loss), int((labels != -100).sum()), said


class _Spread:
    """How one router's choices fall over its experts."""

    def __init__(self) -> None:
        self.load_E = torch.zeros(())
        self.nats, self.tokens, self.alone = 0.0, 0, 0

    def add(self, gates: Gates, keep_T: Tensor) -> None:
        probs_TE, chosen_TK = gates.probs_TE[keep_T], gates.index_TK[keep_T]
        used_T = gates.weight_TK[keep_T].any(-1)
        chosen = chosen_TK[used_T].flatten()
        self.load_E = self.load_E + torch.bincount(chosen, minlength=probs_TE.shape[-1]).double().cpu()
        self.nats -= float((probs_TE * probs_TE.clamp(min=1e-12).log()).sum())
        self.tokens += len(probs_TE)
        self.alone += int((~used_T).sum())

    def line(self) -> dict[str, Any]:
        load_E = self.load_E / self.load_E.sum().clamp(min=1)
        tokens = max(1, self.tokens)
        return {
            "load": [round(share, DIGITS) for share in load_E.tolist()],
            "entropy_nats": round(self.nats / tokens, DIGITS),
            "bypassed": round(self.alone / tokens, DIGITS),
        }


class _Together:
    """How often two routers' first choices meet, for every pair of routers."""

    def __init__(self, names: list[str], experts: int) -> None:
        self.names, self.experts = names, experts
        self.counts_RERE: Tensor | None = None

    def add(self, first_choices: list[Tensor]) -> None:
        if len(first_choices) < 2:
            return
        index_TR = torch.stack(first_choices, dim=1)
        hot_TX = F.one_hot(index_TR, self.experts).float().flatten(1)
        counts = (hot_TX.T @ hot_TX).double().cpu()
        self.counts_RERE = counts if self.counts_RERE is None else self.counts_RERE + counts

    def line(self) -> dict[str, Any] | None:
        if self.counts_RERE is None:
            return None
        many = len(self.names)
        joint_RSEF = self.counts_RERE.view(many, self.experts, many, self.experts).transpose(1, 2)
        information = normalised_information(joint_RSEF)
        rounded = [[round(value, 3) for value in row] for row in information.tolist()]
        return {"routers": self.names, "information": rounded}


def normalised_information(joint_XYEF: Tensor) -> Tensor:
    """Mutual information over the geometric mean of the entropies, [X, Y], from counts; 0 where nothing varies.

    Expert numbers of two routers mean nothing to each other, so agreement is what one choice tells about the other.
    """
    p_XYEF = joint_XYEF / joint_XYEF.sum((-2, -1), keepdim=True)
    entropies = [-torch.special.xlogy(p, p).sum(-1) for p in (p_XYEF.sum(-1), p_XYEF.sum(-2))]
    shared = entropies[0] + entropies[1] + torch.special.xlogy(p_XYEF, p_XYEF).sum((-2, -1))
    scale = (entropies[0] * entropies[1]).sqrt()
    return torch.where(scale > 0, shared / scale.clamp(min=1e-12), 0.0).clamp(0, 1)
