"""PEFT LoRA folders of anybody's, as experts, looked at before torch is imported.

In: folders and the sizes of a backbone. Out: of each folder its modules with rank and scaling (`inspect`), the geometry
that holds them all (`geometry`), and their factors in an adapter (`load_experts`): a smaller rank is filled up with
zeros, another scaling is folded into B, both exactly. What is no LoRA on a linear of the frozen backbone is refused by
name (declared_lora.py has the fields). Next: store.py, our own folders, whose experts are such folders.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adafuse.adapters.declared_lora import faults, linears, targeted
from adafuse.adapters.geometry import expert_targets
from adafuse.config import LINEARS, ExpertKind, Experts, Method, Routing
from adafuse.model.checkpoint import Stored, first_few, header, one_line
from adafuse.shape import read_json

if TYPE_CHECKING:
    from torch import Tensor

    from adafuse.adapters.adapter import Adapter
    from adafuse.adapters.experts import LoraExperts

CONFIG, WEIGHTS, PICKLE = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
# what wrappers put into the names of modules
WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
NUMBERS = ("F32", "F16", "BF16")
# by the path of the linear: lora_A [rank, in], lora_B [out, rank], scaling
Factors = dict[str, tuple["Tensor", "Tensor", float]]


@dataclass(frozen=True)
class Module:
    """One adapted linear: `scaling * B A`, with A [rank, in] and B [out, rank]."""

    rank: int
    scaling: float
    lora_A: str
    lora_B: str


@dataclass(frozen=True)
class Lora:
    """A folder that was understood, and its modules by the path of the linear."""

    folder: Path
    modules: dict[str, Module]


def inspect(folder: Path, shape: Mapping[str, Any]) -> Lora:
    """What a folder holds, without torch unless it is a pickle. Raises ValueError, one line.

    `shape`: the backbone's sizes as a transformers config names them.
    """
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder: name PEFT LoRA folders")
    if not (folder / CONFIG).is_file():
        named = sorted(inner.parent.name for inner in folder.glob(f"*/{CONFIG}"))
        cure = (
            f"it holds the adapters {first_few(named)}, name one of them"
            if named
            else "it is no PEFT LoRA folder"
        )
        raise ValueError(f"{folder} has no {CONFIG}: {cure}")
    declared, paths = read_json(folder / CONFIG), linears(shape)
    try:
        for fault in faults(declared):
            raise ValueError(fault)
        wanted = targeted(declared, paths)
    except ValueError as error:
        raise ValueError(f"{folder / CONFIG}: {error}") from None
    if (folder / WEIGHTS).is_file():
        held = header(folder / WEIGHTS)
        lora = Lora(folder, _modules(folder / WEIGHTS, held, wanted, paths))
        refuse_unreal(folder / WEIGHTS, held)
        return lora
    # opened already here: a fault in it shall not wait for the backbone
    file = folder / PICKLE
    held = {name: _as_stored(file, one) for name, one in unpickled(file).items()}
    return Lora(folder, _modules(file, held, wanted, paths))


def read(lora: Lora) -> Factors:
    """The factors of what `inspect` found. Raises ValueError, one line."""
    tensors = tensors_of(lora.folder)
    return {
        path: (tensors[one.lora_A], tensors[one.lora_B], one.scaling) for path, one in lora.modules.items()
    }


def geometry(loras: Sequence[Lora], top_k: int) -> Experts:
    """The expert geometry that holds these folders without loss; their common scaling, or 1 where they differ."""
    modules = [module for lora in loras for module in lora.modules.values()]
    names = {path.rpartition(".")[2] for lora in loras for path in lora.modules}
    rank, scalings = max(module.rank for module in modules), {module.scaling for module in modules}
    alpha = rank * ((scalings.pop() if len(scalings) == 1 else 1.0) or 1.0)
    return Experts(
        targets=[name for name in LINEARS if name in names],
        rank=rank,
        count=len(loras),
        top_k=top_k,
        alpha=alpha,
        folders=[str(lora.folder) for lora in loras],
    )


def refuse_lacking(loras: Sequence[Lora], missing_as_zeros: bool) -> None:
    """Raise ValueError where a folder lacks what another one adapts, unless it shall be zero there."""
    everything = {path: None for lora in loras for path in lora.modules}
    for lora in loras:
        lacking = [path for path in everything if path not in lora.modules]
        if lacking and not missing_as_zeros:
            raise ValueError(
                f"{lora.folder} does not adapt {first_few(lacking)}, which others of the folders do: set "
                "missing_as_zeros to have zeros there, or leave it out"
            )


def refuse_misfits(loras: Sequence[Lora], method: Method, geometry: Experts) -> None:
    """Raise ValueError where a method with a router has no place for these experts; without one it trains its own."""
    if method.routing is Routing.none:
        return
    own = [
        key for key in ("rank", "count", "alpha", "experts_by_quarter") if getattr(method, key) is not None
    ]
    if method.expert_kind is ExpertKind.bottleneck:
        raise ValueError(
            f"method {method.name} has experts that are no LoRA: use adafuse, mola, moral or mixlora, and arms of them"
        )
    if own:
        raise ValueError(
            f"method.{own[0]} is for experts that are trained here, not for experts.from: leave it out"
        )
    for lora in loras:
        for path in lora.modules:
            block, name = int(path.split(".")[2]), path.rpartition(".")[2]
            of_mlp = LINEARS[4:] if method.expert_kind is ExpertKind.mlp_lora else []
            if name not in (of_mlp or expert_targets(method, geometry, block)):
                raise ValueError(f"{lora.folder} adapts {path}, where method {method.name} has no experts")


def load_experts(adapter: Adapter, folders: Sequence[Path], missing_as_zeros: bool = False) -> None:
    """Let PEFT LoRA folders be experts 0, 1, ... of `adapter`, on its device. Raises ValueError, one line.

    A linear of the adapter that no folder adapts has experts of zeros; one that a folder adapts and the adapter does
    not is refused.
    """
    shape, ours = adapter.model.config.to_dict(), adapter.loras()
    counts = {lora.count for lora in ours.values()}
    if counts != {len(folders)}:
        raise ValueError(
            f"{len(folders)} LoRA folders for {sorted(counts) or 'no'} experts on linears: set experts.count="
            f"{len(folders)}, and a method whose experts are LoRA, as many in every block"
        )
    loras = [inspect(folder, shape) for folder in folders]
    refuse_lacking(loras, missing_as_zeros)
    for e, (folder, lora) in enumerate(zip(folders, loras, strict=True)):
        fill(ours, e, folder, read(lora))


def load_own(adapter: Adapter) -> None:
    """`load_experts` with the folders that the adapter's geometry names."""
    geometry = adapter.geometry
    load_experts(adapter, [Path(folder) for folder in geometry.folders], geometry.missing_as_zeros)


def fill(ours: Mapping[str, LoraExperts], e: int, folder: Path, found: Factors) -> None:
    """Expert e of each stack becomes what `read` found. Raises ValueError, one line, where it does not fit."""
    beyond = [path for path in found if path not in ours]
    if beyond:
        raise ValueError(f"{folder} adapts {first_few(beyond)}, where the method has no experts")
    for path, lora in ours.items():
        lora.lora_A.data[e].zero_()
        lora.lora_B.data[e].zero_()
        if path not in found:
            continue
        lora_A, lora_B, scaling = found[path]
        rank, same = lora_A.shape[0], math.isclose(scaling, lora.scaling, rel_tol=1e-9)
        if rank > lora.rank:
            raise ValueError(
                f"{folder} has rank {rank} at {path}, the expert geometry {lora.rank}: set experts.rank={rank}"
            )
        lora.lora_A.data[e, :rank].copy_(lora_A)
        # as it is where the scalings agree: then what was saved comes back bit for bit
        folded = lora_B if same else lora_B.double() * (scaling / lora.scaling)
        lora.lora_B.data[e, :, :rank].copy_(folded)


def tensors_of(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder, finite. Raises ValueError, one line."""
    if not (folder / WEIGHTS).is_file():
        return unpickled(folder / PICKLE)
    refuse_unreal(folder / WEIGHTS, header(folder / WEIGHTS))
    return loaded(folder / WEIGHTS)


def names_of(folder: Path) -> list[str]:
    """The names of the tensors of a folder."""
    safe = (folder / WEIGHTS).is_file()
    return list(header(folder / WEIGHTS) if safe else unpickled(folder / PICKLE))


def loaded(file: Path) -> dict[str, Tensor]:
    """The tensors in a file of safetensors. Raises ValueError, one line, for what its header does not show."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        found: dict[str, Tensor] = load_file(file)
    except SafetensorError as error:
        raise ValueError(f"{file} is damaged ({one_line(error)}): copy it again") from None
    return found


def unpickled(file: Path) -> dict[str, Tensor]:
    """The tensors in a file of torch.save, which may hold nothing else. Raises ValueError, one line."""
    import torch

    if not file.is_file():
        raise ValueError(f"{file.parent} has neither {WEIGHTS} nor {PICKLE}: copy it again")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
        # of a tensor that is sparse, packed or nowhere this cannot be said
        unreal = [name for name, one in found.items() if torch.is_tensor(one) and not one.isfinite().all()]
    except Exception as error:  # torch, pickle and zipfile have no class in common
        raise ValueError(
            f"{file} holds more than tensors, or is damaged, and is not opened ({one_line(error)[:80]}): save it as "
            "safetensors"
        ) from None
    if not all(torch.is_tensor(one) for one in found.values()):
        raise ValueError(f"{file} is not a dictionary of tensors: save it as safetensors")
    if unreal:
        raise ValueError(_unreal(file, unreal[0]))
    return {str(name): one for name, one in found.items()}


def _modules(
    file: Path,
    held: Mapping[str, Stored],
    wanted: Mapping[str, tuple[int, float]],
    sizes: Mapping[str, tuple[int, int]],
) -> dict[str, Module]:
    """The modules that are wanted, each with the names of its factors, whose shapes fit the backbone and the rank."""
    names: dict[tuple[str, str], str] = {}
    for name in held:
        place = _place(name)
        if place is None:
            raise ValueError(f"{file} holds {name}, which is no LoRA factor of a linear")
        if place in names:
            raise ValueError(f"{file} holds {place[0]}.{place[1]} twice, as {names[place]} and as {name}")
        names[place] = name
    strange = [path for path in dict.fromkeys(path for path, _ in names) if path not in sizes]
    if strange:
        raise ValueError(
            f"{file} adapts {first_few(strange)}, which the backbone does not have among its linears"
        )
    beyond = [path for path in dict.fromkeys(path for path, _ in names) if path not in wanted]
    if beyond:
        raise ValueError(f"{file} adapts {first_few(beyond)}, which target_modules does not mean")
    lacking = [
        f"{path}.{factor}"
        for path in wanted
        for factor in ("lora_A", "lora_B")
        if (path, factor) not in names
    ]
    if lacking:
        raise ValueError(f"{file} lacks {first_few(lacking)}, which target_modules means: copy it again")
    for (path, factor), name in names.items():
        _check_factor(file, name, held[name], factor, wanted[path][0], sizes[path])
    return {path: Module(*of, names[path, "lora_A"], names[path, "lora_B"]) for path, of in wanted.items()}


def plain_name(name: str) -> str:
    """Without what wraps it."""
    inner = ".".join(word for word in name.split(".") if word not in WRAPPERS).removeprefix("module.")
    return inner.removeprefix("base_model.model.")


def _place(name: str) -> tuple[str, str] | None:
    """Path of the linear, and which factor, with or without the adapter's own name."""
    words = plain_name(name).split(".")
    for factor in ("lora_A", "lora_B"):
        if factor in words:
            at = words.index(factor)
            behind = words[at + 1 :]
            if behind[-1:] == ["weight"] and len(behind) <= 2:
                return ".".join(words[:at]), factor
    return None


def _check_factor(file: Path, name: str, one: Stored, factor: str, rank: int, sizes: tuple[int, int]) -> None:
    want = (rank, sizes[0]) if factor == "lora_A" else (sizes[1], rank)
    if one.dtype not in NUMBERS:
        raise ValueError(f"{file} holds {name} as {one.dtype}: save it in float32, float16 or bfloat16")
    if one.shape != want:
        raise ValueError(
            f"{file} holds {name} as {list(one.shape)}, where rank {rank} of {CONFIG} and the backbone make it "
            f"{list(want)}"
        )


def refuse_unreal(file: Path, held: Mapping[str, Stored]) -> None:
    """Not-a-number and infinity, by the bits of their exponent: neither numpy nor anything light knows bfloat16."""
    import numpy as np

    bits = {"F32": (np.uint32, 0x7F800000), "F16": (np.uint16, 0x7C00), "BF16": (np.uint16, 0x7F80)}
    for name, one in held.items():
        if one.dtype not in bits:
            raise ValueError(f"{file} holds {name} as {one.dtype}: save it in float32, float16 or bfloat16")
        dtype, exponent = bits[one.dtype]
        found = np.fromfile(file, dtype, count=math.prod(one.shape), offset=one.start)
        if ((found & exponent) == exponent).any():
            raise ValueError(_unreal(file, name))


def _unreal(file: Path, name: str) -> str:
    return f"{file} holds {name} with numbers that are not finite: its training diverged, or it is damaged"


def _as_stored(file: Path, tensor: Tensor) -> Stored:
    kind = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}
    return Stored(file.name, kind.get(str(tensor.dtype), str(tensor.dtype)), tuple(tensor.shape))
