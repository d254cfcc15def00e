"""Adapters that do something without training, and what they are asked: shared by the tests of every strategy."""

import torch

from adafuse.adapters.adapter import Adapter, randomise
from adafuse.adapters.router import Gates
from adafuse.config import Config


def prompt(rows: int = 1, length: int = 12) -> torch.Tensor:
    return torch.randint(4, 260, (rows, length), generator=torch.Generator().manual_seed(3))


def adapted(model, config: Config) -> Adapter:
    adapter = Adapter(model, config.method, config.experts, seed=0)
    randomise(adapter, seed=1, scale=0.3)
    return adapter


def one_selection(seed: int) -> Gates:
    """Two distinct experts of four, with any gates that sum to one."""
    generator = torch.Generator().manual_seed(seed)
    index = torch.randperm(4, generator=generator)[None, :2]
    weight = torch.rand(1, 2, generator=generator)
    return Gates(index, weight / weight.sum(), torch.full((1, 4), 0.25))


def only_expert(adapter: Adapter, chosen: int) -> None:
    """Make every expert a copy of one: whatever the gates, their sum is one, so the mixture is that expert."""
    for lora in adapter.loras().values():
        lora.lora_A.data.copy_(lora.lora_A.data[chosen].expand_as(lora.lora_A).clone())
        lora.lora_B.data.copy_(lora.lora_B.data[chosen].expand_as(lora.lora_B).clone())
