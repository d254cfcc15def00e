"""`dense`: all experts in one product under a mask of gates; static shapes, library GEMMs only.

In: hidden states [T, I], gates. Out: the experts' weighted sum [T, O]. Training and prefill use it for every method,
linear by linear, because with many tokens all experts are touched anyway; decoding runs joined projections.
Letters as in adapters/experts.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adafuse.adapters.experts import Experts
from adafuse.adapters.router import Gates
from adafuse.kernels import ops
from adafuse.strategies.joined import Appended, Extended, Group, is_raw

if TYPE_CHECKING:
    from adafuse.adapters.adapter import Adapter


class Dense(Appended):
    """One slot per expert."""

    def __init__(self) -> None:
        super().__init__()
        self._packed: dict[int, Tensor] = {}

    def prepare(self, adapter: Adapter) -> None:
        """Lay the factors out for two products: done per token it would copy all experts each time."""
        super().prepare(adapter)
        self._packed = {id(p): _pack(p.detach()) for p in adapter.unjoined_up_factors()}

    def lay_out(self, group: Group) -> tuple[Extended, list[Tensor]]:
        """Down is in the base product; up, with the scaling, is [E*R, O] of each member."""
        ups = group.lora_B_EOR.split(group.columns[1::2], dim=1)
        return super().lay_out(group), [_pack(up * group.scaling) for up in ups]

    def compute(self, group: Group, laid_out: tuple[Extended, list[Tensor]], x_TI: Tensor) -> Tensor:
        """One product for the projection and all A, the gates, and one product up that adds to each member."""
        extended, ups = laid_out
        first_router = extended.outputs + sum(up_SO.shape[0] for up_SO in ups)
        y_TO, u_TS, _ = extended.product(x_TI).tensor_split([extended.outputs, first_router], dim=1)
        gates_TGE = self._gates(group, x_TI)
        u_TGER = u_TS.unflatten(1, (len(group.sites), gates_TGE.shape[-1], -1))
        h_TGS = (u_TGER * gates_TGE[..., None].to(x_TI.dtype)).flatten(2)
        for g, up_SO in enumerate(ups):
            first, width = group.columns[2 * g : 2 * g + 2]
            y_TO[:, first : first + width].addmm_(h_TGS[:, g], up_SO)
        return y_TO

    def _gates(self, group: Group, x_TI: Tensor) -> Tensor:
        """Weights of all experts, [T, 1, E] shared or [T, G, E] of each member's own router."""
        if group.router_GEI is None:
            return self.shared_gates(group, x_TI).dense()[:, None]
        routed = ops.route(x_TI, group.router_GEI, group.router.top_k, is_raw(group.router))
        index_TGK, weight_TGK, probs_TGE = routed
        self.own_gates(group, index_TGK, weight_TGK)
        return torch.zeros_like(probs_TGE).scatter(-1, index_TGK, weight_TGK)

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
