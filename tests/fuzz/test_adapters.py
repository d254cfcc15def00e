"""Saved adapters, with the seals that an enemy can make as well, and folders of PEFT, MixLoRA and MoLA."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

import adafuse
from adafuse.adapters import imports, store
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.published import is_published, load_published
from adafuse.cell import content_hash, file_hash
from synthetic import hostile
from synthetic.checkpoints import tiny_model
from synthetic.configurations import GEOMETRY, compose
from synthetic.loras import lora, pickle

MIXLORA = {
    **{
        "peft_type": "MIXLORA",
        "r": 2,
        "lora_alpha": 4,
        "routing_strategy": "mixlora",
        "num_experts": 2,
        "top_k": 2,
    },
    **{"target_modules": ["gate_proj"], "act_fn": "silu"},
}


def seal(folder: Path) -> None:
    file = folder / store.DESCRIPTION
    if not all(path.is_file() for path in folder.rglob("*") if not path.is_dir()):
        return
    told = json.loads(file.read_text())
    told["sha256"] = {name: file_hash(folder / name) for name in told["sha256"]}
    told.pop("seal", None)
    file.write_text(json.dumps(told | {"seal": content_hash(told)}))


def test_adapters(room: Path) -> None:
    model, config = tiny_model(num_hidden_layers=2), compose(*GEOMETRY, "method=adafuse")
    store.save(Adapter(model, config.method, config.experts, 0), room / "good", "tiny")

    def read(folder: Path) -> None:
        adafuse.load(model, folder, any_base=True).detach()

    hostile.attack("adapters", room / "good", read, room, seal)


def test_peft(room: Path) -> None:
    lora(room / "good/safe")
    pickle(lora(room / "good/old", target_modules=r".*\.(q|v)_proj"))
    shape = tiny_model().config.to_dict()

    def read(folder: Path) -> None:
        for name in ("safe", "old"):
            is_published(folder / name)
            imports.read(imports.inspect(folder / name, shape))

    hostile.attack("peft", room / "good", read, room)


def mixlora(folder: Path) -> None:
    folder.mkdir(parents=True)
    made = {"mixlora.layers.0.mlp.moe_gate.weight": torch.randn(2, 32)}
    for e in range(2):
        made[f"mixlora.layers.0.mlp.gate_proj.experts.{e}.lora_A.weight"] = torch.randn(2, 32)
        made[f"mixlora.layers.0.mlp.gate_proj.experts.{e}.lora_B.weight"] = torch.randn(48, 2)
    save_file(made, folder / imports.WEIGHTS)
    (folder / imports.CONFIG).write_text(json.dumps(MIXLORA))


def mola(folder: Path) -> None:
    lora(folder, r=2)
    held, made = load_file(folder / imports.WEIGHTS), {}
    for name, tensor in held.items():
        if ".layers.0." in name:
            path, _, factor = name.removesuffix(".weight").rpartition(".")
            made |= {f"{path}.{factor}_{e}.weight": tensor.clone() for e in range(2)}
            made[f"{path}.router.weight"] = torch.randn(2, 32)
    save_file(made, folder / imports.WEIGHTS)


def test_published(room: Path) -> None:
    mixlora(room / "good/mixlora")
    mola(room / "good/mola")
    model = tiny_model(num_hidden_layers=1)

    def read(folder: Path) -> None:
        for name in ("mixlora", "mola"):
            is_published(folder / name)
            load_published(model, folder / name, top_k=2)

    read(room / "good")
    hostile.attack("published", room / "good", read, room)
