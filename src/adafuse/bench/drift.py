"""What merging token after token does to the weights and to the logits, beside what never drifts.

In: a `Config`, the backbone, a record to write to. Out: a `drift` line per strategy and number of switches. `switch`
adds and subtracts in place and rounds every time, `rebase` starts from clean weights, `switch_refresh` is `switch` with
the clean weights copied back every `drift.refresh_every` switches. All go through the same selections of experts; at
every measured number of switches it is the same one, so that only the way there differs. On a GPU the strategies are
launches of kernels/switch.py, on a CPU a product per linear that rounds the gated factors too. Next: report/drift.py.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm import tqdm

from adafuse import strategies
from adafuse.adapters import reference
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.router import Gates
from adafuse.bench.workload import adapter_of, prompts
from adafuse.config import Config, StrategyName
from adafuse.engine.decode import forward_logits
from adafuse.records import Recorder

STRATEGIES = {
    "switch": StrategyName.switch,
    "rebase": StrategyName.rebase,
    "switch_refresh": StrategyName.switch,
}


@dataclass
class Exact:
    """What the probe selection should give, in fp32: a few weights, their norms, and the logits [B, S, V]."""

    weights: dict[str, Tensor]
    weight_norm: float
    delta_norm: float
    delta_share: float
    logits: Tensor


@torch.no_grad()
def run(config: Config, model: nn.Module, where: str, record: Recorder) -> None:
    """Measure all strategies and write their lines; `where` is the device. `model` is cast and left clean."""
    dtype = getattr(torch, config.drift.dtype.name)
    for parameter in model.parameters():
        # not model.to(dtype), which would round the rotary frequencies as well
        parameter.data = parameter.data.to(dtype)
    # trained or random, `delta_share` says how large what is merged is
    adapter = adapter_of(config, model, config.method).to_dtype(dtype)
    probe = next(_selections(config, where))
    ids = prompts(dataclasses.replace(config, batch=config.drift.prompts), model, where)
    exact = _exact(model, adapter, probe, ids)
    points = config.drift.switches
    with tqdm(total=points[-1] * len(STRATEGIES), desc="switches", unit="switch") as progress:
        for name in STRATEGIES:
            # the strategies write into the weights of the plain backbone: nothing has to be installed for that
            for count, identical in _switched(config, name, adapter, probe, where, progress):
                fields = {"strategy": name, "dtype": config.drift.dtype.name, "switches": count}
                fields |= {"identical": identical, "delta_share": exact.delta_share}
                record.write("drift", **fields, **_measure(model, adapter, exact, ids))


def _switched(
    config: Config, name: str, adapter: Adapter, probe: Gates, where: str, progress: tqdm
) -> Iterator[tuple[int, bool]]:
    """Switch on; at every measured count stop with the probe in the weights, and say whether every adapted weight is
    bit for bit what one switch from clean weights makes it. The weights are clean again at the end.
    """
    strategy, points = strategies.make(STRATEGIES[name]), config.drift.switches
    strategy.prepare(adapter)
    strategy.decide(probe)
    once = [site.base.weight.clone() for site in adapter.adapted().values()]
    strategy.restore()
    others = _selections(config, where)
    next(others)  # the probe
    for count in range(1, points[-1] + 1):
        # due before this switch: a refresh is then measured when it is oldest
        if name == "switch_refresh" and (count - 1) % config.drift.refresh_every == 0:
            strategy.restore()
        strategy.decide(probe if count in points else next(others))
        progress.update()
        if count in points:
            weights = (site.base.weight for site in adapter.adapted().values())
            yield count, all(torch.equal(now, first) for now, first in zip(weights, once, strict=True))
    strategy.restore()


def _selections(config: Config, where: str) -> Iterator[Gates]:
    """Seeded selections of one token, the probe first: distinct experts, weights a softmax of random logits."""
    generator = torch.Generator().manual_seed(config.seed + 1000 * config.replicate)
    count, top_k = config.experts.count, config.experts.top_k
    while True:
        index_TK = torch.randperm(count, generator=generator)[None, :top_k].to(where)
        weight_TK = torch.softmax(torch.randn(1, top_k, generator=generator), dim=-1).to(where)
        probs_TE = torch.zeros(1, count, device=where).scatter(-1, index_TK, weight_TK)
        yield Gates(index_TK, weight_TK, probs_TE)


def _exact(model: nn.Module, adapter: Adapter, probe: Gates, ids: Tensor) -> Exact:
    """The clean weights with the probe merged once, all in fp32, and a fp32 forward through them."""
    oracle, watched = copy.deepcopy(model).float(), _watched(adapter)
    kept, clean_norm, delta_norm = {}, 0.0, 0.0
    for path, site in adapter.adapted().items():
        chosen = probe.index_TK[0].tolist(), probe.weight_TK[0].tolist()
        weight, delta = oracle.get_submodule(path).weight, reference.delta(site.lora, *chosen)
        if path in watched:
            clean_norm += float(weight.norm()) ** 2
            delta_norm += float(delta.norm()) ** 2
            kept[path] = weight + delta
        weight.add_(delta)
    weight_norm = sum(float(weight.norm()) ** 2 for weight in kept.values())
    logits = forward_logits(oracle, ids)
    share = (delta_norm / clean_norm) ** 0.5
    return Exact(kept, weight_norm**0.5, delta_norm**0.5, share, logits)


def _measure(model: nn.Module, adapter: Adapter, exact: Exact, ids: Tensor) -> dict[str, float]:
    """How far the weights and the logits are from what they should be; `logit_error` has the rounding of a forward in
    this dtype in it, which is all that rebase shows.
    """
    sites = adapter.adapted()
    squares = sum(
        float((sites[path].base.weight.float() - weight).norm()) ** 2
        for path, weight in exact.weights.items()
    )
    logits = forward_logits(model, ids).float()
    agrees = logits.argmax(-1) == exact.logits.argmax(-1)
    return {
        "weight_error": squares**0.5 / exact.weight_norm,
        "delta_error": squares**0.5 / exact.delta_norm,
        "logit_error": float((logits - exact.logits).abs().max() / exact.logits.abs().max()),
        "agreement": float(agrees.float().mean()),
    }


def _watched(adapter: Adapter) -> list[str]:
    """The adapted linears of the first, the middle and the last block that has any."""
    paths = list(adapter.adapted())
    blocks = list(dict.fromkeys(path.split(".")[2] for path in paths))
    chosen = {blocks[0], blocks[len(blocks) // 2], blocks[-1]}
    return [path for path in paths if path.split(".")[2] in chosen]
