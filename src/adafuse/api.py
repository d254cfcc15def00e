"""Dynamic adapters in one's own code: load or attach, fit, generate, look at the gates, save, merge, measure.

    import adafuse
    adapted = adafuse.load("models/llama", "adapters/mine")
    print(adapted.generate("Sort: cab\\n"))

In: an ordinary model of transformers, or a folder. Out: an `Adapted`, an nn.Module whose `model` is that very model
with the adapter inside; `detach` gives it back as it was, bit for bit. docs/api.md has an example of everything.
"""

from __future__ import annotations

import os
import re
import tempfile
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import fields
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import nn

from adafuse import files
from adafuse.adapted import PLAIN, Adapted, named
from adafuse.adapters import imports, store
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.layers import Site
from adafuse.adapters.published import is_published, load_published
from adafuse.bench import frame
from adafuse.bench.latency import Made, tokens_behind
from adafuse.cell import content_hash
from adafuse.compose import recipe, typed
from adafuse.config import (
    LINEARS,
    Config,
    Dtype,
    Experts,
    Fit,
    Latency,
    Method,
    Model,
    Runtime,
    StrategyName,
    Weights,
)
from adafuse.data import rows as data_rows
from adafuse.data import tokens
from adafuse.distributed import sharded
from adafuse.model import backbone
from adafuse.model.checkpoint import check_folder, dtype_of
from adafuse.model.declared import check_declared, check_rank, positions
from adafuse.refusals import refuse_geometry, refuse_method, refuse_use
from adafuse.shape import shape_of

ALL_LINEAR = "all-linear"


def load(
    model_or_folder: nn.Module | str | os.PathLike[str],
    adapter: str | os.PathLike[str] | None = None,
    *,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    any_base: bool = False,
    top_k: int | None = None,
) -> Adapted:
    """A saved adapter in its backbone, ready to generate; without `adapter` the plain backbone, with the same methods.

    `model_or_folder`: a causal LM of transformers (Llama, Mistral, Qwen2, Qwen3), a checkpoint folder, a hub id, or an
    adapter's folder alone, which names its backbone. `dtype`: None or "auto" is a checkpoint's own on a GPU, float32 on
    a CPU. `any_base`: also a backbone that the adapter was not made for. The published files of MixLoRA and MoLA are
    adapters too, and MoLA's do not say `top_k`. Raises ValueError, one line, for files that are not whole or do not fit
    each other.
    """
    if adapter is None and _is_adapter(model_or_folder):
        adapter, model_or_folder = (
            _path(model_or_folder),
            store.describe(Path(_path(model_or_folder)))["base_model"],
        )
    if adapter is not None and not isinstance(adapter, str | os.PathLike):
        raise ValueError(f"adapter={adapter!r} is no folder: give the path where it was saved")
    folder = None if adapter is None else Path(adapter).expanduser()
    if folder is not None and is_published(folder):
        model, tokenizer, name = _backbone(model_or_folder, tokenizer, dtype, device)
        return Adapted(model, tokenizer, load_published(model, folder, top_k), name)
    saved = None if folder is None else _saved(folder)
    model, tokenizer, name = _backbone(model_or_folder, tokenizer, dtype, device)
    if folder is None or saved is None:
        return Adapted(model, tokenizer, None, name)
    found = store.load(Adapter(model, *saved, seed=0), folder, any_base=any_base)
    return Adapted(model, tokenizer, found, name)


def attach(
    model_or_folder: nn.Module | str | os.PathLike[str],
    method: str = "adafuse",
    *,
    targets: str | Sequence[str] = ALL_LINEAR,
    rank: int = 16,
    experts: int | None = None,
    top_k: int | None = None,
    alpha: float | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Adapted:
    """A fresh adapter on a backbone; its experts start at zero, so that nothing changes before `fit`.

    `method` is a file of conf/method/: adafuse, adafuse_layerwise, mola, moral, pesc, mixlora or lora. `targets`:
    "all-linear", or some of q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj. `experts` and `top_k`: 8 and
    2, of lora 1. `alpha`: twice the rank. `options` are fields of config.Method, such as dropout=0.1,
    router_input="embedding" or null_expert=True. Raises ValueError, one line, before anything is loaded.
    """
    count = (1 if method == "lora" else 8) if experts is None else experts
    _refuse_counts(0, seed=seed)
    names = LINEARS if targets == ALL_LINEAR else (targets,) if isinstance(targets, str) else targets
    if not isinstance(names, Sequence):
        raise ValueError(f"targets={targets!r} is neither {ALL_LINEAR!r} nor a list of {list(LINEARS)}")
    geometry = Experts(list(names), rank, count, min(2, count) if top_k is None else top_k, alpha or 0.0)
    refuse_geometry(geometry)
    geometry.alpha = float(2 * rank if alpha is None else alpha)
    _refuse_unknown("attach", options)
    if method == "lora":
        if count != 1:
            raise ValueError(
                f"lora has one expert for every token, not {count}: leave experts= out, or use method='adafuse'"
            )
        options = {"alpha": geometry.alpha} | options
    chosen = recipe(method, geometry, **options)
    refuse_method(chosen, geometry)
    model, tokenizer, name = _backbone(model_or_folder, tokenizer, dtype, device)
    check_rank(model.config.to_dict(), chosen, geometry)
    return Adapted(model, tokenizer, Adapter(model, chosen, geometry, seed), name)


def from_loras(
    model_or_folder: nn.Module | str | os.PathLike[str],
    folders: Sequence[str | os.PathLike[str]],
    *,
    routing: str = "token",
    top_k: int | None = None,
    missing_as_zeros: bool = False,
    seed: int = 0,
    tokenizer: Any = None,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    **options: Any,
) -> Adapted:
    """PEFT LoRA folders of anybody's as experts 0, 1, ... behind a fresh router, which alone is trained by `fit`.

    `routing`: "token" (one gate for all layers, as adafuse), "layerwise" (a gate in every linear) or "blockwise" (a
    gate a block, as mixlora: folders on the MLP). Targets, rank and scaling are theirs; a linear that one of them lacks
    is refused, or zero with `missing_as_zeros`. `options` as for `attach`. Raises ValueError, one line, for what is no
    LoRA.
    """
    method = {"token": "adafuse", "layerwise": "adafuse_layerwise", "blockwise": "mixlora"}.get(routing)
    if method is None:
        raise ValueError(f"routing={routing!r} is none of ['token', 'layerwise', 'blockwise']")
    if not _all_paths(folders):
        raise ValueError(f"folders={folders!r} must be a list of PEFT LoRA folders, at least one")
    paths = [Path(folder).expanduser() for folder in folders]
    _refuse_unknown("from_loras", options)
    _refuse_counts(0, seed=seed)
    # before the weights of a folder are read
    named_by_path = isinstance(model_or_folder, str | os.PathLike)
    shape = shape_of(Model(path=_path(model_or_folder))) if named_by_path else {}
    for path in paths if shape else ():
        imports.inspect(path, shape)
    model, tokenizer, name = _backbone(model_or_folder, tokenizer, dtype, device)
    loras = [imports.inspect(path, model.config.to_dict()) for path in paths]
    imports.refuse_lacking(loras, missing_as_zeros)
    geometry = imports.geometry(loras, min(2, len(paths)) if top_k is None else top_k)
    refuse_geometry(geometry)
    chosen = recipe(method, geometry, **options)
    refuse_method(chosen, geometry)
    imports.refuse_misfits(loras, chosen, geometry)
    adapter = Adapter(model, chosen, geometry, seed)
    imports.load_experts(adapter, paths, missing_as_zeros)
    return Adapted(model, tokenizer, adapter, name)


def fit(
    adapted: Adapted,
    items: Iterable[Mapping[str, Any]],
    *,
    steps: int,
    learning_rate: float = 1e-3,
    batch: int = 8,
    accumulation: int = 1,
    warmup_steps: int = 0,
    weight_decay: float = 0.0,
    max_length: int = 512,
    only: str | None = None,
    folder: str | os.PathLike[str] | None = None,
    save_every_steps: int | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Train the adapter in place by transformers.Trainer; the losses by step, as a frame.

    `items` are {"prompt", "answer"} or {"prompt", "choices", "label"}; the loss is that of the answer alone. `only`:
    "router" leaves the experts as they are, as those of `from_loras` always are. With
    a `folder` checkpoints are kept there, and the same call goes on from the last. Raises ValueError, one line, for an
    item that is wrong, and where the fit diverges.
    """
    _refuse_unadapted(adapted)
    adapter, tokenizer = adapted.require_adapter(), adapted.require_tokenizer()
    save_every_steps = steps if save_every_steps is None else save_every_steps
    _refuse_counts(1, steps=steps, batch=batch, accumulation=accumulation, save_every_steps=save_every_steps)
    _refuse_counts(0, warmup_steps=warmup_steps, seed=seed)
    for name, rate in (("learning_rate", learning_rate), ("weight_decay", weight_decay)):
        if not isinstance(rate, int | float) or not 0 <= rate < float("inf"):
            raise ValueError(f"{name}={rate!r} must be a number of at least 0")
    if only not in (None, "router"):
        raise ValueError(f"only={only!r} is neither None (experts and routers) nor 'router'")
    if only == "router" and not adapter.routers():
        raise ValueError(f"method {adapter.method.name} has no router to train: leave only= out")
    # seconds, of which who only loads and generates should know nothing
    from adafuse.training import trainer

    limit = min(max_length, positions(adapted.model.config.to_dict()))
    encoded = tokens.training_rows(data_rows.checked(items), tokenizer, limit)
    if encoded.said.lost:
        warnings.warn(str(encoded.said), stacklevel=2)
    if folder is not None:
        _refuse_other_rows(Path(folder), encoded.rows)
    knobs = Fit(
        steps,
        batch,
        accumulation,
        learning_rate,
        weight_decay,
        warmup_steps,
        limit,
        save_every_steps,
    )
    with ExitStack() as stack:
        where = folder or stack.enter_context(tempfile.TemporaryDirectory())
        stack.enter_context(adapted.training_installed(only))
        fitted = trainer.fit(adapted.model, encoded.rows, knobs, Path(where), adapter, seed=seed)
    return pd.DataFrame(fitted.losses).set_index("step")


def _refuse_other_rows(folder: Path, rows: list[dict[str, list[int]]]) -> None:
    """Checkpoints go on with what they began with, or a fit that was finished would be given for another."""
    file, digest = folder / "rows.sha256", content_hash(rows)
    if file.exists() and file.read_text() != digest:
        raise ValueError(f"{folder} holds a fit of other items: name another folder, or delete it")
    files.put(file, digest)


def measure(
    adapted: Adapted,
    arms: str | Sequence[str],
    *,
    batch: int = 1,
    context: int = 64,
    rounds: int = 10,
    block_tokens: int = 64,
    check_tokens: int = 32,
    seed: int = 0,
) -> pd.DataFrame:
    """Milliseconds a token of arms, each checked against the fp32 reference before it is timed, in interleaved rounds.

    An arm is a strategy, "gather", or with a runtime, "gather/graph"; the backbone of every runtime is added. A row
    each: ms_per_token, low, high; ratio to the backbone in the same runtime, ratio_low, ratio_high; floor_ms, what
    reading the weights takes; check_*; reason, where there is no number. Intervals are of 95 % over the rounds of this
    process: another one may differ by a few per cent. `context` is that of the prompt, whose ids are seeded.
    """
    _refuse_unadapted(adapted)
    adapted.require_service()
    _refuse_counts(1, batch=batch, context=context, block_tokens=block_tokens)
    _refuse_counts(2, rounds=rounds)
    _refuse_counts(4, check_tokens=check_tokens)
    knobs = Latency(rounds, block_tokens, check_tokens=check_tokens)
    most = positions(adapted.model.config.to_dict())
    if context + tokens_behind(knobs) > most:
        raise ValueError(
            f"context={context} with {tokens_behind(knobs)} tokens behind it exceeds {most} positions"
        )
    parsed = {str(name): _arm(str(name)) for name in ([arms] if isinstance(arms, str) else arms)}
    if not parsed:
        raise ValueError("arms is empty: name at least one strategy, such as 'gather'")
    kinds = dict.fromkeys(runtime for _, runtime in parsed.values())
    plain = {frame.backbone(kind): Made(None, StrategyName.dense, kind) for kind in kinds}
    wanted = plain | {
        name: Made(adapted.require_adapter(), strategy, kind)
        for name, (strategy, kind) in parsed.items()
        if strategy is not None
    }
    refused = {
        name: reason
        for name, arm in wanted.items()
        if (reason := _refusal(arm, batch, adapted.model.device.type))
    }
    chosen = {name: arm for name, arm in wanted.items() if name not in refused}
    with adapted.disable_adapter() as model:
        return frame.measure(model, chosen, refused, batch, context, knobs, seed)


def _backbone(
    source: nn.Module | str | os.PathLike[str],
    tokenizer: Any,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
) -> tuple[nn.Module, Any, str]:
    """The model, its tokenizer if there is one, and the name under which it is saved."""
    _refuse_device(device)
    if tokenizer is not None and not hasattr(tokenizer, "is_fast"):
        raise ValueError(
            f"tokenizer={tokenizer!r:.60} is no tokenizer of transformers: give AutoTokenizer.from_pretrained(...)"
        )
    asked = (
        None
        if dtype in (None, "auto")
        else named(Dtype, "dtype", str(dtype).removeprefix("torch."), (Dtype.auto,))
    )
    if isinstance(source, nn.Module):
        return _given(source, tokenizer, asked, device)
    if not isinstance(source, str | os.PathLike):
        raise ValueError(f"{source!r} is no model: give one of transformers, a checkpoint folder or a hub id")
    where = str(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    path = Path(source).expanduser()
    on_hub = not path.exists() and re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) is not None
    if on_hub:
        usual = Dtype.float32 if where == "cpu" else Dtype.bfloat16
        model = Model(name=str(source), weights=Weights.hub, hub_id=str(source), dtype=asked or usual)
    else:
        check_folder(path)
        model = Model(
            name=path.name,
            path=str(path),
            dtype=asked or (Dtype.float32 if where == "cpu" else dtype_of(path)),
        )
    found, own = backbone.load(Config(model=model, device=where))
    return found, tokenizer or own, str(source)


def _given(
    model: nn.Module, tokenizer: Any, dtype: Dtype | None, device: str | torch.device | None
) -> tuple[nn.Module, Any, str]:
    if isinstance(model, Adapted):
        raise ValueError("this model has an adapter already: detach() gives the plain one")
    config = getattr(model, "config", None)
    if config is None or not hasattr(model, "generation_config"):
        raise ValueError(
            f"{type(model).__name__} is no causal LM of transformers: give one, or a checkpoint folder"
        )
    check_declared(config.to_dict(), type(model).__name__)
    if hasattr(model, "peft_config"):
        raise ValueError(
            "this model has an adapter of PEFT inside: merge_and_unload() or unload() gives the plain one"
        )
    if any(isinstance(module, Site) for module in model.modules()):
        raise ValueError("this model has an adapter inside already: detach() gives the plain one")
    spread = len(set(getattr(model, "hf_device_map", {}).values())) > 1
    if spread or sharded(model) or any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError(
            "the model is spread over devices (device_map, FSDP): load it on one, an adapter lies beside its weights"
        )
    model.to(device=device, dtype=None if dtype is None else getattr(torch, dtype.name))
    name = str(getattr(config, "_name_or_path", "") or type(model).__name__)
    if tokenizer is None and (Path(name) / "tokenizer.json").is_file():
        tokenizer = backbone.tokenizer_of(Model(name=name, path=name), None)
    return model, tokenizer, name


def _refuse_unadapted(adapted: object) -> None:
    if not isinstance(adapted, Adapted):
        raise ValueError(
            f"{type(adapted).__name__} is no adapted model: attach, load or from_loras gives one"
        )


def _refuse_counts(least: int, **counts: object) -> None:
    for name, value in counts.items():
        if not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r} must be a whole number of at least {least}")


def _refuse_unknown(where: str, options: Mapping[str, Any]) -> None:
    known = {one.name for one in fields(Method)} - {"name", "full", "learning_rate_factor"}
    if unknown := sorted(set(options) - known):
        raise ValueError(f"{where}() has no option {unknown[0]}: a method has {', '.join(sorted(known))}")


def _saved(folder: Path) -> tuple[Method, Experts]:
    described = store.describe(folder)
    try:
        method, experts = typed(Method, described["method"]), typed(Experts, described["experts"])
        refuse_geometry(experts)
        refuse_method(method, experts)
    except ValueError as error:
        raise ValueError(f"{folder / store.DESCRIPTION}: {error}") from None
    return method, experts


def _refuse_device(device: str | torch.device | None) -> None:
    """Raise ValueError for one that torch does not know, or that this machine does not have."""
    try:
        kind = "cpu" if device is None else torch.device(device).type
    except (RuntimeError, TypeError):
        raise ValueError(f"device={device!r} is none: say 'cpu', 'cuda' or 'cuda:1'") from None
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device={str(device)!r}, and this machine has no CUDA device: leave it out")


def _is_adapter(source: object) -> bool:
    return isinstance(source, str | os.PathLike) and (Path(_path(source)) / "router_config.json").is_file()


def _all_paths(folders: object) -> bool:
    found = (
        [] if isinstance(folders, str | os.PathLike) or not isinstance(folders, Iterable) else list(folders)
    )
    return bool(found) and all(isinstance(one, str | os.PathLike) for one in found)


def _path(source: Any) -> str:
    return str(Path(source).expanduser())


def _arm(name: str) -> tuple[StrategyName | None, Runtime]:
    """gather/graph as a strategy (None for the backbone) and a runtime."""
    strategy, _, runtime = name.partition("/")
    kind = named(Runtime, f"arm {name!r}: runtime", runtime or "eager")
    if strategy == frame.BACKBONE:
        return None, kind
    return named(StrategyName, f"arm {name!r}: strategy", strategy), kind


def _refusal(arm: Made, batch: int, where: str) -> str | None:
    try:
        refuse_use(
            PLAIN if arm.adapter is None else arm.adapter.method, arm.strategy, arm.runtime, batch, where
        )
    except ValueError as error:
        return str(error)
    return None
