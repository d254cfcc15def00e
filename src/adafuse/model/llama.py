"""Where a Llama-family model keeps its blocks, linears and MLPs.

In: a causal LM of transformers. Out: its blocks, and module paths. Next: projections.py.
"""

from __future__ import annotations

from torch import nn

from adafuse.config import LINEARS


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
