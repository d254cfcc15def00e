"""What the arms of a cell work on: its prompts, and an adapter for each of their methods.

In: a `Config` and the backbone. Out: ids [B, S], of text where routers are trained; and adapters by the method's name,
ready to be installed. Next: latency.py, memory.py and trace.py, which measure the same thing.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle
from random import Random

import torch
from torch import Tensor, nn

from adafuse import cell
from adafuse.adapters import gate_table, store
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.config import Config, Method
from adafuse.data import items
from adafuse.model import backbone

# far apart, so that queries of neighbouring seeds are others
QUERY_SEEDS = 7919


def prompts(config: Config, model: nn.Module, where: str) -> Tensor:
    """Ids [batch, context], a different row for each sequence: those of the first query."""
    return prompter(config, model, where)(0)


def prompter(config: Config, model: nn.Module, where: str) -> Callable[[int], Tensor]:
    """The ids [batch, context] of a query, by its number.

    Trained routers choose by what they read, so theirs is the text of test items, answered but for the last, each row
    in an order of its own and cut at its beginning. Else ids are seeded; the first four are often special.
    """
    if config.latency.trained_adapters:
        return _texts(config, where)

    def seeded(query: int) -> Tensor:
        generator = torch.Generator().manual_seed(config.seed + QUERY_SEEDS * query)
        vocabulary = model.config.vocab_size
        return torch.randint(4, vocabulary, (config.batch, config.context), generator=generator).to(where)

    return seeded


def _texts(config: Config, where: str) -> Callable[[int], Tensor]:
    tokenizer = backbone.tokenizer_of(config.model, cell.pretrained_dir(config))
    folder = items.write(config.data, cell.data_dir(config), config.seed)
    families = items.families_of(config.data)
    asked = [item for family in families for item in items.load_items(folder, family, "test")]

    def encoded(text: str) -> list[int]:
        ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def stretch(query: int, row: int) -> list[int]:
        order = Random(f"{config.seed} {query} {row}").sample(asked, len(asked))
        ids, answered = encoded(order[0].prompt), cycle(order[1:] or order)
        while len(ids) < config.context:
            item = next(answered)
            ids = encoded(f"{item.prompt}{item.answer}\n") + ids
        return ids[-config.context :]

    return lambda query: torch.tensor([stretch(query, row) for row in range(config.batch)], device=where)


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
