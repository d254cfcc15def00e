"""What an arm must meet before it is timed; every condition is a line in the record, met or not.

In: an arm's decoder, prompts [B, S]. Out: `Checked`. The oracle is adapters/reference.py in fp32. Errors are relative
and in the mean (root mean square over all logits); bounds follow from the dtype: n independent roundings grow as
sqrt(n).

Weights that experts were merged into are looked at by themselves: they should be the clean ones plus the experts of the
token that was just decoded. Logits alone do not say it: roundings that stay in the weights widen their bound to more
than most of what the experts add. So these errors are shares of what is merged in. Strategy `peft_merge` is left out:
its token ends with taking out what it merged, and nothing is left to look at. Next: rounds.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from adafuse.adapters import reference
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.experts import LoraExperts
from adafuse.adapters.layers import AdaptedLinear
from adafuse.adapters.router import DRAFT
from adafuse.config import StrategyName
from adafuse.engine.decode import forward_logits
from adafuse.engine.decoders import Decoder
from adafuse.model.clean import clean_copy
from adafuse.model.llama import blocks_of
from adafuse.refusals import MERGING

# roundings of one block: seven linears, two norms, attention, activation, product, two sums
ROUNDINGS_PER_BLOCK = 14
# One rounding is at most eps / 2 of what it rounds, and blocks amplify what came before. Below fp32 sums are taken in
# fp32: plain bf16 backbones of 32 blocks come out at 0.08 (hidden size 256) to 0.42 eps sqrt(n) (Llama-2-7B's shape, on
# an H200), a selection left in the weights by mistake at 6. In fp32 every addition rounds. Of merged weights the unit
# is eps / 2: a sum in fp32 rounds once for every term, of which a switch's 2K experts have more than a hundred, and
# roundings are 0.4 of eps / 2 in the mean, so that 2,000 of them left 7.4 % of a weight's norm in bf16 and 0.93 % in
# fp16 (an H200, experiment drift): 0.42 of the bound.
SAFETY = {torch.float32: 8.0, torch.bfloat16: 1.0, torch.float16: 1.0}
# How far the two best reference logits must lie apart for a step to be decided, in multiples of the arm's own mean
# error of a logit. The difference of two logits has sqrt(2) of that error, so 6 are 4.2 of its own: no false alarm in
# 60,000 simulated steps of 32,000 normal logits, nor where errors are 1.3 times their mean, as after many merges in
# place. The error is measured, because its bound would leave all but 1 % of such steps undecided (measured, 13 % are
# decided). That excuses no failure: the logits check bounds it, and a wrong position hardly moves a mean over all.
WORST = 6.0
# the ways through an arm, and what the error of each is of
WAYS = {
    "logits": "step by step with a cache: relative error of the logits against the fp32 reference",
    "whole": "the whole sequence without a cache: relative error against the fp32 reference",
    "padding": "behind left padding: relative error against the fp32 reference without it",
}
MISSED = "router logits by which the worst choice misses the reference's top-k"
PADDING = 5
# sequences of a batch that the reference computes: 32 of them would take it longer than all the timing
REFERENCE_ROWS = 4
# what rounds the weights once more with every token
IN_PLACE = (StrategyName.simple_merge, StrategyName.switch, StrategyName.peft_merge)
# of what is merged, before it meets the weight: the gate, its product with A, B with the scaling, their product
FACTOR_ROUNDINGS = 4
# the checks: after the step that begins with clean weights, and after the last
FIRST, LAST = "merged_first", "merged"
# of what is merged: a check whose bound is wider would let half of a merge go wrong
TELLING = 0.5


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


@dataclass
class Checked:
    """What an arm met, and what its routers chose for the N tokens that it decoded: [B, N, K] by name, -1 for none."""

    checks: list[Check]
    choices: dict[str, Tensor]

    @property
    def passed(self) -> bool:
        return all(check.passed for check in self.checks)


@dataclass(frozen=True)
class Merged:
    """||W - (W0 + dW)|| / ||dW|| of one linear, what rounding allows of it, and ||dW|| / ||W0||."""

    error: float
    bound: float
    share: float


def run_checks(decoder: Decoder, float_model: nn.Module, prompt: Tensor, tokens: int) -> Checked:
    """All checks of one arm over a greedy decode of `tokens` tokens; the backbone is left as it was found.

    `decoder` is the one that will be timed, `float_model` the backbone in fp32 (reference.float_view), made while the
    model was plain; of a large batch it computes a few sequences, first and last among them. Each way through the arm
    is held against the reference on that way's own choices of experts, and those choices against the reference's. An
    arm that refuses to run (gates that differ within a merged batch, say) fails `runs`.
    """
    model, adapter = decoder.model, decoder.adapter
    # by the parameter's id
    clean = {id(p): clean_copy(p) for p in model.parameters()}
    in_place = decoder.strategy in IN_PLACE
    try:
        with decoder.installed(), decoder.watching():
            ids, stepwise, weights = _decode(decoder, prompt, tokens, clean)
            whole = _whole(model, adapter, prompt, ids)
            padded = _decode_padded(decoder, prompt, ids)
    except ValueError as error:
        return Checked([Check("runs", 1.0, 0.0, False, str(error)), _restored(model, clean)], {})
    # before the reference runs, which reads the same weights
    restored = _restored(model, clean)
    rows, first = _rows(prompt), prompt.shape[1] - 1
    # a copy, or it would hold all positions
    plain = reference.Reference(float_model, None)(ids[rows, :-1])[:, first:].clone() if adapter else None
    oracle = reference.Reference(float_model, adapter)
    forced = adapter is not None and adapter.context.gate_table is not None
    checks = [_finite(stepwise.logits)]
    for (name, detail), way in zip(WAYS.items(), (stepwise, whole, padded), strict=True):
        length = prompt.shape[1] + way.logits.shape[1] - 1
        chosen = {router: index[rows] for router, index in way.choices.items()}
        together = None if name == "whole" else prompt.shape[1]
        got, want = way.logits[rows], oracle(ids[rows, :length], chosen, together)[:, first:]
        bound = _bound(model, tokens if in_place else 0)
        apart, spread = float((got - want).norm() / want.norm()), float(want.square().mean().sqrt())
        if name == "logits" and plain is not None:
            detail += _effect(float((want - plain).norm() / want.norm()), bound)
        checks.append(_at_most(name, apart, bound, detail))
        if name == "logits":
            checks.append(_greedy(got, want, WORST * min(apart, bound) * spread, model.dtype))
        # a table of gates does not follow the router; the whole sequence is routed all the same
        if way.choices and (name == "whole" or not forced):
            allowed = bound * max(1.0, oracle.router_scale)
            by = f", by {oracle.missed_by}" if oracle.missed_by else ""
            checks.append(_at_most(f"routing_{name}", oracle.regret, allowed, f"{MISSED}{by}"))
    oracle.close()
    for name, own in weights.items():
        checks.append(_at_most(name, own.error, own.bound, _detail(own, name)))
    taken = {name: index for name, index in stepwise.choices.items() if not name.endswith(DRAFT)}
    decoded = {router: index[:, prompt.shape[1] :] for router, index in taken.items()}
    return Checked([*checks, restored], decoded)


def _rows(prompt: Tensor) -> Tensor:
    """At most REFERENCE_ROWS sequences of the batch, as far apart as can be."""
    count = len(prompt)
    places = torch.linspace(0, count - 1, min(count, REFERENCE_ROWS), device=prompt.device)
    return places.round().long()


def _decode(
    decoder: Decoder, prompt: Tensor, tokens: int, clean: dict[int, Tensor]
) -> tuple[Tensor, Pass, dict[str, Merged]]:
    """Greedy ids [B, S + tokens], the way that chose them, and what the first and the last step left merged, if
    anything: the first starts from clean weights, so that no rounding hides it.
    """
    ids, steps = prompt, [decoder.start(prompt)]
    choices, weights = [decoder.choices()], {}
    # after one step a single rounding hides little
    looked_at = {FIRST: 1, LAST: tokens - 1}
    with decoder.decoding():
        for done in range(1, tokens):
            token = steps[-1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, token], dim=1)
            steps.append(decoder.step(token))
            choices.append(decoder.choices())
            for name, step in looked_at.items():
                if done == step and (found := worst(decoder, clean, done)):
                    weights[name] = found
    ids = torch.cat([ids, steps[-1].argmax(-1, keepdim=True)], dim=1)
    return ids, Pass(torch.stack(steps, dim=1).float(), _side_by_side(choices)), weights


def _whole(model: nn.Module, adapter: Adapter | None, prompt: Tensor, ids: Tensor) -> Pass:
    if adapter is None:
        return Pass(forward_logits(model, ids[:, :-1])[:, prompt.shape[1] - 1 :].float(), {})
    with adapter.collecting() as said:
        logits = forward_logits(model, ids[:, :-1])
    return Pass(logits[:, prompt.shape[1] - 1 :].float(), adapter.by_name(said, len(prompt)))


def _decode_padded(decoder: Decoder, prompt: Tensor, ids: Tensor) -> Pass:
    """The first four decoded positions behind a left-padded prompt."""
    pad = torch.zeros_like(prompt[:, :1]).expand(-1, PADDING)
    mask = torch.cat([pad, torch.ones_like(prompt)], dim=1)
    steps = [decoder.start(torch.cat([pad, prompt], dim=1), mask)]
    choices = [decoder.choices()]
    with decoder.decoding():
        for step in range(3):
            steps.append(decoder.step(ids[:, prompt.shape[1] + step, None]))
            choices.append(decoder.choices())
    chosen = {name: index[:, PADDING:] for name, index in _side_by_side(choices).items()}
    return Pass(torch.stack(steps, dim=1).float(), chosen)


def _side_by_side(choices: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The choices of a prompt and of the steps behind it as one [B, S, K] by router; drafts are the prompt's alone."""
    routers = choices[-1]
    return choices[0] | {name: torch.cat([forward[name] for forward in choices], dim=1) for name in routers}


def _bound(model: nn.Module, in_place_tokens: int) -> float:
    """Relative error allowed; merging in place rounds the weight of each of seven linears once a token."""
    roundings = len(blocks_of(model)) * (ROUNDINGS_PER_BLOCK + 7 * in_place_tokens)
    return SAFETY[model.dtype] * math.sqrt(roundings) * torch.finfo(model.dtype).eps


def _at_most(name: str, value: float, bound: float, detail: str) -> Check:
    return Check(name, value, bound, value <= bound, detail)


def _effect(effect: float, bound: float) -> str:
    """The bound beside what it is there to see, in the same unit."""
    said = f"; what the adapter itself moves the reference by is {effect:.2g}"
    return said if effect > bound else f"{said}, so that the backbone without it would pass as well"


def _finite(got: Tensor) -> Check:
    return _at_most("finite", float((~torch.isfinite(got)).sum()), 0.0, "logits that are NaN or infinite")


def _greedy(got: Tensor, want: Tensor, tie: float, dtype: torch.dtype) -> Check:
    """The same token at every step that the reference decides; below fp32 its two best logits must lie further apart
    than `tie`. Random weights leave most steps undecided, so how many were not is said.
    """
    best = want.topk(2, dim=-1)
    gap = best.values[..., 0] - best.values[..., 1]
    decided = torch.ones_like(gap, dtype=torch.bool) if dtype is torch.float32 else gap > tie
    different = decided & (got.argmax(-1) != best.indices[..., 0])
    said = f"of {gap.numel()} greedy tokens {int(decided.sum())} could be decided; of those, different"
    return _at_most("greedy", float(different.sum()), 0.0, said)


def _restored(model: nn.Module, clean: dict[int, Tensor]) -> Check:
    """Whatever was not is put right, so that one arm's mistake is not another's."""
    changed = [now for now in model.parameters() if not torch.equal(now, clean[id(now)])]
    for now in changed:
        now.data.copy_(clean[id(now)])
    return _at_most("restored", float(len(changed)), 0.0, "weights that are not bit-identical afterwards")


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
        _of(site, clean[id(site.base.weight)], *_gates(site, gates), roundings)
        for site in adapter.adapted().values()
    ]
    return nearest(found)


def nearest(found: Sequence[Merged]) -> Merged:
    """To its bound, or furthest beyond it. NaN compares as nothing, and must not be passed over."""
    return max(found, key=lambda one: one.error / one.bound if math.isfinite(one.error) else math.inf)


def _detail(merged: Merged, check: str) -> str:
    """What the numbers are in units of, and what they cannot tell."""
    token = "first" if check == FIRST else "last"
    said = f"weights against W0 + dW of the {token} token, worst linear: error relative to the norm of "
    if merged.share == 0:
        return said + "W0, for dW is nothing"
    said += f"dW, which is {merged.share:.2g} of that of W0"
    if merged.bound > TELLING:
        said += f"; rounding may come to {merged.bound:.2g} of dW, so that this says little"
    return said


def _gates(site: AdaptedLinear, gates: Mapping[int, tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Experts [K] and their weights [K] in the last token, which all sequences of a merged batch share."""
    if not site.gated:
        where = site.base.weight.device
        return torch.zeros(1, dtype=torch.int64, device=where), torch.ones(1, device=where)
    router = site.decided_by if site.router is None else site.router
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
