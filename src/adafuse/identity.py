"""Which settings make a result, and hence where it lives: two experiments that need the same cell share one record.

In: a checked `Config` and a task. Out: the settings that decide the result as a plain dict, their hash, and the paths
that carry it. What only says how to run (profile, tracker, folders, saving) has no part in it. Next: stages.py.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from enum import Enum
from pathlib import Path
from typing import Any

from adafuse.cell_names import cell_id
from adafuse.config import Config, Fit, Method, Task, Weights
from adafuse.shape import shape_of

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


def identity(config: Config, task: Task | None = None, method: Method | None = None) -> dict[str, Any]:
    """The settings that decide the result of `task` (and of nothing else), ready for `content_hash`.

    `method` stands in for the selected one where the task has a method.
    """
    parts = _PARTS[task or config.task](config, method or config.method)
    settled: dict[str, Any] = without_unused({"task": (task or config.task).name, **parts})
    return settled


def content_hash(obj: Any) -> str:
    """12 hex digits over canonical JSON: key order does not matter, enums count by name."""
    text = json.dumps(as_plain(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def record_path(config: Config, task: Task | None = None, method: Method | None = None) -> Path:
    """Where the record of this cell is, or will be."""
    name = f"{_name(config, task or config.task, method)}.jsonl"
    return Path(config.runs_dir) / "records" / (task or config.task).name / name


def backbone_dir(config: Config) -> Path:
    """Folder of the backbone that is pre-trained here."""
    return Path(config.runs_dir) / "backbones" / _name(config, Task.pretrain)


def pretrained_dir(config: Config) -> Path | None:
    """`backbone_dir` for a backbone that is fitted here; None for one that comes from elsewhere."""
    ours = config.model.path is None and config.model.weights is Weights.scratch
    return backbone_dir(config) if ours else None


def adapter_dir(config: Config, method: Method) -> Path:
    """Folder of the trained adapter of `method`."""
    return Path(config.runs_dir) / "adapters" / _name(config, Task.train, method)


def data_dir(config: Config) -> Path:
    """Folder of the training, validation and test items."""
    name = f"{config.data.name}-s{config.seed}-{content_hash(_data(config))}"
    return Path(config.runs_dir) / "data" / name


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


def without_unused(value: Any) -> Any:
    """Plain settings without those of `LATER` that are not used."""
    if isinstance(value, dict):
        used = {k: v for k, v in value.items() if k not in LATER or v != LATER[k]}
        return {key: without_unused(inner) for key, inner in used.items()}
    return [without_unused(inner) for inner in value] if isinstance(value, list) else value


def file_hash(path: Path) -> str:
    """SHA-256 of a whole file, in hex."""
    digest = hashlib.sha256()
    with Path(path).open("rb") as stream:
        while piece := stream.read(1 << 20):
            digest.update(piece)
    return digest.hexdigest()


def _name(config: Config, task: Task, method: Method | None = None) -> str:
    return f"{cell_id(config, task, method)}-{content_hash(identity(config, task, method))}"


def _pretrain(config: Config, method: Method) -> dict[str, Any]:
    from adafuse.data.items import text_version

    model = config.model
    settings = {"shape": model.shape, "dtype": model.dtype, "fit": _fit(config.pretrain)}
    return as_plain(settings | {"text": text_version(), "seed": model.seed})


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
    model = {"shape": shape_of(config.model), "dtype": config.model.dtype}
    return as_plain({**model, "experts": experts, "knobs": config.layer, **_repeat(config)})


def _kernel(config: Config, method: Method) -> dict[str, Any]:
    experts = {"count": config.experts.count, "top_k": config.experts.top_k}
    model = {"shape": shape_of(config.model), "dtype": config.model.dtype}
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
    from adafuse.data.items import recipe

    return recipe(config.data, config.seed)


def _backbone(config: Config) -> dict[str, Any]:
    model = config.model
    if model.path is not None:
        return {
            "path": str(Path(model.path).resolve()),
            "dtype": model.dtype.name,
            "files": _files(Path(model.path)),
        }
    if model.weights is Weights.hub:
        return {"hub": f"{model.hub_id}@{model.revision}", "dtype": model.dtype.name}
    if model.weights is Weights.scratch:
        return {"pretrain": _pretrain(config, config.method)}
    return {"random": as_plain(model.shape), "dtype": model.dtype.name, "seed": model.seed}


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
