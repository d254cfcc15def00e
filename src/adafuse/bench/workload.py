"""What the arms of a cell work on: its prompts, and an adapter for each of their methods.

In: a `Config` and the backbone. Out: ids [B, S], and adapters by the method's name, ready to be installed. Next:
latency.py, memory.py and trace.py, which measure the same thing.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from adafuse import cell
from adafuse.adapters import gate_table, store
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.config import Config, Method

# far apart, so that queries of neighbouring seeds are others
QUERY_SEEDS = 7919


def prompts(config: Config, model: nn.Module, where: str, query: int = 0) -> Tensor:
    """Seeded ids [batch, context], a different row for each sequence; the first four ids are often special."""
    generator = torch.Generator().manual_seed(config.seed + QUERY_SEEDS * query)
    vocabulary = model.config.vocab_size
    return torch.randint(4, vocabulary, (config.batch, config.context), generator=generator).to(where)


def adapters(config: Config, model: nn.Module) -> dict[str, Adapter]:
    """One adapter per method in use, with the table of gates that its blocks read; `base` has none."""
    dtype = next(model.parameters()).dtype
    found = {}
    for name, method in cell.methods_of_arms(config).items():
        if not method.has_experts:
            continue
        adapter = adapter_of(config, model, method)
        if adapter.token_router is not None:
            adapter.context.gate_table = gate_table.make(
                config.latency.gates,
                config.experts,
                config.batch,
                config.seed,
                str(adapter.model.device),
                config.latency.bypass_share,
            )
        found[name] = adapter.to_dtype(dtype)
    return found


def adapter_of(config: Config, model: nn.Module, method: Method) -> Adapter:
    """Trained, or with seeded random factors."""
    adapter = Adapter(model, method, config.experts, config.seed)
    if config.latency.trained_adapters:
        return store.load(adapter, cell.adapter_dir(config, method))
    randomise(adapter, config.seed)
    return adapter
