"""What the arms of a cell work on: its prompts, and an adapter for each of their methods.

In: a `Config` and the backbone. Out: ids [B, S], of text where routers are trained; and adapters by the method's name,
ready to be installed. Next: latency.py, memory.py and trace.py, which measure the same thing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import chain, cycle
from random import Random

import torch
from torch import Tensor, nn

from adafuse import cell
from adafuse.adapters import gate_table, imports, store
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.config import Config, Method
from adafuse.data import items, rows
from adafuse.model import backbone

# far apart, so that queries of neighbouring seeds are others
QUERY_SEEDS = 7919


def prompts(config: Config, model: nn.Module, where: str) -> Tensor:
    """Ids [batch, context], a different row for each sequence: those of the first query."""
    return prompter(config, model, where)(0)


def prompter(config: Config, model: nn.Module, where: str) -> Callable[[int], Tensor]:
    """The ids [batch, context] of a query, by its number.

    Trained routers choose by what they read, so theirs is the text of test items, answered but for the last, each row
    in an order of its own. The texts of `latency.prompts` are read one by one. Both are cut at their beginning, and
    what is too short has others before it. Else ids are seeded; the first four are often special.
    """
    if config.latency.prompts is not None:
        return _prompted(config, where)
    if config.latency.trained_adapters:
        return _texts(config, where)

    def seeded(query: int) -> Tensor:
        generator = torch.Generator().manual_seed(config.seed + QUERY_SEEDS * query)
        vocabulary = model.config.vocab_size
        return torch.randint(4, vocabulary, (config.batch, config.context), generator=generator).to(where)

    return seeded


def _texts(config: Config, where: str) -> Callable[[int], Tensor]:
    folder = items.write(config.data, cell.data_dir(config), config.seed)
    families = items.families_of(config.data)
    asked = [item for family in families for item in items.load_items(folder, family, "test")]

    def texts(query: int, row: int) -> Iterator[str]:
        first, *rest = Random(f"{config.seed} {query} {row}").sample(asked, len(asked))
        return chain([first.prompt], (f"{item.prompt}{item.answer}\n" for item in cycle(rest or [first])))

    return _stretches(config, where, texts)


def _prompted(config: Config, where: str) -> Callable[[int], Tensor]:
    """Query q and row r of a batch of B read prompt q B + r, in the file's order and around."""
    asked = rows.prompts(str(config.latency.prompts))

    def texts(query: int, row: int) -> Iterator[str]:
        at = (query * config.batch + row) % len(asked)
        return chain([asked[at]], (f"{text}\n" for text in cycle(asked[at - 1 :: -1] + asked[: at - 1 : -1])))

    return _stretches(config, where, texts)


def _stretches(
    config: Config, where: str, texts: Callable[[int, int], Iterator[str]]
) -> Callable[[int], Tensor]:
    """Ids of a query: of each row its first text, and as many of the next before it as fill the context."""
    tokenizer = backbone.tokenizer_of(config.model, cell.pretrained_dir(config))

    def stretch(query: int, row: int) -> list[int]:
        ids: list[int] = []
        for text in texts(query, row):
            ids = tokenizer(text, add_special_tokens=False)["input_ids"] + ids
            if len(ids) >= config.context:
                return ids[-config.context :]
        raise AssertionError("endless")

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
    """Trained, or with the factors of LoRA folders, or seeded random ones."""
    adapter = Adapter(model, method, config.experts, config.seed)
    if config.latency.trained_adapters:
        return store.load(adapter, cell.adapter_dir(config, method))
    if adapter.experts_frozen:
        imports.load_own(adapter)
    else:
        randomise(adapter, config.seed)
    return adapter
