"""`dense`: all experts in one product under a mask of gates; static shapes, library GEMMs only.

In: hidden states [T, I], gates. Out: the experts' weighted sum [T, O]. Training and prefill use it for every method,
because with many tokens all experts are touched anyway. Letters as in adapters/experts.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adafuse.adapters.router import Gates
from adafuse.engine.strategies.unmerged import Unmerged

if TYPE_CHECKING:
    from adafuse.adapters.adapter import Adapter
    from adafuse.adapters.experts import Experts


class Dense(Unmerged):
    """One slot per expert."""

    def __init__(self) -> None:
        self._packed: dict[int, Tensor] = {}

    def prepare(self, adapter: Adapter) -> None:
        """Lay every up factor out as [E*R, O] once: done per token it would copy all experts each time."""
        for parameter in adapter.up_factors():
            self._packed[id(parameter)] = _pack(parameter.detach())

    def mix(self, experts: Experts, x_TI: Tensor, gates: Gates, *mlp: nn.Module) -> Tensor:
        return experts.slots(self, x_TI, gates, *mlp)

    def weights(self, gates: Gates) -> Tensor:
        return gates.dense()

    def shrink(self, x_TI: Tensor, down_ERI: Tensor, gates: Gates) -> Tensor:
        count, rank, width = down_ERI.shape
        return (x_TI @ down_ERI.reshape(count * rank, width).T).view(-1, count, rank)

    def shrink_each(self, x_TSI: Tensor, down_ERI: Tensor, gates: Gates) -> Tensor:
        return torch.einsum("tei,eri->ter", x_TSI, down_ERI)

    def expand_each(self, h_TSR: Tensor, up_EOR: Tensor, gates: Gates) -> Tensor:
        return torch.einsum("ter,eor->teo", h_TSR, up_EOR)

    def expand_sum(self, h_TSR: Tensor, up_EOR: Tensor, gates: Gates) -> Tensor:
        packed = self._packed.get(id(up_EOR))
        return h_TSR.flatten(1) @ (_pack(up_EOR) if packed is None else packed)


def _pack(up_EOR: Tensor) -> Tensor:
    return up_EOR.transpose(1, 2).flatten(0, 1)
