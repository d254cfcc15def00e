"""`gather`: shrink and expand of each token's chosen experts only, by batched products; any batch.

In: hidden states [T, I], gates. Out: the experts' weighted sum [T, O]. Bytes: the chosen factors once per token.
On a GPU kernels/gather.py is to take this place. Letters as in adapters/experts.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from adafuse.adapters.experts import Experts
from adafuse.adapters.router import Gates
from adafuse.engine.strategies.unmerged import Unmerged

if TYPE_CHECKING:
    from adafuse.adapters.adapter import Adapter


class Gather(Unmerged):
    """One slot per chosen expert, S = K."""

    def __init__(self) -> None:
        self._packed: dict[int, Tensor] = {}

    def prepare(self, adapter: Adapter) -> None:
        """Lay every up factor out as [E, R, O] once: the chosen ones are then one matrix, and one product sums them."""
        for parameter in adapter.up_factors():
            self._packed[id(parameter)] = _lay_out(parameter.detach())

    def mix(self, experts: Experts, x_TI: Tensor, gates: Gates, *mlp: nn.Module) -> Tensor:
        return experts.slots(self, x_TI, gates, *mlp)

    def weights(self, gates: Gates) -> Tensor:
        return gates.weight_TK

    def shrink(self, x_TI: Tensor, down_ERI: Tensor, gates: Gates) -> Tensor:
        down_TSRI = down_ERI[gates.index_TK]
        tokens, slots, rank, width = down_TSRI.shape
        return torch.bmm(down_TSRI.view(tokens, slots * rank, width), x_TI[..., None]).view(
            tokens, slots, rank
        )

    def shrink_each(self, x_TSI: Tensor, down_ERI: Tensor, gates: Gates) -> Tensor:
        return (down_ERI[gates.index_TK] @ x_TSI[..., None]).squeeze(-1)

    def expand_each(self, h_TSR: Tensor, up_EOR: Tensor, gates: Gates) -> Tensor:
        return (up_EOR[gates.index_TK] @ h_TSR[..., None]).squeeze(-1)

    def expand_sum(self, h_TSR: Tensor, up_EOR: Tensor, gates: Gates) -> Tensor:
        packed_ERO = self._packed.get(id(up_EOR))
        up_TSRO = (_lay_out(up_EOR) if packed_ERO is None else packed_ERO)[gates.index_TK]
        return torch.bmm(h_TSR.flatten(1)[:, None], up_TSRO.flatten(1, 2))[:, 0]


def _lay_out(up_EOR: Tensor) -> Tensor:
    return up_EOR.transpose(1, 2).contiguous()
