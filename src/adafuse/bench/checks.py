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
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.paths import blocks_of
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


@dataclass
class Pass:
    """One way through an arm: logits [B, n, V] at the decoded positions, and each router's choices [B, S, K]."""

    logits: Tensor
    choices: dict[str, Tensor]


def run_checks(
    model: nn.Module, adapter: Adapter | None, strategy: StrategyName, prompt: Tensor, tokens: int
) -> list[Check]:
    """All checks of one arm over a greedy decode of `tokens` tokens; the backbone is left as it was found.

    Each way through the arm is held against the reference on that way's own choices of experts, and those choices
    against the reference's. An arm that refuses to run (gates that differ within a merged batch, say) fails `runs`.
    """
    clean = [p.detach().clone() for p in model.parameters()]
    oracle = reference.Reference(model, adapter)
    in_place = strategy in (StrategyName.simple_merge, StrategyName.switch)
    try:
        if adapter is not None:
            adapter.install(strategy)
        ids, stepwise = _decode(model, adapter, prompt, tokens)
        whole = _whole(model, adapter, prompt, ids)
        padded = _decode_padded(model, adapter, prompt, ids)
    except ValueError as error:
        return [Check("runs", 1.0, 0.0, False, str(error))]
    finally:
        if adapter is not None and adapter.installed:
            adapter.remove()
    ways = {
        "logits": (stepwise, "step by step with a cache: largest logit error against the fp32 reference"),
        "whole": (
            whole,
            "the whole sequence without a cache: largest logit error against the fp32 reference",
        ),
        "padding": (padded, "behind left padding: largest logit error against the fp32 reference without it"),
    }
    checks = [_finite(stepwise.logits)]
    for name, (way, detail) in ways.items():
        length = prompt.shape[1] + way.logits.shape[1] - 1
        want = oracle(ids[:, :length], way.choices)[:, prompt.shape[1] - 1 :]
        roundings = _roundings(model, tokens if in_place else 0)
        bound = roundings * max(1.0, float(want.abs().max()))
        checks.append(_at_most(name, float((way.logits - want).abs().max()), bound, detail))
        if name == "logits":
            checks.append(_greedy(stepwise.logits, want, bound, model.dtype))
        if way.choices:
            missed = "router logits by which the worst choice misses the reference's top-k"
            checks.append(
                _at_most(f"routing_{name}", oracle.regret, roundings * max(1.0, oracle.router_scale), missed)
            )
    return [*checks, _restored(model, clean)]


class _Watch:
    """Collects what every router chose, forward by forward."""

    def __init__(self, adapter: Adapter | None, rows: int) -> None:
        self.adapter, self.rows = adapter, rows
        self._chosen: dict[str, list[Tensor]] = {}

    def __enter__(self) -> _Watch:
        if self.adapter is not None:
            self.adapter.context.collect, self.adapter.context.said = True, []
        return self

    def __exit__(self, *error: object) -> None:
        if self.adapter is not None:
            self.adapter.context.collect, self.adapter.context.said = False, []

    def step(self) -> None:
        """Call after every forward."""
        if self.adapter is None:
            return
        names = {id(router): name for name, router in self.adapter.routers().items()}
        for router, gates in self.adapter.context.said:
            index_BSK = gates.index_TK.view(self.rows, -1, gates.index_TK.shape[-1])
            self._chosen.setdefault(names[id(router)], []).append(index_BSK)
        self.adapter.context.said = []

    def choices(self, skip: int = 0) -> dict[str, Tensor]:
        return {name: torch.cat(parts, dim=1)[:, skip:] for name, parts in self._chosen.items()}


def _decode(model: nn.Module, adapter: Adapter | None, prompt: Tensor, tokens: int) -> tuple[Tensor, Pass]:
    """Greedy ids [B, S + tokens], and the way that chose them."""
    cache, ids, steps = DynamicCache(), prompt, []
    with _Watch(adapter, len(prompt)) as watch:
        logits = prefill(model, prompt, None, cache)
        watch.step()
        with decoding(adapter):
            for step in range(tokens):
                steps.append(logits)
                token = logits.argmax(-1, keepdim=True)
                ids = torch.cat([ids, token], dim=1)
                if step + 1 < tokens:
                    logits = decode_one_token(model, token, None, cache)
                    watch.step()
        return ids, Pass(torch.stack(steps, dim=1).float(), watch.choices())


def _whole(model: nn.Module, adapter: Adapter | None, prompt: Tensor, ids: Tensor) -> Pass:
    with _Watch(adapter, len(prompt)) as watch:
        logits = forward_logits(model, ids[:, :-1])
        watch.step()
        return Pass(logits[:, prompt.shape[1] - 1 :].float(), watch.choices())


def _decode_padded(model: nn.Module, adapter: Adapter | None, prompt: Tensor, ids: Tensor) -> Pass:
    """The first four decoded positions behind a left-padded prompt."""
    pad = torch.zeros_like(prompt[:, :1]).expand(-1, PADDING)
    mask = torch.cat([pad, torch.ones_like(prompt)], dim=1)
    cache = DynamicCache()
    with _Watch(adapter, len(prompt)) as watch:
        steps = [prefill(model, torch.cat([pad, prompt], dim=1), mask, cache)]
        watch.step()
        with decoding(adapter):
            for step in range(3):
                mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
                token = ids[:, prompt.shape[1] + step, None]
                steps.append(decode_one_token(model, token, mask, cache))
                watch.step()
        return Pass(torch.stack(steps, dim=1).float(), watch.choices(skip=PADDING))


def _roundings(model: nn.Module, in_place_tokens: int) -> float:
    """Relative error allowed: eps times the root of the roundings; merging in place rounds a weight once a token."""
    per_block = ROUNDINGS_PER_BLOCK + 7 * in_place_tokens
    return SAFETY * math.sqrt(len(blocks_of(model)) * per_block) * torch.finfo(model.dtype).eps


def _at_most(name: str, value: float, bound: float, detail: str) -> Check:
    return Check(name, value, bound, value <= bound, detail)


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
    return Check(
        "greedy", float(count), 0.0, count == 0, f"of {got.shape[0] * got.shape[1]} greedy tokens, different"
    )


def _restored(model: nn.Module, clean: list[Tensor]) -> Check:
    changed = sum(not torch.equal(now, before) for now, before in zip(model.parameters(), clean, strict=True))
    return Check(
        "restored", float(changed), 0.0, changed == 0, "weights that are not bit-identical afterwards"
    )
