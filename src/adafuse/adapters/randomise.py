"""Factors for adapters that nobody has trained: where speed alone is measured, experts must do something all the same.

In: a fresh `Adapter`. Out: seeded noise in every parameter that starts at zero. Next: engine/.
"""

from __future__ import annotations

import torch

from adafuse.adapters.adapter import Adapter


def randomise(adapter: Adapter, seed: int, scale: float = 0.02) -> None:
    """Seeded values for factors that start at zero, so that untrained experts do something."""
    generator = torch.Generator(adapter.model.device).manual_seed(seed)
    for parameter in adapter.parameters():
        if not parameter.any():
            noise = torch.randn(parameter.shape, generator=generator, device=parameter.device) * scale
            parameter.data.copy_(noise)
