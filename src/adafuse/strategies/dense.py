"""`dense`: all experts in one product under a mask of gates; static shapes, library GEMMs only.

In: hidden states [T, I], gates. Out: the experts' weighted sum [T, O]. Decoding runs joined projections; experts that
are not LoRA on a linear take the products of adapters/forward.py. Letters as in adapters/experts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adafuse.kernels import ops
from adafuse.kernels.config import Members
from adafuse.strategies.joined import Appended, Extended, Group

MembersUp = list[tuple[int, Tensor]]


def members_up(lora_B_EOR: Tensor, members: Members, scaling: float) -> MembersUp:
    """Of each member its first column, and the B of all its experts, with the scaling, as [E * R, width]."""
    parts = lora_B_EOR.split([width for _, width in members], dim=1)
    packed = [(part_EOR * scaling).transpose(1, 2).flatten(0, 1) for part_EOR in parts]
    return [(column, up_SO) for (column, _), up_SO in zip(members, packed, strict=True)]


def expand_masked_(y_TO: Tensor, u_TS: Tensor, gates_TGE: Tensor, ups: MembersUp) -> None:
    """Add each member's experts to its columns of y in place; u [T, S = G * E * R] is A x of all experts.

    The gates are [T, G, E], or [T, 1, E] for all members.
    """
    u_TGER = u_TS.unflatten(1, (len(ups), gates_TGE.shape[-1], -1))
    h_TGS = (u_TGER * gates_TGE[..., None].to(u_TS.dtype)).flatten(2)
    for g, (column, up_SO) in enumerate(ups):
        y_TO[:, column : column + up_SO.shape[1]].addmm_(h_TGS[:, g], up_SO)


class Dense(Appended):
    """One slot per expert."""

    def lay_out(self, group: Group) -> Callable[[Tensor], Tensor]:
        ups = members_up(group.lora_B_EOR, ops.members_of(group.columns), group.scaling)
        return partial(self._compute, group, self.extend(group), ups)

    def _compute(self, group: Group, extended: Extended, ups: MembersUp, x_TI: Tensor) -> Tensor:
        """One product for the projection and all A, the gates, and one product up that adds to each member."""
        first_router = extended.outputs + sum(up_SO.shape[0] for _, up_SO in ups)
        y_TO, u_TS, _ = extended.product(x_TI).tensor_split([extended.outputs, first_router], dim=1)
        expand_masked_(y_TO, u_TS, self._gates(group, x_TI), ups)
        return y_TO

    def _gates(self, group: Group, x_TI: Tensor) -> Tensor:
        """Weights of all experts, [T, 1, E] shared or [T, G, E] of each member's own router."""
        if group.router_GEI is None:
            return self.shared_gates(group, x_TI).dense()[:, None]
        router = group.router
        index_TGK, weight_TGK, probs_TGE = ops.route(x_TI, group.router_GEI, router.top_k, router.is_raw)
        self.own_gates(group, index_TGK, weight_TGK)
        return torch.zeros_like(probs_TGE).scatter(-1, index_TGK, weight_TGK)
