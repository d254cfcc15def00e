"""Weights that are numbers: one NaN makes every logit one, and the largest of them is then a token like any other.

In: a model, an adapter installed in it or not. Out: nothing, or a ValueError that names the tensor.
Next: training/stage.py and evaluation/stage.py, which ask before and after.
"""

from __future__ import annotations

from itertools import chain

import torch
from torch import nn


@torch.no_grad()
def require_finite(model: nn.Module, cure: str) -> None:
    """Raise ValueError, with the `cure`, for the first parameter or buffer that is not finite throughout.

    The device is waited for once, whatever the number of tensors.
    """
    named = chain(model.named_parameters(), model.named_buffers())
    tensors = {name: tensor for name, tensor in named if tensor.is_floating_point()}
    flags = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    for (name, tensor), finite in zip(tensors.items(), flags, strict=True):
        if not finite:
            count = tensor.numel() - int(tensor.isfinite().sum())
            raise ValueError(f"{name}: {count} of {tensor.numel()} numbers are NaN or infinite: {cure}")
