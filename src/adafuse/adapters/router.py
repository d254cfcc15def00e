"""The router: from a token's hidden state to its gates.

In: hidden states [T, I]. Out: `Gates`, the chosen experts and their weights, and the softmax that chose them.
Next: experts.py, which the gates weigh.

Letters: T tokens, E experts, K top-k, I input width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from adafuse.config import Normalisation
from adafuse.distributed import total
from adafuse.kernels import ops

# as in Llama's own norms
NORM_EPS = 1e-6
# behind a router's name: what it chose in a draft
DRAFT = ".draft"


@dataclass
class Gates:
    """Chosen experts `index_TK` (int64), their weights `weight_TK` (fp32), all probabilities `probs_TE` (fp32)."""

    index_TK: Tensor
    weight_TK: Tensor
    probs_TE: Tensor
    # with a null expert: how likely a token is not left to the backbone, 0 to 1; a token that is has weights of zero
    used_T: Tensor | None = None
    # those of the pass whose states this router read, where there was one (previous.py)
    draft: Gates | None = None
    _dense_TE: Tensor | None = None

    def chosen(self) -> Tensor:
        """A copy of the chosen experts, [T, K]; -1 for a token that has none."""
        if self.used_T is None:
            return self.index_TK.clone()
        return torch.where(self.weight_TK.any(-1, keepdim=True), self.index_TK, -1)

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
    With a null expert, the last row of `weight`, a token for which it is the likeliest has no gates at all.
    """

    def __init__(
        self,
        width: int,
        experts: int,
        top_k: int,
        normalisation: Normalisation,
        null_expert: bool = False,
        norm: bool = False,
    ) -> None:
        super().__init__()
        self.null_expert, self.norm = null_expert, norm
        self.weight = nn.Parameter(torch.empty(experts + null_expert, width, dtype=torch.float32))
        self.top_k = min(top_k, experts)
        self.normalisation = normalisation
        # MoLA's initialisation; paper: unstated
        nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))

    def forward(self, x_TI: Tensor) -> Gates:
        if is_fit_in_half(x_TI) and not self.norm:
            (gates,) = routed_together([self], x_TI)
            return _or_none(gates.probs_TE, self.top_k) if self.null_expert else gates
        with torch.autocast(x_TI.device.type, enabled=False):
            logits_TE = self.read(x_TI) @ self.weight.float().T
            probs_TE = torch.softmax(logits_TE, dim=-1)
            if self.null_expert:
                return _or_none(probs_TE, self.top_k)
            if self.normalisation is Normalisation.topk_softmax:
                top_TK, index_TK = torch.topk(logits_TE, self.top_k, dim=-1)
                return Gates(index_TK, torch.softmax(top_TK, dim=-1), probs_TE)
            weight_TK, index_TK = torch.topk(probs_TE, self.top_k, dim=-1)
            if self.normalisation is Normalisation.softmax_topk_renorm:
                weight_TK = weight_TK / weight_TK.sum(-1, keepdim=True)
        return Gates(index_TK, weight_TK, probs_TE)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        """Moved with a model that is moved, and in fp32 still where it is cast."""
        weight = self.weight.data
        super()._apply(fn, recurse)
        if self.weight.dtype in (torch.bfloat16, torch.float16):
            self.weight.data = weight.to(self.weight.device)
        return self

    @property
    def is_raw(self) -> bool:
        """Gates are shares of the whole softmax; the other two normalisations give the same gates."""
        return self.normalisation is Normalisation.softmax_topk_raw

    def read(self, x_TI: Tensor) -> Tensor:
        """What the weights multiply, in fp32: the hidden state as it is, or at a root mean square of 1 (`norm`)."""
        x_TI = x_TI.float()
        return functional.rms_norm(x_TI, x_TI.shape[-1:], eps=NORM_EPS) if self.norm else x_TI


def routed_together(routers: Sequence[Router], x_TI: Tensor) -> list[Gates]:
    """The gates of routers of one shape that read the same x, where `is_fit_in_half`; neither norm nor null expert."""
    weights = [router.weight for router in routers]
    with torch.autocast(x_TI.device.type, enabled=False):
        found = _Fitted.apply(x_TI, routers[0].top_k, routers[0].is_raw, *weights)
    # the gradient of a part of one is no copy
    apart = [one.unbind() if len(routers) > 1 else [one.squeeze(0)] for one in found]
    return [
        Gates(index, weight, probs, _dense_TE=dense)
        for index, weight, probs, dense in zip(*apart, strict=True)
    ]


class _Fitted(torch.autograd.Function):
    """G routers of x in bf16 with all their gates in three launches, and their gradients in three (kernels/gates.py).

    The logits are `x @ W.T` in fp32 without a copy of x in fp32, on tensor cores, which add in fp32: three bf16 hold
    all 24 bits of a weight, so every product is exact, as it is of x in fp32. Gradients are rounded to bf16 where
    autocast rounds all others; that of W is added in fp32. Out: index and weight [G, T, K], probabilities and weight
    [G, T, E].
    """

    @staticmethod
    def forward(ctx: Any, x_TI: Tensor, top_k: int, raw: bool, *weights_EI: Tensor) -> tuple[Tensor, ...]:
        kernels, routers = ops.on(x_TI, "gates"), len(weights_EI)
        weight_SI = torch.cat(weights_EI) if routers > 1 else weights_EI[0]
        thirds_SI = kernels.thirds(weight_SI, x_TI.dtype)
        chosen = kernels.gates(summed_in_float(x_TI, thirds_SI.T), routers, top_k, raw)
        index_GTK, _, probs_GTE, dense_GTE = chosen
        ctx.save_for_backward(x_TI, thirds_SI, index_GTK, probs_GTE, dense_GTE)
        ctx.mark_non_differentiable(index_GTK)
        # most fits use one form of the weights
        ctx.set_materialize_grads(False)
        ctx.raw = raw
        return chosen

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        x_TI, thirds_SI, *chosen = ctx.saved_tensors
        grad_TS = ops.on(x_TI, "gates").gates_backward(*grads[1:], chosen, ctx.raw, x_TI.dtype)
        # the first third is the weights in bf16
        of_x_TI = grad_TS @ thirds_SI[: grad_TS.shape[1]] if ctx.needs_input_grad[0] else None
        return of_x_TI, None, None, *summed_in_float(grad_TS.T, x_TI).chunk(len(chosen[0]))


def summed_in_float(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in fp32 of two matrices in bf16; torch has the product that reads them as they are on a GPU alone."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


def is_fit_in_half(x: Tensor) -> bool:
    """Where a fit may take the faster of two forms: elsewhere it keeps the roundings that it was published with."""
    return torch.is_grad_enabled() and x.is_cuda and x.dtype == torch.bfloat16


def _or_none(probs_TN: Tensor, top_k: int) -> Gates:
    """Gates over the first E of N = E + 1 probabilities: the top k, renormalised, or zero where the last one wins.

    The choice is hard, as it is when decoding; its gradient is that of the soft share (straight through), so that a
    token that was left to the backbone can come back.
    """
    rest_TE, null_T = probs_TN[:, :-1], probs_TN[:, -1]
    top_TK, index_TK = torch.topk(rest_TE, top_k, dim=-1)
    taken_T = top_TK.sum(-1)
    used_T = taken_T / (taken_T + null_T)
    hard_T = (top_TK[:, 0] > null_T).to(probs_TN.dtype)
    if used_T.requires_grad:
        hard_T = hard_T + (used_T - used_T.detach())
    weight_TK = top_TK / taken_T[:, None] * hard_T[:, None]
    return Gates(index_TK, weight_TK, rest_TE / rest_TE.sum(-1, keepdim=True), used_T)


def balance_loss(gates: Gates, keep_T: Tensor) -> Tensor:
    """Switch form `E * sum_e f_e P_e` over the tokens where `keep_T` is true; 1 when balanced, E when collapsed.

    f is the share of choices (no gradient), P the mean probability (gradient). Padding must not count: a router
    would otherwise be balanced on tokens that nobody reads. Nor must a token that no expert has.
    """
    return _balance(_sums(gates, keep_T), gates.index_TK.shape[-1])


def routing_losses(said: list[Gates], keep_T: Tensor) -> tuple[Tensor, Tensor]:
    """Means over routers of the balance loss and of the share of tokens that use experts.

    `keep_T` is true where a token counts. The share is soft, for its gradient; zero without a null expert.
    """
    none = torch.zeros((), device=keep_T.device)
    if not said:
        return none, none
    # a gate per linear is hundreds of routers of some thirty launches; a CPU keeps the roundings of one after the other
    said = stacked(said) if keep_T.is_cuda else said
    # of all processes, whose tokens are one batch: a product of means is no mean of products
    own = [_sums(gates, keep_T) for gates in said]
    split = total(torch.cat([one.flatten() for one in own])).split([one.numel() for one in own])
    sums = [(part.view_as(one), gates) for part, one, gates in zip(split, own, said, strict=True)]
    balance = [_balance(one, gates.index_TK.shape[-1]).reshape(-1) for one, gates in sums]
    used = [(one[..., 2] / one[..., 1]).reshape(-1) for one, gates in sums if gates.used_T is not None]
    return torch.cat(balance).mean(), torch.cat(used).mean() if used else none


def stacked(said: list[Gates]) -> list[Gates]:
    """Gates of one shape as one, with a dimension for the router in front."""
    groups: dict[Any, list[Gates]] = {}
    for gates in said:
        groups.setdefault((gates.index_TK.shape, gates.probs_TE.shape, gates.used_T is None), []).append(
            gates
        )
    return [
        Gates(
            torch.stack([gates.index_TK for gates in group]),
            torch.stack([gates.weight_TK for gates in group]),
            torch.stack([gates.probs_TE for gates in group]),
            None if without else torch.stack([gates.used_T for gates in group if gates.used_T is not None]),
        )
        for (*_, without), group in groups.items()
    ]


def _sums(gates: Gates, keep_T: Tensor) -> Tensor:
    """Over tokens, [..., 3 + 2 E]: those of experts, those that count, their soft use; choices and probabilities of
    each expert.
    """
    probs_TE, used_T = gates.probs_TE, gates.used_T
    with_experts_T = keep_T if used_T is None else keep_T & gates.weight_TK.detach().any(-1)
    kept = with_experts_T.to(probs_TE.dtype)[..., None]
    chosen_TE = torch.zeros_like(probs_TE).scatter(-1, gates.index_TK, 1.0)
    counted = keep_T.to(probs_TE.dtype)
    use = counted if used_T is None else used_T * counted
    counts = [one.sum(-1).expand(probs_TE.shape[:-2]) for one in (kept[..., 0], counted, use)]
    return torch.cat([torch.stack(counts, -1), (chosen_TE * kept).sum(-2), (probs_TE * kept).sum(-2)], -1)


def _balance(sums: Tensor, top_k: int) -> Tensor:
    tokens, (chosen_E, probs_E) = sums[..., :1].clamp(min=1), sums[..., 3:].chunk(2, -1)
    return chosen_E.shape[-1] * (chosen_E / (tokens * top_k) * (probs_E / tokens)).sum(-1)
