"""What an arm costs on paper: parameters, multiply-accumulates, bytes per decoded token, and the floor they imply.

In: a model, an arm's adapter and strategy, the batch and context of the cell. Out: one `cost` line. MACs are counted
while a decode step runs; bytes follow from what a step must touch at least. Next: latency.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from adafuse.adapters import gate_table
from adafuse.adapters.adapter import Adapter
from adafuse.config import GateSource, Routing, Runtime, StrategyName
from adafuse.engine.make import make
from adafuse.kernels.ops import Shape
from adafuse.model.llama import window_of_each_block
from adafuse.refusals import MERGING

# How often a merged token reads and writes each adapted weight at least, beside the product that reads it: PEFT puts
# its experts in and takes them out again (and passes more often: once per expert, and over each product by itself).
WEIGHT_PASSES = dict.fromkeys(MERGING, 1) | {StrategyName.peft_merge: 2}
# the ones that do nothing for a token that is left to the backbone, as the one before it was
SKIP = (StrategyName.switch, StrategyName.rebase)


def cost(
    model: nn.Module,
    adapter: Adapter | None,
    strategy: StrategyName,
    prompt: Tensor,
    read_gbps: float,
    seen: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """Fields of the `cost` line; bytes are per decode step of the whole batch, at least once each. `seen` is what
    routing.py saw of the experts in use.
    """
    step_bytes = backbone_bytes(model, prompt) + adapter_bytes(adapter, strategy, prompt.shape[0], seen)
    own = sum(p.numel() for p in adapter.parameters()) if adapter else 0
    return {
        "params": sum(p.numel() for p in model.parameters()) + own,
        "macs": count_macs(model, adapter, strategy, prompt[:1]),
        "bytes_per_token": step_bytes / prompt.shape[0],
        "floor_ms": step_bytes / (read_gbps * 1e9) * 1e3 / prompt.shape[0],
        "adapter_params": own,
    }


def count_macs(model: nn.Module, adapter: Adapter | None, strategy: StrategyName, prompt: Tensor) -> int:
    """Multiply-accumulates of one decode step at batch 1, after a step that has settled the merged state.

    Of PEFT's merge and unmerge the products count, as they do in every merge; its sums are no multiplications.
    """
    decoder = make(model, adapter, strategy, Runtime.eager, prompt.shape[1] + 2)
    with _using_experts(adapter), decoder.installed():
        token = decoder.start(prompt).argmax(-1, keepdim=True)
        with decoder.decoding():
            token = decoder.step(token).argmax(-1, keepdim=True)
            with FlopCounterMode(display=False, custom_mapping=UNCOUNTED) as counter:
                decoder.step(token)
    return int(counter.get_total_flops()) // 2 + _switch_macs(adapter, strategy)


@contextmanager
def _using_experts(adapter: Adapter | None) -> Iterator[None]:
    """The counted token has experts, though router or table may leave it to the backbone."""
    if adapter is None or adapter.token_router is None:
        yield
        return
    own, where = adapter.context.gate_table, str(adapter.model.device)
    adapter.context.gate_table = gate_table.make(GateSource.same, adapter.geometry, 1, 0, where)
    try:
        yield
    finally:
        adapter.context.gate_table = own


def _addmm_flops(total: Shape, left: Shape, right: Shape, *_: Any, **__: Any) -> int:
    return 2 * left[0] * left[1] * right[1]


def _attention_flops(query: Shape, key: Shape, value: Shape, *_: Any, **__: Any) -> int:
    """Scores and their product with the values, of every query head: grouped heads share keys, not work."""
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[-2] * (width + value[-1])


# torch counts `addmm`, but not its form in place, which is how merges and `dense` add; its own count of attention stops
# at grouped heads up to version 2.11
UNCOUNTED = {
    torch.ops.aten.addmm_: _addmm_flops,
    torch.ops.aten._scaled_dot_product_efficient_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention: _attention_flops,
    torch.ops.aten._scaled_dot_product_cudnn_attention: _attention_flops,
}


def _switch_macs(adapter: Adapter | None, strategy: StrategyName) -> int:
    """The one launch of kernels/switch.py is no operator that a counter sees; off a GPU it is a product per linear."""
    if adapter is None or strategy not in (StrategyName.switch, StrategyName.rebase):
        return 0
    sites = list(adapter.adapted().values())
    if adapter.method.routing is Routing.none or not sites[0].base.weight.is_cuda:
        return 0
    chosen = adapter.geometry.top_k * (2 if strategy is StrategyName.switch else 1)
    return sum(site.base.weight.numel() * chosen * site.lora.rank for site in sites)


def backbone_bytes(model: nn.Module, prompt: Tensor) -> int:
    """Every weight once (of the input embedding only the rows in use), and what each block sees of the KV cache."""
    embedding = model.get_input_embeddings().weight
    tied = model.get_output_embeddings().weight is embedding
    unread = 0 if tied else embedding[prompt.shape[0] :].nbytes
    config = model.config
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    batch, length = prompt.shape
    slots = sum(min(length, window or length) for window in window_of_each_block(config))
    slot_bytes = 2 * config.num_key_value_heads * head_dim * embedding.element_size()
    return _bytes(model.parameters()) - unread + batch * slots * slot_bytes


def adapter_bytes(
    adapter: Adapter | None, strategy: StrategyName, batch: int, seen: Mapping[str, float] | None = None
) -> int:
    """Bytes a step adds at least: routers, the experts it reads, and the weight passes of a merge."""
    if adapter is None:
        return 0
    seen = seen or {}
    total = _bytes(router.weight for router in adapter.routers().values())
    passes = WEIGHT_PASSES.get(strategy, 0) * (seen.get("merged_share", 1.0) if strategy in SKIP else 1.0)
    if strategy in WEIGHT_PASSES and adapter.method.routing is Routing.none:
        return total  # merged once, before the first token
    for site in adapter.sites.values():
        experts = getattr(site, "experts", None)
        if experts is None:
            continue
        each = _bytes(experts.parameters()) // experts.count
        read = experts_read(experts.count, adapter.geometry.top_k, strategy, batch, seen)
        total += round(read * each)
        if passes:
            total += round(passes * 2 * _bytes(site.base.parameters()))
    return total


def experts_read(
    count: int, top_k: int, strategy: StrategyName, batch: int, seen: Mapping[str, float] | None = None
) -> float:
    """Of one site: the share that was seen, or that a batch touches which chooses evenly, 1 - (1 - k/count)^batch."""
    seen = seen or {}
    if strategy in (StrategyName.dense, StrategyName.masked_loop):
        return count
    if strategy in (StrategyName.simple_merge, StrategyName.switch, StrategyName.peft_merge):
        # once to go in, once to come out
        return 2 * top_k * (seen.get("used_share", 1.0) if strategy in SKIP else 1.0)
    even = 1 - (1 - min(1.0, top_k / count)) ** batch
    return count * seen.get("touched_share", even)


def weights_gib(model: nn.Module, adapter: Adapter | None, strategy: StrategyName) -> float:
    """GiB that this arm alone would hold: backbone, adapter (PEFT's modules share its factors), the factors that its
    strategy lays out anew, and the clean copy that rebase reads; copies that only put weights back do not count."""
    total = _bytes(model.parameters())
    if adapter is not None:
        total += _bytes(adapter.parameters())
        sites = list(adapter.adapted().values())
        if strategy in (StrategyName.dense, StrategyName.gather, StrategyName.fused):
            total += sum(_bytes(site.lora.parameters()) for site in sites)
            total += _bytes(adapter.unjoined_up_factors())
        if strategy is StrategyName.rebase and adapter.method.routing is not Routing.none:
            total += sum(_bytes(site.base.parameters()) for site in sites)
    return total / 2**30


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
