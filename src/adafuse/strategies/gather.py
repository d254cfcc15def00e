"""`gather`: the chosen experts' B, applied in one launch to what the base product shrank beside (kernels/gather.py).

In: hidden states [T, I], gates. Out: the experts' weighted sum [T, O]; any batch. Experts that are not LoRA on a
linear: PESC's take the same kernels, MixLoRA's batched products of torch, because each of its slots has its own
input. Letters as in adapters/experts.py.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from adafuse.adapters.experts import BottleneckExperts, Experts
from adafuse.adapters.router import Gates
from adafuse.kernels import ops
from adafuse.kernels.config import FEW_TOKENS
from adafuse.strategies.joined import Appended, Extended, Group


class Gather(Appended):
    """One slot per chosen expert, S = K."""

    def lay_out(self, group: Group) -> Callable[[Tensor], Tensor]:
        return partial(self._compute, group, self.extend(group))

    def _compute(self, group: Group, extended: Extended, x_TI: Tensor) -> Tensor:
        """One product for the projection and all A, and one launch that adds the chosen experts' B."""
        product, outputs = extended.product(x_TI), extended.outputs
        if group.router_GEI is None:
            gates = self.shared_gates(group, x_TI)
            chosen = gates.index_TK[:, None], gates.weight_TK[:, None]
            ops.expand_behind_(product, outputs, group.lora_B_EOR, *chosen, group.columns, group.scaling)
        else:
            knobs = group.router.top_k, group.router.is_raw, group.scaling
            chosen = ops.expand_routed_behind_(product, outputs, group.lora_B_EOR, group.columns, *knobs)
            self.own_gates(group, *chosen)
        return product[:, :outputs]

    def add(self, y: Tensor, experts: Experts, x_TI: Tensor, gates: Gates) -> Tensor:
        """In place: y is the MLP's own output, which nobody else reads."""
        if not isinstance(experts, BottleneckExperts):
            return super().add(y, experts, x_TI, gates)
        y_TO = y.view_as(x_TI)
        if x_TI.shape[0] <= FEW_TOKENS:
            chosen = experts.down, experts.up, gates.index_TK, gates.weight_TK
            ops.add_chosen_(y_TO, x_TI, *chosen)
        else:
            u_TS = x_TI @ experts.down.flatten(0, 1).T
            ops.add_all_(y_TO, u_TS, experts.up, gates.index_TK[:, None], gates.weight_TK[:, None])
        return y

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
        up_TSRO = self.packed(up_EOR)[gates.index_TK]
        return torch.bmm(h_TSR.flatten(1)[:, None], up_TSRO.flatten(1, 2))[:, 0]

    def pack(self, up_EOR: Tensor) -> Tensor:
        """[E, R, O]: the chosen experts are then one matrix."""
        return up_EOR.transpose(1, 2).contiguous()
