"""How the gated experts reach the output: the protocol of a strategy, and the unmerged form that needs none.

In: an adapted linear, or experts; hidden states [T, I] and gates. Out: [T, O]. `UnmergedDense` is what training and
prefill use for every method, linear by linear, because with many tokens all experts are touched anyway.
Letters as in experts.py. Next: layers.py, which calls a strategy, and strategies/, which build on what is here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from adafuse.adapters.experts import Experts, LoraExperts
from adafuse.adapters.router import Gates, is_fit_in_half, summed_in_float
from adafuse.model.projections import Joint

if TYPE_CHECKING:
    from adafuse.adapters.adapter import Adapter
    from adafuse.adapters.layers import AdaptedLinear


class Strategy(Protocol):
    """How a decode step applies the gated experts. It holds state (packed factors, clean weights) of one adapter.

    A strategy that has nothing to do when it enters, decides or restores says nothing of it.
    """

    # it writes experts into the weights: one selection at a time
    merging: bool = False
    # it writes all of them before the first adapted linear runs, so the plain backbone does the rest
    ahead: bool = False
    # a router is one launch (kernels/route.py), as everything else here; the published loops call torch step by step
    routes_at_once: bool = True
    # prompts go through it too, not through `UnmergedDense`
    takes_prompts: bool = False
    # `prepare` was called; what it laid out keeps its addresses
    prepared: bool = False
    # run instead of the linears that they cover, while decoding
    joints: Sequence[Joint] = ()

    def prepare(self, adapter: Adapter) -> None:
        """Once, on clean weights with static LoRA merged: lay out factors, keep copies."""

    def enter(self) -> None:
        """Each time the adapter goes into the model."""
        return

    def decide(self, gates: Gates) -> None:
        """The gates [T, K] that all layers share are known, before the first adapted linear runs."""
        return

    def linear(self, site: AdaptedLinear, x_TI: Tensor, gates: Gates) -> Tensor:
        """The output [T, O] of an adapted linear, experts included."""

    def add(self, y: Tensor, experts: Experts, x_TI: Tensor, gates: Gates) -> Tensor:
        """y plus the experts' sum, in y's shape; may write into y."""

    def mix(self, experts: Experts, x_TI: Tensor, gates: Gates, *mlp: nn.Module) -> Tensor:
        """The experts' weighted sum [T, O]; `mlp` is the frozen MLP of MixLoRA's."""

    def restore(self) -> None:
        """The weights as `prepare` found them, bit for bit."""
        return


class Unmerged(Strategy):
    """Base product plus the experts' sum; nothing to decide, nothing to restore. Subclasses say how to `mix`."""

    def prepare(self, adapter: Adapter) -> None:
        self.prepared = True

    def linear(self, site: AdaptedLinear, x_TI: Tensor, gates: Gates) -> Tensor:
        return site.base(x_TI) + self.mix(site.lora, site.drop(x_TI), gates)

    def add(self, y: Tensor, experts: Experts, x_TI: Tensor, gates: Gates) -> Tensor:
        return y + self.mix(experts, x_TI, gates).view_as(y)


class UnmergedDense(Unmerged):
    """All experts in one product under a mask of gates: a slot per expert (`experts.SlotOps`)."""

    def __init__(self) -> None:
        self._packed: dict[int, Tensor] = {}

    def prepare(self, adapter: Adapter) -> None:
        """Lay out up factors for decoding: done per token it would copy all experts each time."""
        self._packed = {id(up_EOR): self.pack(up_EOR.detach()) for up_EOR in adapter.unjoined_up_factors()}
        super().prepare(adapter)

    def mix(self, experts: Experts, x_TI: Tensor, gates: Gates, *mlp: nn.Module) -> Tensor:
        return experts.slots(self, x_TI, gates, *mlp)

    def linear(self, site: AdaptedLinear, x_TI: Tensor, gates: Gates) -> Tensor:
        if not (site.training and is_fit_in_half(x_TI)):
            return super().linear(site, x_TI, gates)
        return fitted(site.base(x_TI), x_TI, site.lora, gates, site.dropout)

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
        return h_TSR.flatten(1) @ self.packed(up_EOR)

    def pack(self, up_EOR: Tensor) -> Tensor:
        """[E * R, O]: the up factors of all experts as one matrix."""
        return up_EOR.transpose(1, 2).flatten(0, 1)

    def packed(self, up_EOR: Tensor) -> Tensor:
        found = self._packed.get(id(up_EOR))
        return self.pack(up_EOR) if found is None else found


def fitted(y_TO: Tensor, x_TI: Tensor, lora: LoraExperts, gates: Gates, dropout: float) -> Tensor:
    """y + the gated sum of experts of x after dropout, in y's memory: the form of a fit in bf16 on a GPU."""
    factors = lora.lora_A, lora.lora_B, gates.dense(), lora.scaling
    sum_TO: Tensor = _Fitted.apply(y_TO, x_TI, *factors, dropout)
    return sum_TO


class _Fitted(torch.autograd.Function):
    """One node of autograd's graph where torch's operators would be some fifteen.

    With recomputation the host builds them twice and walks them once, and what each keeps passes through the hooks of
    checkpointing every time: of hundreds of linears that takes longer than a GPU their arithmetic. One product reads y
    and writes the sum, rounded once. Factors are rounded to the type of x, their gradients are added in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        y_TO: Tensor,
        x_TI: Tensor,
        down_ERI: Tensor,
        up_EOR: Tensor,
        gates_TE: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        mask_TI = None
        if dropout:
            x_TI, mask_TI = torch.native_dropout(x_TI, dropout, True)
        down_CI = down_ERI.flatten(0, 1).to(x_TI.dtype)
        # rounded and laid out in one launch
        up_ERO = up_EOR.transpose(1, 2).to(x_TI.dtype, memory_format=torch.contiguous_format)
        h_TER = (x_TI @ down_CI.T).unflatten(1, down_ERI.shape[:2])
        weight_TE1 = (gates_TE * scaling).to(x_TI.dtype)[..., None]
        ctx.save_for_backward(x_TI, mask_TI, h_TER, weight_TE1, down_CI, up_ERO)
        ctx.mark_dirty(y_TO)
        ctx.scaling, ctx.kept = scaling, 1 - dropout
        return y_TO.addmm_((h_TER * weight_TE1).flatten(1), up_ERO.flatten(0, 1))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_TI, mask_TI, h_TER, weight_TE1, down_CI, up_ERO = ctx.saved_tensors
        _, needs_x, needs_down, needs_up, needs_gates, *_ = ctx.needs_input_grad
        of_x_TI = of_down_ERI = of_up_EOR = of_gates_TE = None
        of_gated_TER = (grads[0] @ up_ERO.flatten(0, 1).T).view_as(h_TER)
        of_h_TC = (of_gated_TER * weight_TE1).flatten(1)
        if needs_x:
            of_x_TI = of_h_TC @ down_CI
            if mask_TI is not None:
                of_x_TI = torch.ops.aten.native_dropout_backward(of_x_TI, mask_TI, 1 / ctx.kept)
        if needs_down:
            of_down_ERI = summed_in_float(of_h_TC.T, x_TI).unflatten(0, h_TER.shape[1:])
        if needs_up:
            of_up_CO = summed_in_float((h_TER * weight_TE1).flatten(1).T, grads[0])
            of_up_EOR = of_up_CO.view_as(up_ERO).transpose(1, 2)
        if needs_gates:
            of_gates_TE = (of_gated_TER * h_TER).sum(-1, dtype=torch.float32) * ctx.scaling
        return grads[0], of_x_TI, of_down_ERI, of_up_EOR, of_gates_TE, None, None


class UnmergedChosen(UnmergedDense):
    """A slot per chosen expert, where slots are as wide as the MLP; products are still those of all experts at once.

    Ranks are picked before they are expanded, and laid out among zeros for it: two products of [E * R] instead of
    tensors [T, E, O], whose passes over memory are most of a step that trains MixLoRA. What no token has chosen is zero
    in both forms, and so is its gradient.
    """

    def weights(self, gates: Gates) -> Tensor:
        return gates.weight_TK

    def shrink(self, x_TI: Tensor, down_ERI: Tensor, gates: Gates) -> Tensor:
        return super().shrink(x_TI, down_ERI, gates).gather(1, _picks(gates, down_ERI.shape[1]))

    def shrink_each(self, x_TSI: Tensor, down_ERI: Tensor, gates: Gates) -> Tensor:
        count, rank, _ = down_ERI.shape
        h_TSER = (x_TSI @ down_ERI.flatten(0, 1).T).unflatten(-1, (count, rank))
        return h_TSER.gather(2, _picks(gates, rank)[:, :, None]).squeeze(2)

    def expand_each(self, h_TSR: Tensor, up_EOR: Tensor, gates: Gates) -> Tensor:
        count, rank = up_EOR.shape[0], up_EOR.shape[2]
        apart_TSER = h_TSR.new_zeros(*h_TSR.shape[:2], count, rank)
        apart_TSER = apart_TSER.scatter(2, _picks(gates, rank)[:, :, None], h_TSR[:, :, None])
        return apart_TSER.flatten(2) @ self.packed(up_EOR)

    def expand_sum(self, h_TSR: Tensor, up_EOR: Tensor, gates: Gates) -> Tensor:
        count, rank = up_EOR.shape[0], up_EOR.shape[2]
        apart_TER = h_TSR.new_zeros(len(h_TSR), count, rank).scatter(1, _picks(gates, rank), h_TSR)
        return super().expand_sum(apart_TER, up_EOR, gates)


def _picks(gates: Gates, rank: int) -> Tensor:
    """[T, K, R]: the chosen expert, for each of its ranks."""
    return gates.index_TK[..., None].expand(-1, -1, rank)
