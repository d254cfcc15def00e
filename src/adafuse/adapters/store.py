"""An adapter on disk: each expert a PEFT LoRA folder that PEFT loads unaided, beside the routers.

`expert_00/ expert_01/ ...` and `static/` are PEFT folders; `router.safetensors` holds the routers by the path they
serve (`token.weight` for token routing), `bottleneck.safetensors` PESC's serial adapters, `router_config.json` the
method, the geometry, a fingerprint of the backbone, a sha256 of each file and a seal of its own; `README.md` is for
readers, theirs to change. In: an `Adapter`, a folder. Out: the same numbers, bit for bit, of the same bytes each time.
Next: training/stage.py, which saves, evaluation/stage.py and bench/, which load.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor, nn

from adafuse.adapters import card, imports
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.experts import BottleneckExperts, LoraExperts
from adafuse.adapters.imports import CONFIG, WEIGHTS
from adafuse.cell import as_plain, content_hash, file_hash
from adafuse.config import Experts, Method
from adafuse.distributed import MAIN_PROCESS, sharded
from adafuse.model.checkpoint import first_few, header
from adafuse.model.fingerprint import COVERS, fingerprint, is_of
from adafuse.shape import read_json

# 1: no fingerprint of the backbone, and no checksum of adapter_config.json
FORMAT_VERSION = 2
DESCRIPTION, ROUTERS, CARD = "router_config.json", "router.safetensors", "README.md"
# the folder of ordinary LoRA beside the experts
STATIC = "static"
FIELDS = {"method": dict, "experts": dict, "folders": list, "base_model": str, "sha256": dict}
AGAIN = "copy it again, or train again"
_PREFIX = "base_model.model."


def save(adapter: Adapter, folder: Path, base_name: str) -> None:
    """Write the adapter; `base_name` is the hub id or folder of the backbone, kept for the reader.

    Where processes hold parts of the backbone all of them must call, and the main one writes. Raises ValueError while
    it is installed to decode in a way that changes the backbone's weights.
    """
    weights, public = _backbone(adapter), public_name(base_name)
    digests = fingerprint(weights) if weights else {}
    if sharded(adapter.model) and not MAIN_PROCESS:
        return
    _refuse_place(adapter, folder)
    folder.mkdir(parents=True, exist_ok=True)
    loras, static = adapter.loras(), adapter.statics()
    for e, name in enumerate(_expert_folders(adapter)):
        chosen = {p: (x.lora_A[e], x.lora_B[e]) for p, x in loras.items() if e < x.count}
        _write_peft(folder / name, chosen, next(iter(loras.values())).alpha, public)
    if static:
        factors = {p: (x.lora_A[0], x.lora_B[0]) for p, x in static.items()}
        _write_peft(folder / STATIC, factors, adapter.method.static_alpha, public)
    for file, tensors in _other_files(adapter).items():
        save_file({k: _stored(t) for k, t in tensors.items()}, folder / file)
    description = {
        "format_version": FORMAT_VERSION,
        "method": as_plain(adapter.method),
        "experts": _of_geometry(adapter.geometry),
        "folders": _folders(adapter),
        "experts_frozen": adapter.experts_frozen,
        "base_model": base_name,
        # of weights that are not in memory (device_map with offload) there is none
        "base": {"covers": COVERS, "sha256": digests},
        "sha256": {file: file_hash(folder / file) for file in _files(adapter, FORMAT_VERSION)},
    }
    description["seal"] = content_hash(description)
    (folder / DESCRIPTION).write_text(json.dumps(description, indent=2) + "\n")
    write_card(folder)


def write_card(folder: Path, scores: Mapping[str, float] | None = None) -> None:
    """The model card of a saved adapter, with what it scored if that is known by now."""
    description = describe(folder)
    (folder / CARD).write_text(
        card.text(description | {"base_model": public_name(description["base_model"])}, scores or {})
    )


def public_name(base_name: str) -> str:
    """What others are told: of a folder of this machine its name."""
    of_here = Path(base_name).is_absolute() or Path(base_name).exists()
    return Path(base_name).resolve().name if of_here else base_name


def load(adapter: Adapter, folder: Path, *, any_base: bool = False) -> Adapter:
    """Read `folder` into an adapter of the same method and geometry, which is not installed.

    Raises ValueError, one line, if they differ, if a file is not as it was saved, or (unless `any_base`) if it was made
    for another backbone. Warns where that cannot be said.
    """
    description = describe(folder)
    # settings that are younger than the folder are as they were before
    methods = as_plain(Method()) | description["method"], as_plain(adapter.method)
    for key, theirs, ours in (
        ("method", *methods),
        ("experts", description["experts"], _of_geometry(adapter.geometry)),
    ):
        if theirs != ours:
            raise ValueError(f"{folder} was saved with another {key}: train again, or set the saved values")
    if description["folders"] != _folders(adapter):
        raise ValueError(f"{folder / DESCRIPTION} names other folders than {_folders(adapter)}: {AGAIN}")
    _check_files(folder, description["sha256"], _files(adapter, description["format_version"]))
    if not any_base:
        _check_backbone(adapter, folder, description)
    shape, loras = adapter.model.config.to_dict(), adapter.loras()
    for e, name in enumerate(_expert_folders(adapter)):
        own = {path: lora for path, lora in loras.items() if e < lora.count}
        _fill(own, e, folder / name, shape)
    if adapter.statics():
        _fill(adapter.statics(), 0, folder / STATIC, shape)
    for file, tensors in _other_files(adapter).items():
        _read_exactly(folder / file, tensors)
    adapter.experts_frozen |= description.get("experts_frozen") is True
    return adapter


def describe(folder: Path) -> dict[str, Any]:
    """The saved `router_config.json`. Raises ValueError, one line, if `folder` is no whole adapter of this project."""
    file = folder / DESCRIPTION
    if not file.is_file():
        raise ValueError(f"{folder} has no {DESCRIPTION}: it is not a saved adapter")
    description = read_json(file)
    version = description.get("format_version")
    if version not in (1, FORMAT_VERSION):
        raise ValueError(f"{file} has format {version}, this code reads 1 and {FORMAT_VERSION}")
    fields = FIELDS if version == 1 else FIELDS | {"base": dict}
    for key, kind in fields.items():
        if not isinstance(description.get(key), kind):
            raise ValueError(f"{file} has no {key}: {AGAIN}")
    unsealed = {key: value for key, value in description.items() if key != "seal"}
    if version != 1 and description.get("seal") != content_hash(unsealed):
        raise ValueError(f"{file} was changed after saving: {AGAIN}")
    return description


def expert_name(e: int) -> str:
    """Zero-padded, on disk and in memory: PEFT's filters take `expert_1` and `expert_10` for one another."""
    return f"expert_{e:02d}"


def _expert_folders(adapter: Adapter) -> list[str]:
    """As many as the linear has that has most: MoLA's quarters may differ."""
    most = max((lora.count for lora in adapter.loras().values()), default=0)
    return [expert_name(e) for e in range(most)]


def _folders(adapter: Adapter) -> list[str]:
    return [*_expert_folders(adapter), *([STATIC] if adapter.statics() else [])]


def _files(adapter: Adapter, version: int) -> list[str]:
    """Every file that is read, and so must be under its checksum."""
    of_peft = [WEIGHTS] if version == 1 else [CONFIG, WEIGHTS]
    return [*(f"{name}/{file}" for name in _folders(adapter) for file in of_peft), *_other_files(adapter)]


def _of_geometry(geometry: Experts) -> dict[str, Any]:
    """Without the folders where experts came from: what counts of them is in the files."""
    plain: dict[str, Any] = as_plain(geometry)
    return {key: value for key, value in plain.items() if key not in ("folders", "missing_as_zeros")}


def _refuse_place(adapter: Adapter, folder: Path) -> None:
    """Nothing is written through a link or over a model's card, and no expert of another adapter stays among ours."""
    if (folder / "config.json").exists():
        raise ValueError(f"{folder} holds a model (config.json): name a folder of the adapter's own")
    written = [
        folder / name for name in (*_folders(adapter), *_files(adapter, FORMAT_VERSION), DESCRIPTION, CARD)
    ]
    for path in written:
        if path.is_symlink():
            raise ValueError(f"{path} is a link, through which nothing is written: choose another folder")
    left = [path.name for path in folder.glob("expert_[0-9][0-9]") if path not in written]
    if left:
        raise ValueError(
            f"{folder} holds {first_few(sorted(left))} of another adapter: choose another folder"
        )


def _backbone(adapter: Adapter) -> dict[str, Tensor]:
    """The weights of the adapter's backbone, installed or not; empty where some are not in memory."""
    own = {id(parameter) for parameter in adapter.parameters()}
    changed = any(site.static_merged for site in adapter.sites.values() if hasattr(site, "static_merged"))
    if changed or (adapter.installed and adapter.merging and not adapter.restores):
        raise ValueError(
            "the adapter is installed in a way that changes the backbone: remove it, then save it"
        )
    named = adapter.model.named_parameters()
    found = {_plain_name(name): weight for name, weight in named if id(weight) not in own}
    return {} if any(weight.is_meta for weight in found.values()) else found


def _plain_name(name: str) -> str:
    """Of a weight whose module stands inside one of the adapter's."""
    return name.replace(".base.", ".")


def _check_files(folder: Path, table: Mapping[str, str], files: list[str]) -> None:
    if sorted(table) != sorted(files):
        raise ValueError(
            f"{folder / DESCRIPTION} has no checksum of each of its files, or of others: {AGAIN}"
        )
    whole = folder.resolve()
    # the Hub's cache holds links into a folder beside, of the repository or of all together
    cached = whole.parent.name == "snapshots"
    roots = [whole, *(beside / "blobs" for beside in whole.parents[1:3] if cached)]
    for file in files:
        path = folder / file
        if not any(_target(path).is_relative_to(root) for root in roots):
            raise ValueError(f"{path} leads out of {folder}: copy the file itself there")
        if not path.is_file() or file_hash(path) != table[file]:
            raise ValueError(
                f"{path} is missing or was changed after saving: delete {folder} and train again"
            )


def _target(path: Path) -> Path:
    try:
        return path.resolve()
    except (OSError, RuntimeError):
        raise ValueError(f"{path} is a link to itself: {AGAIN}") from None


def _check_backbone(adapter: Adapter, folder: Path, description: Mapping[str, Any]) -> None:
    unsure = f"{folder} was made for {description['base_model']}, and whether this is it cannot be said"
    weights = _backbone(adapter)
    if description["format_version"] == 1 or not weights:
        why = "some of its weights are not in memory" if not weights else "it has no fingerprint of it"
        warnings.warn(f"{unsure}: {why}", stacklevel=3)
    elif not is_of(_digests(description), weights):
        raise ValueError(
            f"{folder} was made for another backbone ({description['base_model']}; its weights are not these): load "
            "that one, train again, or say any_base=True in Python"
        )


def _digests(description: Mapping[str, Any]) -> list[str]:
    found = description["base"].get("sha256")
    return [one for one in found.values() if isinstance(one, str)] if isinstance(found, dict) else []


def _fill(loras: Mapping[str, LoraExperts], e: int, folder: Path, shape: Mapping[str, Any]) -> None:
    found = imports.inspect(folder, shape)
    lacking = [path for path in loras if path not in found.modules]
    if lacking:
        raise ValueError(f"{folder} lacks {first_few(lacking)}: {AGAIN}")
    imports.fill(loras, e, folder, imports.read(found))


def _read_exactly(file: Path, tensors: Mapping[str, nn.Parameter]) -> None:
    """Raises ValueError where keys, shapes or dtypes are others, or a number is not finite."""
    held = header(file)
    others = sorted(held.keys() ^ tensors.keys())
    if others:
        raise ValueError(f"{file} lacks {first_few(others)}, or has it too much: {AGAIN}")
    # a router stays in fp32; PESC's adapters may have been saved as they were served
    dtypes = ("F32",) if file.name == ROUTERS else imports.NUMBERS
    for key, parameter in tensors.items():
        one, shape = held[key], tuple(parameter.shape)
        if one.shape != shape or one.dtype not in dtypes:
            raise ValueError(
                f"{file} holds {key} as {one.dtype} {list(one.shape)}, not {dtypes[0]} {list(shape)}: {AGAIN}"
            )
    imports.refuse_unreal(file, held)
    for key, tensor in imports.loaded(file).items():
        tensors[key].data.copy_(tensor)


def _write_peft(
    folder: Path, factors: dict[str, tuple[Tensor, Tensor]], alpha: float, base_name: str
) -> None:
    """As PEFT does, which writes the modules in an order that changes from process to process."""
    folder.mkdir(exist_ok=True)
    config = {
        "base_model_name_or_path": base_name,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if float(alpha).is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": next(iter(factors.values()))[0].shape[0],
        "target_modules": sorted(factors),
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    tensors = {}
    for path, (lora_A, lora_B) in factors.items():
        tensors[f"{_PREFIX}{path}.lora_A.weight"] = _stored(lora_A)
        tensors[f"{_PREFIX}{path}.lora_B.weight"] = _stored(lora_B)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def _stored(tensor: Tensor) -> Tensor:
    """Apart from its parameter: files hold no views."""
    return tensor.detach().cpu().contiguous().clone()


def _other_files(adapter: Adapter) -> dict[str, dict[str, nn.Parameter]]:
    """What is no LoRA, by file and by key."""
    routers = {f"{path}.weight": router.weight for path, router in adapter.routers().items()}
    serial: dict[str, nn.Parameter] = {}
    for path, site in adapter.sites.items():
        if isinstance(site.experts, BottleneckExperts):
            serial |= {f"{path}.down": site.experts.down, f"{path}.up": site.experts.up}
    files = {ROUTERS: routers, "bottleneck.safetensors": serial}
    return {file: tensors for file, tensors in files.items() if tensors}
