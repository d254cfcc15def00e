"""Weights and logits that are numbers: among NaNs the largest logit is a token like any other, and has a score.

In: a model, an adapter installed in it or not; logits. Out: nothing or a ValueError that names the tensor; which
positions have no use. Next: training/ and evaluation/, which ask before, between and after.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from adafuse.distributed import own_part


@torch.no_grad()
def require_finite(model: nn.Module, cure: str) -> None:
    """Raise ValueError, with the `cure`, for the first parameter or buffer that is not finite throughout.

    The device is waited for once, whatever the number of tensors.
    """
    named = chain(model.named_parameters(), model.named_buffers())
    tensors = {name: own_part(tensor) for name, tensor in named if tensor.is_floating_point()}
    flags = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    for (name, tensor), finite in zip(tensors.items(), flags, strict=True):
        if not finite:
            count = tensor.numel() - int(tensor.isfinite().sum())
            raise ValueError(f"{name}: {count} of {tensor.numel()} numbers are NaN or infinite: {cure}")


def useless(logits: Tensor) -> Tensor:
    """Which positions [...] of logits [..., V] tell nothing: one is not finite, or all are the same.

    They are when activations overflow before the last norm, which divides by infinity; then every logit is zero.
    """
    spread = logits.amax(-1) - logits.amin(-1)
    return ~((spread > 0) & (spread < torch.inf))
