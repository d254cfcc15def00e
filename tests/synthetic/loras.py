"""PEFT LoRA folders as people bring them, on the tiny backbone: made by PEFT, then damaged on purpose."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from synthetic.checkpoints import edit, tiny_model

WEIGHTS = "adapter_model.safetensors"
QV = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]}


def lora(folder: Path, seed: int = 0, **changes: Any) -> Path:
    """A folder that PEFT has saved, with factors that do something."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(), LoraConfig(**QV | changes))
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    model.save_pretrained(str(folder))
    return folder


def logits(folder: Path, ids: Tensor) -> Tensor:
    """What PEFT gives with the folder on the tiny backbone."""
    from peft import PeftModel

    with torch.no_grad():
        return PeftModel.from_pretrained(tiny_model(), str(folder)).eval()(ids).logits


def declare(folder: Path, **changes: Any) -> None:
    edit(folder / "adapter_config.json", **changes)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Other tensors in the place of those that are there."""
    save_file(change(load_file(folder / WEIGHTS)), folder / WEIGHTS, metadata={"format": "pt"})


def spell(folder: Path, change: Callable[[str], str]) -> None:
    """The same tensors under other names."""
    rewrite(folder, lambda found: {change(name): one for name, one in found.items()})


def pickle(folder: Path, **beside: Any) -> None:
    """As older versions of PEFT saved it."""
    torch.save(load_file(folder / WEIGHTS) | beside, folder / "adapter_model.bin")
    (folder / WEIGHTS).unlink()
