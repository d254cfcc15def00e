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
from adafuse.config import StrategyName
from adafuse.training.trainer import collator


@torch.no_grad()
def validate(
    adapter: Adapter, tokenizer: PreTrainedTokenizerBase, rows: list[dict[str, list[int]]], batch: int
) -> tuple[float, list[dict[str, Any]]]:
    """Mean cross-entropy in nats per answer token, and one line per router: load [E] (sums to 1), entropy in nats."""
    collate, device = collator(tokenizer), next(adapter.model.parameters()).device
    chosen: list[torch.Tensor] = []
    entropy: list[float] = []
    loss_sum, tokens, kept_tokens = 0.0, 0, 0
    adapter.install(StrategyName.dense)
    try:
        for start in tqdm(range(0, len(rows), batch), desc="validation", unit="batch"):
            inputs = collate(rows[start : start + batch]).to(device)
            adapter.context.collect, adapter.context.said = True, []
            logits = adapter.model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[:, :-1]
            labels = inputs["labels"][:, 1:]
            loss_sum += float(F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), reduction="sum"))
            tokens += int((labels != -100).sum())
            keep = inputs["attention_mask"].bool().flatten()
            kept_tokens += int(keep.sum())
            for i, gates in enumerate(adapter.context.said):
                count = gates.probs_TE.shape[-1]
                counts = torch.bincount(gates.index_TK[keep].flatten(), minlength=count).double()
                bits = float(-(gates.probs_TE[keep] * gates.probs_TE[keep].clamp(min=1e-12).log()).sum())
                if start == 0:
                    chosen.append(torch.zeros_like(counts))
                    entropy.append(0.0)
                chosen[i] += counts
                entropy[i] += bits
    finally:
        adapter.context.collect, adapter.context.said = False, []
        adapter.remove()
    lines = [
        {"router": path, "load": (load / load.sum()).tolist(), "entropy_nats": nats / max(1, kept_tokens)}
        for path, load, nats in zip(adapter.routers(), chosen, entropy, strict=True)
    ]
    return loss_sum / max(1, tokens), lines
