"""Tiny backbones, and checkpoint folders of them as transformers saves them, whole or damaged on purpose."""

import json
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from adafuse.model.backbone import byte_tokenizer


def tiny_model(model_type: str = "llama", **changes: object) -> object:
    """A seeded random model: 4 blocks, hidden 32, grouped-query attention."""
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        # logits far enough apart that greedy decoding is decided
        "initializer_range": 0.1,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(shape | changes)))
    return model.eval().requires_grad_(False)


def save(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def declare(folder: Path, **changes: Any) -> None:
    """Change fields of config.json; `...` takes one away."""
    edit(folder / "config.json", **changes)


def edit(file: Path, **changes: Any) -> None:
    found = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({key: value for key, value in (found | changes).items() if value is not ...}))


def rename(folder: Path, names: dict[str, str | None]) -> None:
    """Give tensors other names, or take them away; the name "" stands for all, with a prefix."""
    file = folder / "model.safetensors"
    found = load_file(file)
    if "" in names:
        found = {f"{names['']}{name}": value for name, value in found.items()}
    changed = {names.get(name, name): value for name, value in found.items()}
    save_file({name: value for name, value in changed.items() if name}, file, metadata={"format": "pt"})


def change(folder: Path, name: str, to: Any) -> None:
    """Put another tensor, or a number in its first place."""
    file = folder / "model.safetensors"
    found = load_file(file)
    if isinstance(to, float):
        found[name].view(-1)[0] = to
    else:
        found[name] = to
    save_file(found, file, metadata={"format": "pt"})


def shard(folder: Path, count: int = 2) -> list[str]:
    """The one file of weights as several, with their index."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    file.unlink()
    files = [f"model-{number + 1:05}-of-{count:05}.safetensors" for number in range(count)]
    places = {name: files[place * count // len(tensors)] for place, name in enumerate(sorted(tensors))}
    for one in files:
        save_file(
            {name: tensors[name] for name in places if places[name] == one},
            folder / one,
            metadata={"format": "pt"},
        )
    index = {"metadata": {"total_size": 0}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return files


def overwrite_header(file: Path, **changes: Any) -> None:
    """Fields of the first tensor in a header, its data left as they are."""
    data = file.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header = json.loads(data[8 : 8 + length])
    next(one for name, one in header.items() if name != "__metadata__").update(changes)
    text = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text)) + text + data[8 + length :])
