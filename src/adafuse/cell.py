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
from functools import cache, partial
from itertools import starmap
from pathlib import Path
from typing import Any

from adafuse.config import FIT_VERSION, Config, Fit, Method, Routing, Task, Weights, arm_version
from adafuse.data import rows
from adafuse.data.items import PREPARED, former_text, is_mended, pretraining_version, recipe, wrong_text
from adafuse.records import as_plain
from adafuse.shape import read_json, shape_of

SLUG_CHARACTERS = 80
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
    "blocks_per_decision": 0,
    "router_block": 0,
    "bypass_share": 0.0,
    "learning_rate_factor": 1.0,
    "full": False,
    "path": None,
    "shots_by_task": {},
    "folders": [],
    "missing_as_zeros": False,
    "prompts": None,
}
# what adapter_config.json says of where a LoRA came from, and not of what it is
TOLD_OF_LORA = (
    "base_model_name_or_path",
    "revision",
    "peft_version",
    "auto_mapping",
    "inference_mode",
    "task_type",
)


# The Pythons of the records that were published while a Python's patch level stood for the text (`former_hashes`).
PUBLISHED_PYTHONS = ("3.11.7", "3.12.3")


def identity(config: Config) -> dict[str, Any]:
    """The settings that decide the result of the cell's task (and of nothing else), ready for `content_hash`."""
    parts = {"task": config.task, **_PARTS[config.task](config)}
    settled: dict[str, Any] = _without_unused(as_plain(parts))
    return settled


def content_hash(obj: Any) -> str:
    """12 hex digits over canonical JSON: key order does not matter, enums count by name."""
    text = json.dumps(as_plain(obj), sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def cell_hash(config: Config) -> str:
    """The hash that the files of this cell bear."""
    return content_hash(identity(config))


def former_hashes(config: Config, *, other_pythons: bool = True) -> list[str]:
    """The hashes that this cell had in earlier versions, where they differ from today's.

    They named generated text by the running Python's patch level, and a local checkpoint by its absolute path, then by
    its files with the version of transformers that had saved them. A
    finished record stands for its cell whichever of the published Pythons it was made under; a folder that others are
    built on (`other_pythons=False`) must hold this Python's own text.
    """
    now = identity(config)
    return _hashes_but(now, _formerly(now, config, other_pythons))


def withdrawn_hashes(config: Config) -> list[str]:
    """The hashes of records of this cell that stand on text with wrong answers, before it was mended; mostly none.

    They are no records of the cell, but of the experiments that it serves.
    """
    now = identity(config)
    if not any(map(is_mended, _recipes(now))):
        return []
    wrong = _as_before(now, wrong_text, config)
    by_python = [partial(former_text, python=python, wrong=True) for python in PUBLISHED_PYTHONS]
    return _hashes_but(now, [wrong, *(_as_before(now, text, config) for text in by_python)])


def outdated_hashes(config: Config) -> list[str]:
    """The hashes of records of this cell from before what it times was mended (`arm_version`); mostly none.

    Like withdrawn ones they are no records of the cell, but of the experiments that it serves.
    """
    now = identity(config)
    before = {name: part for name, part in now.items() if name != "version"}
    if "arms" in now:
        before["arms"] = {name: own[:3] for name, own in now["arms"].items()}
    return [] if before == now else _hashes_but(now, [before, *_formerly(before, config)])


def text(config: Config) -> str | None:
    """What the items that a cell stands on are made from, as a hash; None for a cell that stands on none."""
    return next((str(found["text"]) for found in _recipes(identity(config))), None)


def cell_id(config: Config) -> str:
    """A readable name of at most 80 characters, safe as a file name; the hash beside it makes it unique."""
    slug = "-".join(re.sub(r"[^A-Za-z0-9._]+", "_", str(word)) for word in _words(config))
    return slug[:SLUG_CHARACTERS]


def record_path(config: Config) -> Path:
    """Where the record of this cell will be written."""
    return next(iter(known_records(config)))


def known_records(config: Config, *, other_pythons: bool = True) -> dict[Path, str]:
    """Where a record of this cell may be, and the hash that it has there: today's first, then `former_hashes`."""
    folder, name = Path(config.runs_dir) / "records" / config.task.name, cell_id(config)
    hashes = [cell_hash(config), *former_hashes(config, other_pythons=other_pythons)]
    return {folder / f"{name}-{known}.jsonl": known for known in hashes}


def backbone_dir(config: Config) -> Path:
    """Folder of the backbone that is pre-trained here."""
    return _folder("backbones", dataclasses.replace(config, task=Task.pretrain))


def pretrained_dir(config: Config) -> Path | None:
    """`backbone_dir` for a backbone that is fitted here; None for one that comes from elsewhere."""
    return backbone_dir(config) if config.model.is_made_here else None


def adapter_dir(config: Config, method: Method) -> Path:
    """Folder of the trained adapter of `method`."""
    return _folder("adapters", dataclasses.replace(config, task=Task.train, method=method))


def data_dir(config: Config) -> Path:
    """Folder of the training, validation and test items."""
    now, name = recipe(config.data, config.seed), f"{config.data.name}-s{config.seed}"
    before = now | {"text": former_text(now)}
    folders = [Path(config.runs_dir) / "data" / f"{name}-{content_hash(known)}" for known in (now, before)]
    return _first_there(folders)


def needs(config: Config) -> Iterator[Config]:
    """The cells that this one stands on, in order."""
    if config.task in (Task.pretrain, Task.layer, Task.kernel):
        return
    if config.model.is_made_here:
        yield dataclasses.replace(config, task=Task.pretrain)
    fitted: list[Method] = []
    if config.task is Task.evaluate:
        fitted = [config.method] if config.method.is_trained else []
    elif config.latency.trained_adapters and config.task not in (Task.train, Task.fit_speed):
        own = [config.method] if config.task is Task.drift else methods_of_arms(config).values()
        fitted = [method for method in own if method.has_experts]
    for method in fitted:
        yield dataclasses.replace(config, task=Task.train, method=method)


def with_needs(config: Config) -> Iterator[Config]:
    """This cell, and every one below it."""
    yield config
    for needed in needs(config):
        yield from with_needs(needed)


def methods_of_arms(config: Config) -> dict[str, Method]:
    """The methods of the arms that run, by name, in their order."""
    return {arm.method: config.methods[arm.method] for arm in config.arms.chosen.values()}


def versions_of_arms(config: Config) -> dict[str, int]:
    """Of the code of each arm that runs, by name (config.py)."""
    if config.task is Task.fit_speed:
        return {config.method.name: FIT_VERSION}
    chosen = config.arms.chosen.items()
    return {name: arm_version(arm, config.methods[arm.method]) for name, arm in chosen}


def file_hash(path: Path) -> str:
    """SHA-256 of a whole file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _folder(kind: str, config: Config) -> Path:
    known = known_records(config, other_pythons=False)
    return _first_there([Path(config.runs_dir) / kind / path.stem for path in known])


def _first_there(folders: list[Path]) -> Path:
    """The first, unless only another one exists."""
    return next((folder for folder in folders if folder.exists()), folders[0])


def _words(config: Config) -> list[object]:
    """What the name of a cell says."""
    task, method = config.task, config.method
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
    if task is Task.fit_speed:
        return [model, geometry, method.name, f"b{config.train.batch}", f"c{config.train.max_length}", *run]
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


def _recipes(value: Any) -> Iterator[dict[str, Any]]:
    """The recipes of data (items.py) in an identity."""
    if isinstance(value, dict):
        if "families" in value:
            yield value
        for inner in value.values():
            yield from _recipes(inner)


def _formerly(now: Any, config: Config, other_pythons: bool = True) -> list[Any]:
    """An identity as earlier versions of this code would have it."""
    saved = _as_saved(now, config)
    pythons = [None, *(PUBLISHED_PYTHONS if other_pythons else ())]
    return [*(_as_before(saved, partial(former_text, python=python), config) for python in pythons), saved]


def _hashes_but(now: Any, others: list[Any]) -> list[str]:
    """The hashes of these identities, each once and without today's."""
    return [known for known in dict.fromkeys(map(content_hash, others)) if known != content_hash(now)]


def _as_before(value: Any, text: Callable[[dict[str, Any]], str], config: Config) -> Any:
    """Settings as they were hashed before: text as `text` names it, a checkpoint by its path, all its config.json."""
    if isinstance(value, list):
        return [_as_before(inner, text, config) for inner in value]
    if not isinstance(value, dict):
        return value
    found = {key: _as_before(inner, text, config) for key, inner in value.items()}
    if "text" in found:
        found["text"] = text(found)
    if config.model.path is not None and "folder" in found:
        del found["folder"]
        found["path"] = str(Path(config.model.path).resolve())
    if config.model.path is not None and "shape" in found:
        found["shape"] = shape_of(config.model)
    return found


def _as_saved(value: Any, config: Config) -> Any:
    """Settings as they were hashed with a checkpoint's config.json byte for byte."""
    if not isinstance(value, dict) or config.model.path is None:
        return value
    found = {key: _as_saved(inner, config) for key, inner in value.items()}
    if "config.json" in found.get("files", ()):
        found["files"] |= {"config.json": _fingerprint(Path(config.model.path) / "config.json")}
    return found


def _pretrain(config: Config) -> dict[str, Any]:
    model = config.model
    settings = {"shape": model.shape, "dtype": model.dtype, "fit": _fit(config.pretrain)}
    return settings | {"text": pretraining_version(), "seed": model.seed}


def _train(config: Config) -> dict[str, Any]:
    experts = {"experts": _experts(config, config.method)} if config.method.has_experts else {}
    fit = {"data": recipe(config.data, config.seed), "fit": _fit(config.train), "seed": config.seed}
    return {"backbone": _backbone(config), "method": config.method, **experts, **fit}


def _evaluate(config: Config) -> dict[str, Any]:
    suite = as_plain(config.suite)
    if config.suite.path is not None:
        suite["path"] = _sets(Path(config.suite.path))
    parts = {"suite": suite, "seed": config.seed, "dtype": config.evaluate_dtype}
    if config.method.is_trained:
        how = {"strategy": config.evaluate_strategy, "restore": config.evaluate_restore}
        return {"train": _train(config), **how, **parts}
    # the plain backbone sees the test items only, whatever the adapters were trained on
    data = _test_items(config)
    return {"backbone": _backbone(config), "method": config.method.name, "data": data, **parts}


def _test_items(config: Config) -> dict[str, Any]:
    found = recipe(config.data, config.seed)
    return found | {"items": {"test": found["items"]["test"]}}


def _experts(config: Config, *methods: Method) -> dict[str, Any]:
    """The geometry, and what the folders hold, wherever they are, if a method has experts from there."""
    routed = any(method.routing is not Routing.none for method in methods)
    folders = [_lora(Path(folder)) for folder in config.experts.folders] if routed else []
    return as_plain(config.experts) | {"folders": folders, "missing_as_zeros": False}


def _lora(folder: Path) -> str:
    """Of a PEFT folder its configuration, in which lists have no order, and its weights."""
    declared = folder / "adapter_config.json"
    if not declared.is_file():
        return ""
    said = {k: sorted(v, key=str) if isinstance(v, list) else v for k, v in read_json(declared).items()}
    weights = [path for path in sorted(folder.glob("adapter_model.*")) if path.is_file()]
    times = [(path, path.stat().st_size, path.stat().st_mtime_ns) for path in weights]
    return content_hash([{k: v for k, v in said.items() if k not in TOLD_OF_LORA}, *starmap(_hash_at, times)])


@cache
def _hash_at(path: Path, size: int, time_ns: int) -> str:
    """`file_hash`, once for each state of a file."""
    return file_hash(path)


def _of_arms(config: Config, knobs: Any) -> dict[str, Any]:
    """Arms, adapters and workload, whatever of them is measured."""
    methods, versions = methods_of_arms(config), versions_of_arms(config)
    adapters: dict[str, Any] = {
        "experts": _experts(config, *methods.values()),
        "methods": {name: dataclasses.replace(m, learning_rate_factor=1.0) for name, m in methods.items()},
    }
    if config.latency.trained_adapters:
        adapters = {
            name: _train(dataclasses.replace(config, method=m)) if m.has_experts else None
            for name, m in methods.items()
        }
        # what they read while they are timed (bench/workload.py)
        adapters |= {"prompts": _test_items(config)}
    return {
        "backbone": _backbone(config),
        # a label is prose: it may change without the cell being measured again
        "arms": {
            name: [arm.method, arm.strategy, arm.runtime, *([versions[name]] if versions[name] > 1 else [])]
            for name, arm in config.arms.chosen.items()
        },
        "adapters": adapters,
        "batch": config.batch,
        "context": config.context,
        "knobs": knobs,
        **_repeat(config),
    }


def _timed(config: Config) -> Any:
    """The knobs of the timed pass, with what is read in place of where that is. Raises ValueError for a wrong file."""
    file = config.latency.prompts
    read = None if file is None else content_hash(rows.prompts(file))
    return dataclasses.replace(config.latency, prompts=read)


def _alone(config: Config, knobs: Any, **gates: Any) -> dict[str, Any]:
    """A linear or a kernel by itself: of the backbone its sizes alone."""
    experts = {"count": config.experts.count, "top_k": config.experts.top_k, **gates}
    model = {"shape": _sizes(config), "dtype": config.model.dtype}
    return {**model, "experts": experts, "knobs": knobs, **_repeat(config)}


def _drift(config: Config) -> dict[str, Any]:
    trained = config.latency.trained_adapters
    adapter = (
        _train(config) if trained else {"experts": _experts(config, config.method), "method": config.method}
    )
    prompts = {"prompts": _test_items(config)} if trained else {}
    parts = {"backbone": _backbone(config), "adapter": adapter, "context": config.context, **prompts}
    return {**parts, "knobs": config.drift, **_repeat(config)}


def _fit_speed(config: Config) -> dict[str, Any]:
    """How fast anything learns has no part in how fast it is trained."""
    own, lora = (
        dataclasses.replace(m, learning_rate_factor=1.0) for m in (config.method, config.methods["lora"])
    )
    fit, knobs = config.train, config.latency
    return {
        "backbone": _backbone(config),
        "adapters": {"experts": _experts(config, own), "method": own, "peft": lora},
        "step": {"batch": fit.batch, "length": fit.max_length, "bf16": fit.bf16},
        "knobs": {"steps": fit.steps, "rounds": knobs.rounds, "check_tokens": knobs.check_tokens},
        "version": FIT_VERSION,
        **_repeat(config),
    }


_PARTS: dict[Task, Callable[[Config], dict[str, Any]]] = {
    Task.pretrain: _pretrain,
    Task.train: _train,
    Task.evaluate: _evaluate,
    Task.latency: lambda config: _of_arms(config, _timed(config)),
    Task.memory: lambda config: _of_arms(config, {"block_tokens": config.latency.block_tokens}),
    Task.trace: lambda config: _of_arms(
        config, {"settle_tokens": config.latency.settle_tokens, "gates": config.latency.gates}
    ),
    Task.layer: lambda config: _alone(config, config.layer, gates=config.method.normalisation),
    Task.kernel: lambda config: _alone(config, config.kernel),
    Task.drift: _drift,
    Task.fit_speed: _fit_speed,
}


def _repeat(config: Config) -> dict[str, Any]:
    return {"device": config.device, "seed": config.seed, "replicate": config.replicate}


def _fit(fit: Fit) -> dict[str, Any]:
    return {key: value for key, value in as_plain(fit).items() if key != "save_every_steps"}


def _backbone(config: Config) -> dict[str, Any]:
    model = config.model
    if model.path is not None:
        return {"folder": _model(config), "dtype": model.dtype, "files": _files(Path(model.path))}
    if model.weights is Weights.hub:
        return {"hub": f"{model.hub_id}@{model.revision}", "dtype": model.dtype}
    if model.is_made_here:
        return {"pretrain": _pretrain(config)}
    return {"random": model.shape, "dtype": model.dtype, "seed": model.seed}


def _sizes(config: Config) -> dict[str, Any]:
    return _wherever_saved(shape_of(config.model))


def _wherever_saved(declared: dict[str, Any]) -> dict[str, Any]:
    """A checkpoint's config.json without what says where and with which version it was saved."""
    return {k: v for k, v in declared.items() if not k.startswith("_") and k != "transformers_version"}


def _files(folder: Path) -> dict[str, str]:
    """Fingerprints of a checkpoint's files; a folder that is missing has none, and backbone.py refuses it."""
    found = {
        path.name: _fingerprint(path)
        for pattern in WEIGHT_FILES
        for path in sorted(folder.glob(pattern))
        if path.is_file()
    }
    declared = folder / "config.json"
    if declared.is_file():
        found["config.json"] = content_hash(_wherever_saved(read_json(declared)))
    return found


def _sets(folder: Path) -> str:
    """What the data sets of a suite hold, wherever they are; of a folder that was not prepared suites.py says so."""
    manifest = folder / PREPARED
    sources = json.loads(manifest.read_bytes())["sources"] if manifest.is_file() else []
    return content_hash({source["repo"]: source["sha256"] for source in sources})


def _fingerprint(path: Path) -> str:
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as stream:
        for number in range(SAMPLES):
            start = number * SAMPLE_BYTES if size <= SAMPLES * SAMPLE_BYTES else number * (size // SAMPLES)
            stream.seek(start)
            digest.update(stream.read(SAMPLE_BYTES))
    return digest.hexdigest()[:12]
