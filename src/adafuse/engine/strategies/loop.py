"""`loop`: a Python loop over the experts, as the published code of MoLA, PESC and MixLoRA does it.

In: hidden states [T, I], gates. Out: the experts' weighted sum [T, O]. `torch.where` returns as many rows as there
are, so on a GPU every expert of every linear waits for the host; that cost is the paper's case against layer-wise
adapters, and it is kept. Letters as in adapters/experts.py.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adafuse.adapters.experts import Experts, MlpLoraExperts
from adafuse.adapters.router import Gates
from adafuse.engine.strategies.unmerged import Unmerged


class Loop(Unmerged):
    """One small product per chosen expert and linear."""

    def mix(self, experts: Experts, x_TI: Tensor, gates: Gates, *mlp: nn.Module) -> Tensor:
        shared: tuple[Tensor, ...] = ()
        if isinstance(experts, MlpLoraExperts):
            # MixLoRA's own saving: the frozen products once for all experts
            shared = (mlp[0].gate_proj(x_TI), mlp[0].up_proj(x_TI))
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
