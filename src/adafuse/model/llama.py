"""Where a Llama-family model keeps its blocks, linears and MLPs, and how far each block sees.

In: a causal LM of transformers. Out: its blocks, module paths, windows. Next: projections.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from transformers import PreTrainedConfig

from adafuse.config import LINEARS

# families whose blocks may differ in what they attend to
KINDS_OF_BLOCKS = ("qwen2", "qwen3")


def blocks_of(model: nn.Module) -> nn.ModuleList:
    """The transformer blocks. Raises ValueError for a model that is not built like Llama."""
    try:
        blocks = model.get_submodule("model.layers")
        for name in LINEARS:
            model.get_submodule(linear_path(0, name))
    except AttributeError as error:
        raise ValueError(
            f"{type(model).__name__} is not built like Llama ({error}): use a Llama, Mistral, Qwen2 or Qwen3 checkpoint"
        ) from None
    return blocks


def linear_path(block: int, name: str) -> str:
    """`name` is one of `LINEARS`."""
    part = "self_attn" if name in LINEARS[:4] else "mlp"
    return f"model.layers.{block}.{part}.{name}"


def mlp_path(block: int) -> str:
    return f"model.layers.{block}.mlp"


def windows(config: PreTrainedConfig) -> dict[str, int | None]:
    """By kind of block, how many tokens it attends to, the current one included; None: all of them.

    The kinds are those by which the model takes masks. Mistral and Llama have one, and take a mask without its name.
    """
    if config.model_type not in KINDS_OF_BLOCKS:
        return {"": config.sliding_window if config.model_type == "mistral" else None}
    own = {"full_attention": None, "sliding_attention": config.sliding_window}
    return {kind: own[kind] for kind in dict.fromkeys(config.layer_types)}


def window_of_each_block(config: PreTrainedConfig) -> list[int | None]:
    """`windows`, block by block."""
    kinds = config.layer_types if config.model_type in KINDS_OF_BLOCKS else [""] * config.num_hidden_layers
    return [windows(config)[kind] for kind in kinds]


@contextmanager
def frozen_frequencies(model: nn.Module) -> Iterator[None]:
    """RoPE as the last forward left it, without asking whether the length calls for other frequencies: to ask is to
    wait for the device, and check_cell refuses lengths at which the answer would change.
    """
    rotary = model.get_submodule("model.rotary_emb")
    kind = rotary.rope_type
    rotary.rope_type = "default"
    try:
        yield
    finally:
        rotary.rope_type = kind
