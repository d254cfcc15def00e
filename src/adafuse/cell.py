"""What a cell is: the settings that decide its result, its name, where its files live, and the cells it stands on.

In: a checked `Config` and a task. Out: those settings as a plain dict, their hash, and the paths that carry it: two
experiments that need the same cell share one record. What only says how to run (profile, tracker, folders, saving)
has no part in it. Files that bear the hash of an earlier version of this code are found as well. Next: stages.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

from adafuse.config import Config, Fit, Method, Task, Weights
from adafuse.data.items import former_version, pretraining_version, recipe
from adafuse.shape import shape_of

SLUG_CHARACTERS = 80
# the tasks that measure arms
OF_ARMS = (Task.latency, Task.memory, Task.trace)
# A checkpoint is known by its sizes and evenly spaced samples: to read 13 GB whole takes longer than many a cell.
SAMPLES, SAMPLE_BYTES = 64, 65536
WEIGHT_FILES = ("*.safetensors", "tokenizer*")
# Settings that came later, with the value under which nothing is as it was not before: there they have no part in
# what a cell is, so that records made before them stay its replicates.
LATER: dict[str, Any] = {
    "router_norm": False,
    "null_expert": False,
    "bypass_penalty": 0.0,
    "first_expert_block": 0,
    "bypass_share": 0.0,
    "learning_rate_factor": 1.0,
    "full": False,
}


# The Pythons of the records that were published while a Python's patch level stood for the text (`former_hashes`).
PUBLISHED_PYTHONS = ("3.11.7", "3.12.3")


def identity(config: Config, task: Task | None = None, method: Method | None = None) -> dict[str, Any]:
    """The settings that decide the result of `task` (and of nothing else), ready for `content_hash`.

    `method` stands in for the selected one where the task has a method.
    """
    parts = _PARTS[task or config.task](config, method or config.method)
    settled: dict[str, Any] = _without_unused({"task": (task or config.task).name, **parts})
    return settled


def content_hash(obj: Any) -> str:
    """12 hex digits over canonical JSON: key order does not matter, enums count by name."""
    text = json.dumps(as_plain(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def cell_hash(config: Config, task: Task | None = None, method: Method | None = None) -> str:
    """The hash that the files of this cell bear."""
    return content_hash(identity(config, task, method))


def former_hashes(
    config: Config, task: Task | None = None, method: Method | None = None, *, other_pythons: bool = True
) -> list[str]:
    """The hashes that this cell had in earlier versions, where they differ from today's.

    They named generated text by the running Python's patch level, and a local checkpoint by its absolute path. A
    finished record stands for its cell whichever of the published Pythons it was made under; a folder that others are
    built on (`other_pythons=False`) must hold this Python's own text.
    """
    now = identity(config, task, method)
    versions = [former_version(), *map(former_version, PUBLISHED_PYTHONS if other_pythons else ())]
    found = [content_hash(_as_before(now, version, config)) for version in versions if version is not None]
    return [known for known in dict.fromkeys(found) if known != content_hash(now)]


def cell_id(config: Config, task: Task | None = None, method: Method | None = None) -> str:
    """A readable name of at most 80 characters, safe as a file name; the hash beside it makes it unique."""
    words = _words(config, task or config.task, method or config.method)
    slug = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", str(word)) for word in words)
    return slug[:SLUG_CHARACTERS]


def record_path(config: Config, task: Task | None = None, method: Method | None = None) -> Path:
    """Where the record of this cell will be written."""
    return _record_paths(config, task, method, [cell_hash(config, task, method)])[0]


def known_records(config: Config, *, other_pythons: bool = True) -> dict[Path, str]:
    """Where a record of this cell may be, and the hash that it has there: today's first, then `former_hashes`."""
    hashes = [cell_hash(config), *former_hashes(config, other_pythons=other_pythons)]
    return dict(zip(_record_paths(config, None, None, hashes), hashes, strict=True))


def backbone_dir(config: Config) -> Path:
    """Folder of the backbone that is pre-trained here."""
    return _folder("backbones", config, Task.pretrain)


def pretrained_dir(config: Config) -> Path | None:
    """`backbone_dir` for a backbone that is fitted here; None for one that comes from elsewhere."""
    ours = config.model.path is None and config.model.weights is Weights.scratch
    return backbone_dir(config) if ours else None


def adapter_dir(config: Config, method: Method) -> Path:
    """Folder of the trained adapter of `method`."""
    return _folder("adapters", config, Task.train, method)


def data_dir(config: Config) -> Path:
    """Folder of the training, validation and test items."""
    now, name = _data(config), f"{config.data.name}-s{config.seed}"
    before = now | {"text": former_version()}
    folders = [Path(config.runs_dir) / "data" / f"{name}-{content_hash(known)}" for known in (now, before)]
    return _first_there(folders)


def needs(config: Config) -> Iterator[Config]:
    """The cells that this one stands on, in order."""
    if config.task in (Task.pretrain, Task.layer, Task.kernel):
        return
    if config.model.path is None and config.model.weights is Weights.scratch:
        yield dataclasses.replace(config, task=Task.pretrain)
    if config.task is Task.evaluate and config.method.is_trained:
        yield dataclasses.replace(config, task=Task.train)
    if config.task in OF_ARMS and config.latency.trained_adapters:
        for name in dict.fromkeys(config.arms.table[arm].method for arm in config.arms.run):
            if config.methods[name].has_experts:
                yield dataclasses.replace(config, task=Task.train, method=config.methods[name])
    if config.task is Task.drift and config.latency.trained_adapters:
        yield dataclasses.replace(config, task=Task.train)


def with_needs(config: Config) -> Iterator[Config]:
    """This cell, and every one below it."""
    yield config
    for needed in needs(config):
        yield from with_needs(needed)


def as_plain(value: Any) -> Any:
    """Dataclasses, enums and paths as JSON's own types."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: as_plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(key): as_plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [as_plain(inner) for inner in value]
    if isinstance(value, Enum):
        return value.name
    return str(value) if isinstance(value, Path) else value


def file_hash(path: Path) -> str:
    """SHA-256 of a whole file, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _record_paths(config: Config, task: Task | None, method: Method | None, hashes: list[str]) -> list[Path]:
    folder, name = (
        Path(config.runs_dir) / "records" / (task or config.task).name,
        cell_id(config, task, method),
    )
    return [folder / f"{name}-{known}.jsonl" for known in hashes]


def _folder(kind: str, config: Config, task: Task, method: Method | None = None) -> Path:
    name = cell_id(config, task, method)
    hashes = [cell_hash(config, task, method), *former_hashes(config, task, method, other_pythons=False)]
    return _first_there([Path(config.runs_dir) / kind / f"{name}-{known}" for known in hashes])


def _first_there(folders: list[Path]) -> Path:
    """The first, unless only another one exists."""
    return next((folder for folder in folders if folder.exists()), folders[0])


def _words(config: Config, task: Task, method: Method) -> list[object]:
    """What the name of a cell says."""
    model, geometry = _model(config), f"{config.experts.count}x{config.experts.rank}"
    seed, run = f"s{config.seed}", [f"s{config.seed}", f"r{config.replicate}"]
    if task is Task.pretrain:
        return [config.model.name, f"s{config.model.seed}"]
    if task is Task.train:
        return [model, geometry, method.name, config.data.name, seed]
    if task is Task.evaluate:
        what = [method.name, config.data.name, config.suite.name, config.evaluate_strategy.name, seed]
        return [model, geometry, *what] if method.has_experts else [model, *what]
    if task in (Task.layer, Task.kernel):
        return [config.model.name, f"{config.experts.count}x", *run]
    if task is Task.drift:
        return [model, geometry, method.name, config.drift.dtype.name, f"c{config.context}", *run]
    arms = config.arms.run[0] if task is Task.memory else config.arms.name
    return [model, geometry, arms, f"b{config.batch}", f"c{config.context}", *run]


def _model(config: Config) -> str:
    return config.model.name if config.model.path is None else Path(config.model.path).resolve().name


def _without_unused(value: Any) -> Any:
    """Plain settings without those of `LATER` that are not used."""
    if isinstance(value, dict):
        used = {k: v for k, v in value.items() if k not in LATER or v != LATER[k]}
        return {key: _without_unused(inner) for key, inner in used.items()}
    return [_without_unused(inner) for inner in value] if isinstance(value, list) else value


def _as_before(value: Any, text: str, config: Config) -> Any:
    """Settings as they were hashed before: text by its Python, a checkpoint by its path, all of its config.json."""
    if isinstance(value, list):
        return [_as_before(inner, text, config) for inner in value]
    if not isinstance(value, dict):
        return value
    found = {key: _as_before(inner, text, config) for key, inner in value.items()}
    if "text" in found:
        found["text"] = text
    if config.model.path is not None and "folder" in found:
        del found["folder"]
        found["path"] = str(Path(config.model.path).resolve())
    if config.model.path is not None and "shape" in found:
        found["shape"] = shape_of(config.model)
    return found


def _pretrain(config: Config, method: Method) -> dict[str, Any]:
    model = config.model
    settings = {"shape": model.shape, "dtype": model.dtype, "fit": _fit(config.pretrain)}
    return as_plain(settings | {"text": pretraining_version(), "seed": model.seed})


def _train(config: Config, method: Method) -> dict[str, Any]:
    parts = {"backbone": _backbone(config), "method": method}
    if method.has_experts:
        parts["experts"] = config.experts
    return as_plain(parts | {"data": _data(config), "fit": _fit(config.train), "seed": config.seed})


def _evaluate(config: Config, method: Method) -> dict[str, Any]:
    parts = {"suite": config.suite, "seed": config.seed}
    parts["dtype"] = config.evaluate_dtype
    if method.is_trained:
        how = {"strategy": config.evaluate_strategy, "restore": config.evaluate_restore}
        return as_plain({"train": _train(config, method), **how, **parts})
    # the plain backbone sees the test items only, whatever the adapters were trained on
    data = _data(config)
    data["items"] = {"test": data["items"]["test"]}
    return as_plain({"backbone": _backbone(config), "method": method.name, "data": data, **parts})


def _latency(config: Config, method: Method) -> dict[str, Any]:
    return {**_cell(config), "knobs": as_plain(config.latency)}


def _memory(config: Config, method: Method) -> dict[str, Any]:
    return {**_cell(config), "knobs": {"block_tokens": config.latency.block_tokens}}


def _trace(config: Config, method: Method) -> dict[str, Any]:
    knobs = {"settle_tokens": config.latency.settle_tokens, "gates": config.latency.gates}
    return {**_cell(config), "knobs": as_plain(knobs)}


def _cell(config: Config) -> dict[str, Any]:
    """Arms, adapters and workload, whatever of them is measured."""
    arms = {name: config.arms.table[name] for name in config.arms.run}
    methods = {name: config.methods[name] for name in sorted({arm.method for arm in arms.values()})}
    untrained = {name: dataclasses.replace(m, learning_rate_factor=1.0) for name, m in methods.items()}
    adapters: dict[str, Any] = {"experts": config.experts, "methods": untrained}
    if config.latency.trained_adapters:
        adapters = {n: _train(config, m) if m.has_experts else None for n, m in methods.items()}
    return as_plain(
        {
            "backbone": _backbone(config),
            # a label is prose: it may change without the cell being measured again
            "arms": {name: [arm.method, arm.strategy, arm.runtime] for name, arm in arms.items()},
            "adapters": adapters,
            "batch": config.batch,
            "context": config.context,
            **_repeat(config),
        }
    )


def _layer(config: Config, method: Method) -> dict[str, Any]:
    experts = {"count": config.experts.count, "top_k": config.experts.top_k, "gates": method.normalisation}
    model = {"shape": _sizes(config), "dtype": config.model.dtype}
    return as_plain({**model, "experts": experts, "knobs": config.layer, **_repeat(config)})


def _kernel(config: Config, method: Method) -> dict[str, Any]:
    experts = {"count": config.experts.count, "top_k": config.experts.top_k}
    model = {"shape": _sizes(config), "dtype": config.model.dtype}
    return as_plain({**model, "experts": experts, "knobs": config.kernel, **_repeat(config)})


def _drift(config: Config, method: Method) -> dict[str, Any]:
    adapter: Any = {"experts": config.experts, "method": method}
    if config.latency.trained_adapters:
        adapter = _train(config, method)
    parts = {"backbone": _backbone(config), "adapter": adapter, "context": config.context}
    return as_plain({**parts, "knobs": config.drift, **_repeat(config)})


_PARTS: dict[Task, Callable[[Config, Method], dict[str, Any]]] = {
    Task.pretrain: _pretrain,
    Task.train: _train,
    Task.evaluate: _evaluate,
    Task.latency: _latency,
    Task.memory: _memory,
    Task.trace: _trace,
    Task.layer: _layer,
    Task.kernel: _kernel,
    Task.drift: _drift,
}


def _repeat(config: Config) -> dict[str, Any]:
    return {"device": config.device, "seed": config.seed, "replicate": config.replicate}


def _fit(fit: Fit) -> dict[str, Any]:
    return {key: value for key, value in as_plain(fit).items() if key != "save_every_steps"}


def _data(config: Config) -> dict[str, Any]:
    return recipe(config.data, config.seed)


def _backbone(config: Config) -> dict[str, Any]:
    model = config.model
    if model.path is not None:
        return {"folder": _model(config), "dtype": model.dtype.name, "files": _files(Path(model.path))}
    if model.weights is Weights.hub:
        return {"hub": f"{model.hub_id}@{model.revision}", "dtype": model.dtype.name}
    if model.weights is Weights.scratch:
        return {"pretrain": _pretrain(config, config.method)}
    return {"random": as_plain(model.shape), "dtype": model.dtype.name, "seed": model.seed}


def _sizes(config: Config) -> dict[str, Any]:
    """A checkpoint's config.json without what says where and with which version it was saved."""
    shape = shape_of(config.model)
    return {k: v for k, v in shape.items() if not k.startswith("_") and k != "transformers_version"}


def _files(folder: Path) -> dict[str, str]:
    """Fingerprints of a checkpoint's files; a folder that is missing has none, and backbone.py refuses it."""
    found = {path for pattern in ("config.json", *WEIGHT_FILES) for path in folder.glob(pattern)}
    return {path.name: _fingerprint(path) for path in sorted(found)}


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for number in range(SAMPLES):
            start = number * SAMPLE_BYTES if size <= SAMPLES * SAMPLE_BYTES else number * (size // SAMPLES)
            stream.seek(start)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:12]
