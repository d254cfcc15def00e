"""What an arm must meet before it is timed; every condition is a line in the record, met or not.

In: a model, an arm's adapter and strategy, prompts [B, S]. Out: `Check`s. The oracle is adapters/reference.py in fp32;
bounds follow from the dtype: n independent roundings of size eps grow as sqrt(n) * eps. Next: rounds.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from adafuse.adapters import reference
from adafuse.adapters.adapter import Adapter, blocks_of
from adafuse.config import StrategyName
from adafuse.engine.decode import decode_one_token, decoding, forward_logits, prefill

# roundings of one block: seven linears, two norms, attention, activation, product, two sums
ROUNDINGS_PER_BLOCK = 14
SAFETY = 8.0
PADDING = 5


@dataclass
class Check:
    """`value` must not exceed `bound`; both in the unit that `detail` names."""

    check: str
    value: float
    bound: float
    passed: bool
    detail: str


def run_checks(
    model: nn.Module, adapter: Adapter | None, strategy: StrategyName, prompt: Tensor, tokens: int
) -> list[Check]:
    """All checks of one arm over a greedy decode of `tokens` tokens; the backbone is left as it was found.

    An arm that refuses to run at all (gates that differ within a merged batch, say) fails the check `runs`.
    """
    clean = [p.detach().clone() for p in model.parameters()]
    oracle = reference.build(model, adapter)
    in_place = strategy in (StrategyName.simple_merge, StrategyName.switch)
    try:
        if adapter is not None:
            adapter.install(strategy)
        ids, steps = _decode(model, adapter, prompt, tokens)
        padded = _decode_padded(model, adapter, prompt, ids)
        whole = forward_logits(model, ids)
    except ValueError as error:
        return [Check("runs", 1.0, 0.0, False, str(error))]
    finally:
        if adapter is not None and adapter.installed:
            adapter.remove()
    want = oracle(ids).float()[:, prompt.shape[1] - 1 : -1]
    bound = _bound(model, want, tokens if in_place else 0)
    got = steps.float()
    return [
        _finite(got),
        _at_most("logits", (got - want).abs().max(), bound, "largest logit error against the fp32 reference"),
        _greedy(got, want, bound, model.dtype),
        _at_most(
            "cached",
            (got - whole[:, prompt.shape[1] - 1 : -1].float()).abs().max(),
            2 * bound,
            "step by step with a cache against the whole sequence without",
        ),
        _at_most(
            "padding", (padded - got[:, : padded.shape[1]]).abs().max(), 2 * bound, "left padding against none"
        ),
        _restored(model, clean),
    ]


def _decode(model: nn.Module, adapter: Adapter | None, prompt: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """Greedy ids [B, S + tokens] and the logits [B, tokens, V] that chose them."""
    cache, ids, steps = DynamicCache(), prompt, []
    logits = prefill(model, prompt, None, cache)
    with decoding(adapter):
        for step in range(tokens):
            steps.append(logits)
            token = logits.argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
            if step + 1 < tokens:
                logits = decode_one_token(model, token, None, cache)
    return ids, torch.stack(steps, dim=1)


def _decode_padded(model: nn.Module, adapter: Adapter | None, prompt: Tensor, ids: Tensor) -> Tensor:
    """Logits [B, 4, V] of the same continuation behind a left-padded prompt."""
    pad = torch.zeros_like(prompt[:, :PADDING])
    mask = torch.cat([pad, torch.ones_like(prompt)], dim=1)
    cache = DynamicCache()
    steps = [prefill(model, torch.cat([pad, prompt], dim=1), mask, cache)]
    with decoding(adapter):
        for step in range(3):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            token = ids[:, prompt.shape[1] + step, None]
            steps.append(decode_one_token(model, token, mask, cache))
    return torch.stack(steps, dim=1).float()


def _bound(model: nn.Module, want: Tensor, in_place_tokens: int) -> float:
    """Largest logit times eps times the root of the roundings; an in-place merge rounds each weight once a token."""
    blocks = len(blocks_of(model))
    roundings = blocks * (ROUNDINGS_PER_BLOCK + 7 * in_place_tokens)
    return SAFETY * math.sqrt(roundings) * torch.finfo(model.dtype).eps * max(1.0, float(want.abs().max()))


def _at_most(name: str, value: Tensor, bound: float, detail: str) -> Check:
    measured = float(value)
    return Check(name, measured, bound, measured <= bound, detail)


def _finite(got: Tensor) -> Check:
    odd = int((~torch.isfinite(got)).sum())
    return Check("finite", float(odd), 0.0, odd == 0, "logits that are NaN or infinite")


def _greedy(got: Tensor, want: Tensor, bound: float, dtype: torch.dtype) -> Check:
    """The same token at every step; below fp32 a step whose two best reference logits are a tie may differ."""
    best = want.topk(2, dim=-1)
    differs = got.argmax(-1) != best.indices[..., 0]
    if dtype is not torch.float32:
        differs &= best.values[..., 0] - best.values[..., 1] > 2 * bound
    count = int(differs.sum())
    return Check("greedy", float(count), 0.0, count == 0, f"of {got.shape[0] * got.shape[1]} greedy tokens, different")


def _restored(model: nn.Module, clean: list[Tensor]) -> Check:
    changed = sum(not torch.equal(now, before) for now, before in zip(model.parameters(), clean, strict=True))
    return Check("restored", float(changed), 0.0, changed == 0, "weights that are not bit-identical afterwards")
