"""An adapter on disk: each expert a PEFT LoRA folder that PEFT loads unaided, beside the routers.

`expert_00/ expert_01/ ...` and `static/` are PEFT folders; `router.safetensors` holds the routers by the path they
serve (`token.weight` for token routing), `bottleneck.safetensors` PESC's serial adapters, `router_config.json` the
method, the geometry and a sha256 of each file. In: an `Adapter`, a folder. Out: the same numbers, bit for bit.
Next: training/stage.py, which saves, evaluation/stage.py and bench/, which load.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from adafuse.adapters.adapter import Adapter
from adafuse.adapters.experts import BottleneckExperts, LoraExperts, MlpLoraExperts
from adafuse.cell import as_plain, file_hash
from adafuse.config import LINEARS

FORMAT_VERSION = 1
# the folder of ordinary LoRA beside the experts
STATIC = "static"
_PREFIX = "base_model.model."
Factors = dict[str, tuple[Tensor, Tensor]]  # path -> lora_A [r, in], lora_B [out, r]


def save(adapter: Adapter, folder: Path, base_name: str) -> None:
    """Write the adapter; `base_name` is the hub id or folder of the backbone, kept for the reader."""
    folder.mkdir(parents=True, exist_ok=True)
    loras, static = _loras(adapter), _statics(adapter)
    names = [expert_name(e) for e in range(_most(loras))]
    for e, name in enumerate(names):
        chosen = {p: (x.lora_A[e], x.lora_B[e]) for p, x in loras.items() if e < x.count}
        _write_peft(folder / name, chosen, next(iter(loras.values())).alpha, base_name)
    if static:
        names.append(STATIC)
        factors = {p: (x.lora_A[0], x.lora_B[0]) for p, x in static.items()}
        _write_peft(folder / STATIC, factors, adapter.method.static_alpha, base_name)
    files = [f"{name}/adapter_model.safetensors" for name in names]
    for file, tensors in _other_files(adapter).items():
        save_file({k: _stored(t) for k, t in tensors.items()}, folder / file)
        files.append(file)
    description = {
        "format_version": FORMAT_VERSION,
        "method": as_plain(adapter.method),
        "experts": as_plain(adapter.geometry),
        "folders": names,
        "base_model": base_name,
        "sha256": {file: file_hash(folder / file) for file in files},
    }
    (folder / "router_config.json").write_text(json.dumps(description, indent=2) + "\n")


def load(adapter: Adapter, folder: Path) -> Adapter:
    """Read `folder` into an adapter of the same method and geometry. Raises ValueError, one line, if they differ."""
    description = describe(folder)
    for key, ours in (("method", adapter.method), ("experts", adapter.geometry)):
        if description[key] != as_plain(ours):
            raise ValueError(f"{folder} was saved with another {key}: train again, or set the saved values")
    for file, digest in description["sha256"].items():
        if not (folder / file).is_file() or file_hash(folder / file) != digest:
            raise ValueError(
                f"{folder / file} is missing or was changed after saving: delete {folder} and train again"
            )
    load_experts(adapter, [folder / name for name in description["folders"] if name != STATIC])
    if STATIC in description["folders"]:
        _fill(_statics(adapter), 0, folder / STATIC)
    for file, tensors in _other_files(adapter).items():
        stored = load_file(folder / file)
        for key, parameter in tensors.items():
            parameter.data.copy_(stored[key])
    return adapter


def describe(folder: Path) -> dict[str, Any]:
    """The saved `router_config.json`. Raises ValueError if `folder` is no adapter of this project."""
    file = folder / "router_config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no router_config.json: it is not a saved adapter")
    description: dict[str, Any] = json.loads(file.read_text())
    if description.get("format_version") != FORMAT_VERSION:
        raise ValueError(
            f"{file} has format {description.get('format_version')}, this code reads {FORMAT_VERSION}"
        )
    return description


def load_experts(adapter: Adapter, folders: list[Path]) -> None:
    """Let PEFT LoRA folders, ours or anybody's, be experts 0, 1, ...; same modules, rank and scaling needed."""
    loras = _loras(adapter)
    if len(folders) != _most(loras):
        raise ValueError(
            f"{len(folders)} LoRA folders for {_most(loras)} experts: set experts.count={len(folders)}"
        )
    for e, folder in enumerate(folders):
        _fill({path: lora for path, lora in loras.items() if e < lora.count}, e, folder)


def expert_name(e: int) -> str:
    """Zero-padded, on disk and in memory: PEFT's filters take `expert_1` and `expert_10` for one another."""
    return f"expert_{e:02d}"


def read_peft(folder: Path) -> tuple[Factors, float]:
    """Factors by module path, and the scaling, of a PEFT LoRA folder. Raises ValueError, one line."""
    # PEFT takes seconds to import: who trains nothing and loads nothing does without
    from peft import LoraConfig
    from peft.utils.save_and_load import load_peft_weights

    if not (folder / "adapter_config.json").is_file():
        raise ValueError(f"{folder} has no adapter_config.json: it is not a PEFT LoRA folder")
    config = LoraConfig.from_pretrained(str(folder))
    if config.rank_pattern or config.alpha_pattern or config.use_dora or config.bias != "none":
        raise ValueError(f"{folder} uses rank_pattern, alpha_pattern, DoRA or bias; experts are plain LoRA")
    weights = load_peft_weights(str(folder), device="cpu")
    found: Factors = {}
    for key in weights:
        if key.endswith(".lora_A.weight"):
            path = key.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
            found[path] = (weights[key], weights[key.replace("lora_A", "lora_B")])
    if len(weights) != 2 * len(found):
        raise ValueError(f"{folder} holds tensors that are not LoRA factors; experts are plain LoRA")
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    return found, scaling


def _fill(loras: dict[str, LoraExperts], e: int, folder: Path) -> None:
    found, scaling = read_peft(folder)
    if set(found) != set(loras):
        odd = sorted(set(found) ^ set(loras))[0]
        raise ValueError(f"{folder} and the expert geometry adapt different modules (first: {odd})")
    for path, lora in loras.items():
        lora_A, lora_B = found[path]
        if lora_A.shape != lora.lora_A[e].shape or lora_B.shape != lora.lora_B[e].shape:
            raise ValueError(f"{folder}: {path} has rank {lora_A.shape[0]}, the expert geometry {lora.rank}")
        if abs(scaling - lora.scaling) > 1e-6:
            raise ValueError(
                f"{folder} has scaling {scaling:g}, the expert geometry {lora.scaling:g}: set experts.alpha"
            )
        lora.lora_A.data[e].copy_(lora_A)
        lora.lora_B.data[e].copy_(lora_B)


def _write_peft(folder: Path, factors: Factors, alpha: float, base_name: str) -> None:
    from peft import LoraConfig  # heavy

    rank = next(iter(factors.values()))[0].shape[0]
    config = LoraConfig(
        r=rank,
        lora_alpha=int(alpha) if float(alpha).is_integer() else alpha,
        lora_dropout=0.0,
        target_modules=sorted(factors),
        bias="none",
        task_type="CAUSAL_LM",
        base_model_name_or_path=base_name,
        inference_mode=True,
    )
    config.save_pretrained(str(folder))
    tensors = {}
    for path, (lora_A, lora_B) in factors.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = _stored(lora_A)
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = _stored(lora_B)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _stored(tensor: Tensor) -> Tensor:
    """Apart from its parameter: files hold no views."""
    return tensor.detach().cpu().contiguous().clone()


def _loras(adapter: Adapter) -> dict[str, LoraExperts]:
    """Every stacked LoRA by the path of the linear it adapts."""
    found = {}
    for path, site in adapter.sites.items():
        if isinstance(site.experts, LoraExperts):
            found[path] = site.experts
        elif isinstance(site.experts, MlpLoraExperts):
            found |= {f"{path}.{name}": getattr(site.experts, name) for name in LINEARS[4:]}
    return found


def _statics(adapter: Adapter) -> dict[str, LoraExperts]:
    return {path: site.static for path, site in adapter.sites.items() if site.static is not None}


def _most(loras: dict[str, LoraExperts]) -> int:
    """Experts of the linear that has most: MoLA's quarters may differ."""
    return max((lora.count for lora in loras.values()), default=0)


def _other_files(adapter: Adapter) -> dict[str, dict[str, nn.Parameter]]:
    """What is no LoRA, by file and by key."""
    routers = {f"{path}.weight": router.weight for path, router in adapter.routers().items()}
    serial: dict[str, nn.Parameter] = {}
    for path, site in adapter.sites.items():
        if isinstance(site.experts, BottleneckExperts):
            serial |= {f"{path}.down": site.experts.down, f"{path}.up": site.experts.up}
    files = {"router.safetensors": routers, "bottleneck.safetensors": serial}
    return {file: tensors for file, tensors in files.items() if tensors}
