"""`loop`: a Python loop over the experts, as the published code of MoLA, PESC and MixLoRA does it.

In: hidden states [T, I], gates. Out: the experts' weighted sum [T, O]. `torch.where` returns as many rows as there
are, so on a GPU every expert of every linear waits for the host; that cost is the paper's case against layer-wise
adapters, and it is kept. `masked_loop` is the same loop without the waiting: every expert sees every token, and a
weight of zero takes back what it was not asked for, so that a graph can hold it. Letters as in adapters/experts.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adafuse.adapters.experts import Experts, MlpLoraExperts
from adafuse.adapters.forward import Unmerged
from adafuse.adapters.router import Gates


class Loop(Unmerged):
    """One small product per chosen expert and linear, for prompts as for decoded tokens."""

    routes_at_once = False
    takes_prompts = True

    def mix(self, experts: Experts, x_TI: Tensor, gates: Gates, *mlp: nn.Module) -> Tensor:
        shared = _frozen_products(experts, x_TI, *mlp)
        out_TO: Tensor | None = None
        for e in range(experts.count):
            rows, slot = torch.where(gates.index_TK == e)
            if rows.numel() == 0:
                continue
            y = experts.one(e, x_TI[rows], *mlp, *(product[rows] for product in shared))
            y = y * gates.weight_TK[rows, slot, None].to(y.dtype)
            if out_TO is None:
                out_TO = torch.zeros(x_TI.shape[0], y.shape[-1], dtype=y.dtype, device=y.device)
            out_TO = out_TO.index_add(0, rows, y)
        assert out_TO is not None, "every token has at least one expert"
        return out_TO


class MaskedLoop(Unmerged):
    """One small product per expert and linear, chosen or not."""

    routes_at_once = False

    def mix(self, experts: Experts, x_TI: Tensor, gates: Gates, *mlp: nn.Module) -> Tensor:
        shared = _frozen_products(experts, x_TI, *mlp)
        weight_TE = gates.dense().to(x_TI.dtype)
        return sum(
            (experts.one(e, x_TI, *mlp, *shared) * weight_TE[:, e, None] for e in range(1, experts.count)),
            start=experts.one(0, x_TI, *mlp, *shared) * weight_TE[:, :1],
        )


def _frozen_products(experts: Experts, x_TI: Tensor, *mlp: nn.Module) -> tuple[Tensor, ...]:
    """MixLoRA's own saving: the frozen products once for all experts."""
    if not isinstance(experts, MlpLoraExperts):
        return ()
    return mlp[0].gate_proj(x_TI), mlp[0].up_proj(x_TI)
