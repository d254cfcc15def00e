"""Whether merged weights hold what they should: the clean ones plus the experts of the token that was just decoded.

In: a decoder that is installed and decoding, and the clean weights. Out: `Merged`, the adapted linear whose weight
comes nearest to what rounding allows, or beyond it. Logits alone do not say it: roundings that stay in the weights
widen their bound to more than most of what the experts add. So errors here are shares of what is merged in. Strategy
`peft_merge` is left out: its token ends with taking out what it merged, and nothing is left to look at. Next:
checks.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from adafuse.adapters import reference
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.experts import LoraExperts
from adafuse.adapters.layers import AdaptedLinear
from adafuse.config import StrategyName
from adafuse.engine.decoders import Decoder
from adafuse.refusals import MERGING

# In units of eps / 2, the most that one rounding moves a number: that of a sum in fp32 rounds once for every term, of
# which a switch's 2K experts of rank R have more than a hundred. Roundings are 0.4 of eps / 2 in the mean, so that
# 2,000 of them left 7.4 % of a weight's norm in bf16 and 0.93 % in fp16 (an H200, experiment drift): 0.42 of the bound.
SAFETY = {torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}
# of what is merged, before it meets the weight: the gate, its product with A, B with the scaling, their product
FACTOR_ROUNDINGS = 4
# the checks: after the step that begins with clean weights, and after the last
FIRST, LAST = "merged_first", "merged"
# of what is merged: a check whose bound is wider would let half of a merge go wrong
TELLING = 0.5


@dataclass(frozen=True)
class Merged:
    """||W - (W0 + dW)|| / ||dW|| of one linear, what rounding allows of it, and ||dW|| / ||W0||."""

    error: float
    bound: float
    share: float


def worst(decoder: Decoder, clean: Mapping[int, Tensor], tokens: int) -> Merged | None:
    """Of all adapted linears the one nearest to its bound, after `tokens` decode steps from the weights in `clean` (by
    the parameter's id); None for an arm that merges nothing.
    """
    adapter = decoder.adapter
    if adapter is None or decoder.strategy not in MERGING:
        return None
    # rebase starts from the clean weights every time
    roundings = 1 if decoder.strategy is StrategyName.rebase else tokens
    gates = {id(router): (said.index_TK[0], said.weight_TK[0]) for router, said in decoder.said}
    found = [
        _of(site, clean[id(site.base.weight)], *_gates(adapter, site, gates), roundings)
        for site in adapter.linears()
        if site.experts is not None
    ]
    return nearest(found)


def due(done: int, last: int) -> list[str]:
    """The checks after `done` of `last` decode steps. After one step a single rounding hides little."""
    return [name for name, step in ((FIRST, 1), (LAST, last)) if done == step]


def nearest(found: Sequence[Merged]) -> Merged:
    """To its bound, or furthest beyond it. NaN compares as nothing, and must not be passed over."""
    return max(found, key=lambda one: one.error / one.bound if math.isfinite(one.error) else math.inf)


def detail(merged: Merged, check: str) -> str:
    """What the numbers are in units of, and what they cannot tell."""
    token = "first" if check == FIRST else "last"
    said = f"weights against W0 + dW of the {token} token, worst linear: error relative to the norm of "
    if merged.share == 0:
        return said + "W0, for dW is nothing"
    said += f"dW, which is {merged.share:.2g} of that of W0"
    if merged.bound > TELLING:
        said += f"; rounding may come to {merged.bound:.2g} of dW, so that this says little"
    return said


def _gates(
    adapter: Adapter, site: AdaptedLinear, gates: Mapping[int, tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Experts [K] and their weights [K] in the last token, which all sequences of a merged batch share."""
    if not site.gated:
        where = site.base.weight.device
        return torch.zeros(1, dtype=torch.int64, device=where), torch.ones(1, device=where)
    router = adapter.token_router if site.router is None else site.router
    return gates[id(router)]


def _of(site: AdaptedLinear, clean_OI: Tensor, index_K: Tensor, gate_K: Tensor, roundings: int) -> Merged:
    """A token that is left to the backbone has no dW: errors are then relative to its experts at even gates."""
    weight_OI, base_OI = site.base.weight.detach(), clean_OI.float()
    if site.static is not None:
        # merged once, at installation
        base_OI, roundings = base_OI + reference.delta(site.static, [0], [1.0]), roundings + 1
    experts, weights = index_K.tolist(), gate_K.tolist()
    delta_OI = reference.delta(site.lora, experts, weights)
    error = float((weight_OI.float() - base_OI - delta_OI).norm())
    if not any(weights):
        delta_OI = reference.delta(site.lora, experts, [1 / len(experts)] * len(experts))
    base, delta = float(base_OI.norm()), float(delta_OI.norm())
    # a weight is rounded as large as it was, and tokens before may have had more merged in than the last one
    largest = math.hypot(base, _largest(site.lora))
    rounding = SAFETY[weight_OI.dtype] * torch.finfo(weight_OI.dtype).eps / 2
    if delta == 0:
        # experts that training has not moved: the unit is then the weight itself
        return Merged(error / base, rounding * math.sqrt(roundings) * largest / base, 0.0)
    bound = rounding * (math.sqrt(roundings) * largest / delta + FACTOR_ROUNDINGS)
    return Merged(error / delta, bound, delta / base)


def _largest(lora: LoraExperts) -> float:
    """The norm of the largest expert's s B A, which no selection exceeds: gates add up to one at most."""
    up_EOR, down_ERI = lora.lora_B.detach().float(), lora.lora_A.detach().float()
    # ||B A||^2 is the trace of (B^T B) (A A^T), two small matrices
    squares_E = ((up_EOR.mT @ up_EOR) * (down_ERI @ down_ERI.mT)).sum((1, 2))
    return lora.scaling * float(squares_E.max().clamp(min=0).sqrt())
