"""What an arm costs on paper: parameters, multiply-accumulates, bytes per decoded token, and the floor they imply.

In: a model, an arm's adapter and strategy, the batch and context of the cell. Out: one `cost` line. MACs are counted
while a decode step runs; bytes follow from what a step must touch at least. Next: latency.py.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache

from adafuse.adapters.adapter import Adapter
from adafuse.config import Routing, StrategyName
from adafuse.engine.decode import decode_one_token, decoding, prefill
from adafuse.refusals import MERGING


def cost(
    model: nn.Module, adapter: Adapter | None, strategy: StrategyName, prompt: Tensor, read_gbps: float
) -> dict[str, Any]:
    """Fields of the `cost` line; bytes are per decode step of the whole batch, at least once each."""
    step_bytes = backbone_bytes(model, prompt) + adapter_bytes(adapter, strategy, prompt.shape[0])
    own = sum(p.numel() for p in adapter.parameters()) if adapter else 0
    return {
        "params": sum(p.numel() for p in model.parameters()) + own,
        "macs": count_macs(model, adapter, strategy, prompt[:1]),
        "bytes_per_token": step_bytes / prompt.shape[0],
        "floor_ms": step_bytes / (read_gbps * 1e9) * 1e3 / prompt.shape[0],
        "adapter_params": own,
    }


def count_macs(model: nn.Module, adapter: Adapter | None, strategy: StrategyName, prompt: Tensor) -> int:
    """Multiply-accumulates of one decode step at batch 1, after a step that has settled the merged state."""
    if adapter is not None:
        adapter.install(strategy)
    try:
        cache = DynamicCache()
        token = prefill(model, prompt, None, cache).argmax(-1, keepdim=True)
        with decoding(adapter):
            token = decode_one_token(model, token, None, cache).argmax(-1, keepdim=True)
            with FlopCounterMode(display=False) as counter:
                decode_one_token(model, token, None, cache)
    finally:
        if adapter is not None:
            adapter.remove()
    return int(counter.get_total_flops()) // 2 + _switch_macs(adapter, strategy)


def _switch_macs(adapter: Adapter | None, strategy: StrategyName) -> int:
    """The one launch of kernels/switch.py is no operator that a counter sees; off a GPU it is a product per linear."""
    if adapter is None or strategy not in (StrategyName.switch, StrategyName.rebase):
        return 0
    sites = [site for site in adapter.linears() if site.experts is not None]
    if adapter.method.routing is Routing.none or not sites[0].base.weight.is_cuda:
        return 0
    chosen = adapter.geometry.top_k * (2 if strategy is StrategyName.switch else 1)
    return sum(site.base.weight.numel() * chosen * site.lora.rank for site in sites)


def backbone_bytes(model: nn.Module, prompt: Tensor) -> int:
    """Every weight once (of the input embedding only the rows in use) and the KV cache once."""
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    unread = (
        0 if tied else (embedding.shape[0] - prompt.shape[0]) * embedding.shape[1] * embedding.element_size()
    )
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_row = 2 * config.num_hidden_layers * config.num_key_value_heads * head_dim * embedding.element_size()
    return weights - unread + prompt.numel() * kv_row


def adapter_bytes(adapter: Adapter | None, strategy: StrategyName, batch: int) -> int:
    """Bytes a step adds at least: routers, the experts it reads, and the weight passes of a merge."""
    if adapter is None:
        return 0
    total = sum(r.weight.numel() * r.weight.element_size() for r in adapter.routers().values())
    merging = strategy in MERGING
    if merging and adapter.method.routing is Routing.none:
        return total  # merged once, before the first token
    for site in adapter.sites.values():
        experts = getattr(site, "experts", None)
        if experts is None:
            continue
        each = _bytes(experts) // experts.count
        total += round(experts_read(experts.count, adapter.geometry.top_k, strategy, batch) * each)
        if merging:
            # read and written once more before the base product reads it
            total += 2 * _bytes(site.base)
    return total


def experts_read(count: int, top_k: int, strategy: StrategyName, batch: int) -> float:
    """Of one site; a batch that chooses evenly is expected to touch count * (1 - (1 - k/count)^batch) of them."""
    if strategy in (StrategyName.dense, StrategyName.masked_loop):
        return count
    if strategy in (StrategyName.simple_merge, StrategyName.switch):
        return 2 * top_k  # the old selection too
    return count * (1 - (1 - min(1.0, top_k / count)) ** batch)


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def weights_gib(model: nn.Module, adapter: Adapter | None, strategy: StrategyName) -> float:
    """GiB that this arm alone would hold: backbone, adapter, the factors that its strategy lays out anew, and the
    clean copy that a merge needs to come back."""
    total = _bytes(model)
    if adapter is not None:
        total += sum(p.numel() * p.element_size() for p in adapter.parameters())
        sites = [site for site in adapter.linears() if site.experts is not None]
        if strategy in (StrategyName.dense, StrategyName.gather, StrategyName.fused):
            total += sum(_bytes(site.lora) for site in sites)
            total += sum(p.numel() * p.element_size() for p in adapter.unjoined_up_factors())
        if strategy in MERGING:
            total += sum(_bytes(site.base) for site in sites)
    return total / 2**30


def routing_changes(adapter: Adapter, model: nn.Module, prompt: Tensor, tokens: int) -> dict[str, float]:
    """Share of decode steps whose chosen experts differ from the step before, over all routers."""
    adapter.install(StrategyName.dense)
    try:
        cache = DynamicCache()
        token = prefill(model, prompt, None, cache).argmax(-1, keepdim=True)
        chosen = []
        with decoding(adapter):
            for _ in range(tokens):
                with adapter.collecting() as said:
                    token = decode_one_token(model, token, None, cache).argmax(-1, keepdim=True)
                chosen.append([gates.index_TK.sort(-1).values for _, gates in said])
    finally:
        adapter.remove()
    pairs = [
        not torch.equal(a, b)
        for now, before in zip(chosen[1:], chosen, strict=False)
        for a, b in zip(now, before, strict=True)
    ]
    return {"changed_share": sum(pairs) / max(1, len(pairs)), "routers": float(len(chosen[0]))}
