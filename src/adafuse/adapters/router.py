"""The router: from a token's hidden state to its gates.

In: hidden states [T, I]. Out: `Gates`, the chosen experts and their weights, and the softmax that chose them.
Next: experts.py, which the gates weigh.

Letters: T tokens, E experts, K top-k, I input width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn

from adafuse.config import Normalisation


@dataclass
class Gates:
    """Chosen experts `index_TK` (int64), their weights `weight_TK` (fp32), all probabilities `probs_TE` (fp32)."""

    index_TK: Tensor
    weight_TK: Tensor
    probs_TE: Tensor
    _dense_TE: Tensor | None = None

    def dense(self) -> Tensor:
        """Weights of all experts, zero where not chosen, [T, E] fp32; computed once for all linears that share it."""
        if self._dense_TE is None:
            self._dense_TE = torch.zeros_like(self.probs_TE).scatter(-1, self.index_TK, self.weight_TK)
        return self._dense_TE


@lru_cache(maxsize=8)
def ungated(tokens: int, device: torch.device) -> Gates:
    """The gates of plain LoRA: one expert, always on."""
    one = torch.ones(tokens, 1, device=device)
    return Gates(torch.zeros(tokens, 1, dtype=torch.int64, device=device), one, one)


class Router(nn.Module):
    """Linear without bias, softmax, top-k, normalise; kept in fp32, because bf16 logits turn near-ties over.

    The three normalisations: `softmax_topk_renorm` (MoLA, MixLoRA; the reading of AdaFuse under which its equation
    and its prose agree), `topk_softmax` (PESC) gives the same gates, `softmax_topk_raw` does not sum to one.
    """

    def __init__(self, width: int, experts: int, top_k: int, normalisation: Normalisation) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width, dtype=torch.float32))
        self.top_k = min(top_k, experts)
        self.normalisation = normalisation
        # MoLA's initialisation; paper: unstated
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x_TI: Tensor) -> Gates:
        with torch.autocast(x_TI.device.type, enabled=False):
            logits_TE = x_TI.float() @ self.weight.float().T
            probs_TE = torch.softmax(logits_TE, dim=-1)
            if self.normalisation is Normalisation.topk_softmax:
                top_TK, index_TK = torch.topk(logits_TE, self.top_k, dim=-1)
                return Gates(index_TK, torch.softmax(top_TK, dim=-1), probs_TE)
            weight_TK, index_TK = torch.topk(probs_TE, self.top_k, dim=-1)
            if self.normalisation is Normalisation.softmax_topk_renorm:
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return Gates(index_TK, weight_TK, probs_TE)


def balance_loss(gates: Gates, keep_T: Tensor) -> Tensor:
    """Switch form `E * sum_e f_e P_e` over the tokens where `keep_T` is true; 1 when balanced, E when collapsed.

    f is the share of choices (no gradient), P the mean probability (gradient). Padding must not count: a router
    would otherwise be balanced on tokens that nobody reads.
    """
    kept = keep_T.to(gates.probs_TE.dtype)[:, None]
    tokens = kept.sum().clamp(min=1)
    chosen_TE = torch.zeros_like(gates.probs_TE).scatter(-1, gates.index_TK, 1.0)
    share_E = (chosen_TE * kept).sum(0) / (tokens * gates.index_TK.shape[-1])
    mean_E = (gates.probs_TE * kept).sum(0) / tokens
    return gates.probs_TE.shape[-1] * (share_E * mean_E).sum()
