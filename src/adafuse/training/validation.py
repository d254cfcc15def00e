"""After a fit: the loss on held-out rows, and how each router spreads its choices over them.

In: a fitted `Adapter` (not installed), rows with labels. Out: the mean loss per answer token, and per router the load
of every expert and the mean entropy. A collapsed router shows here before it shows in accuracy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional as F
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from adafuse.adapters.adapter import Adapter
from adafuse.adapters.router import Gates
from adafuse.config import StrategyName
from adafuse.training.trainer import collator


@torch.no_grad()
def validate(
    adapter: Adapter, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, list[int]]], batch: int
) -> tuple[float, list[dict[str, Any]]]:
    """Mean cross-entropy in nats per answer token, and one line per router: load [E] (sums to 1), entropy in nats."""
    collate, device = collator(tokenizer), next(adapter.model.parameters()).device
    spread = {id(router): _Spread(path) for path, router in adapter.routers().items()}
    loss_sum, tokens = 0.0, 0
    adapter.install(StrategyName.dense)
    try:
        for start in tqdm(range(0, len(rows), batch), desc="validation", unit="batch"):
            inputs = collate(rows[start : start + batch]).to(device)
            adapter.context.collect, adapter.context.said = True, []
            logits = adapter.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[
                :, :-1
            ]
            labels = inputs["labels"][:, 1:]
            loss_sum += float(
                F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum")
            )
            tokens += int((labels != -100).sum())
            for router, gates in adapter.context.said:
                spread[id(router)].add(gates, inputs["attention_mask"].bool().flatten())
    finally:
        adapter.context.collect, adapter.context.said = False, []
        adapter.remove()
    return loss_sum / max(1, tokens), [s.line() for s in spread.values()]


class _Spread:
    """How one router's choices fall over its experts, padding left out."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.load_E = torch.zeros(())
        self.nats, self.tokens = 0.0, 0

    def add(self, gates: Gates, keep_T: torch.Tensor) -> None:
        probs_TE = gates.probs_TE[keep_T]
        chosen = gates.index_TK[keep_T].flatten()
        self.load_E = self.load_E + torch.bincount(chosen, minlength=probs_TE.shape[-1]).double().cpu()
        self.nats -= float((probs_TE * probs_TE.clamp(min=1e-12).log()).sum())
        self.tokens += len(probs_TE)

    def line(self) -> dict[str, Any]:
        load = (self.load_E / self.load_E.sum()).tolist()
        return {"router": self.path, "load": load, "entropy_nats": self.nats / max(1, self.tokens)}
