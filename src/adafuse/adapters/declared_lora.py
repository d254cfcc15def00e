"""What adapter_config.json of a PEFT LoRA says: every field has its place, and one that has none is refused by name.

In: the file's fields, and the linears of a backbone. Out: why it is no plain LoRA (`faults`), or rank and scaling of
each linear that it means (`targeted`), chosen as PEFT chooses them. Nothing heavy is imported. Next: imports.py.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from functools import cache
from typing import Any

from adafuse.config import LINEARS
from adafuse.shape import widths

# PEFT's own, for fields that a file leaves out
RANK, ALPHA = 8, 8
# wider than any linear there is
MOST_RANK = 2**16
# what decides the product: read below
UNDERSTOOD = (
    *(
        "peft_type",
        "r",
        "lora_alpha",
        "use_rslora",
        "rank_pattern",
        "alpha_pattern",
        "init_lora_weights",
        "bias",
    ),
    *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"),
)
# what says where a folder came from, how it was trained, or something about a feature that is refused where it is used
IRRELEVANT = (
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode"),
    *(
        "lora_dropout",
        "megatron_core",
        "qalora_group_size",
        "runtime_config",
        "ensure_weight_tying",
        "eva_config",
    ),
)
REFUSED = {
    "use_dora": "DoRA has a magnitude beside the factors, which is no LoRA",
    "use_qalora": "QALoRA pools its input, which is no LoRA",
    "alora_invocation_tokens": "aLoRA acts on some tokens only",
    "modules_to_save": "whole modules were trained beside the factors",
    "trainable_token_indices": "embeddings were trained beside the factors",
    "layer_replication": "the backbone has layers repeated",
    "lora_bias": "B has a bias",
    "fan_in_fan_out": "the factors are of transposed weights, which no linear of this backbone has",
    "target_parameters": "it adapts parameters that are no linears",
    "megatron_config": "it is made for Megatron's parallel linears",
    "use_bdlora": "BD-LoRA's factors are block-diagonal",
    "arrow_config": "it is Arrow's router, not an expert",
    "kasa_config": "KaSA changes the backbone",
    "monteclora_config": "MonteCLoRA draws its factors",
    "velora_config": "VeLoRA keeps more than factors",
    "loftq_config": "LoftQ changes the backbone",
    "corda_config": "CorDA changes the backbone",
    "lora_ga_config": "LoRA-GA changes the backbone",
}
# initialisations that leave the backbone as it was
PLAIN_INIT = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
OTHERS = ("lm_head", "model.embed_tokens")
# for all patterns of a folder: what takes longer is meant to
SECONDS = 2.0
# a pattern and a name: the match, or None
Match = Callable[[str, str], Any]


def faults(declared: Mapping[str, Any]) -> Iterator[str]:
    """What of adapter_config.json this code does not do, or cannot know."""
    kind = declared.get("peft_type")
    if kind == "MIXLORA":
        yield "peft_type='MIXLORA' is a whole adapter, not an expert: adafuse.load(BACKBONE, adapter=FOLDER) reads it"
    if kind != "LORA":
        yield f"peft_type={kind!r} is not LORA: experts are LoRA on linears"
    yield from lora_faults(declared)
    for key in unknown(declared, (*UNDERSTOOD, *IRRELEVANT, *REFUSED)):
        yield f"{key} is a field that this code does not know: it may change what is computed"
    yield from _odd_names(declared)


def lora_faults(declared: Mapping[str, Any]) -> Iterator[str]:
    """Why factors are no plain LoRA on the backbone as it was, or have no rank and scaling."""
    for key, why in REFUSED.items():
        if declared.get(key):
            yield f"{key}: {why}, so it cannot be an expert"
    init = declared.get("init_lora_weights", True)
    if (init.lower() if isinstance(init, str) else init) not in PLAIN_INIT:
        yield (
            f"init_lora_weights={init!r} changes the backbone, to which the adapter then belongs: convert it with "
            "path_initial_model_for_weight_conversion when saving"
        )
    if declared.get("bias", "none") not in ("none", None):
        yield f"bias={declared['bias']!r}: biases were trained beside the factors, so it cannot be an expert"
    yield from _odd_numbers(declared)


def unknown(declared: Mapping[str, Any], known: Collection[str]) -> list[str]:
    """Fields beside the known ones that say something."""
    return [
        key for key, value in declared.items() if key not in known and value not in (None, False, "", [], {})
    ]


def _odd_numbers(declared: Mapping[str, Any]) -> Iterator[str]:
    for key, kind in (("rank_pattern", "ranks"), ("alpha_pattern", "alphas")):
        if not isinstance(declared.get(key) or {}, dict):
            yield f"{key} is no table of {kind} by module"
    ranks = {"r": declared.get("r", RANK), **(declared.get("rank_pattern") or {})}
    alphas = {"lora_alpha": declared.get("lora_alpha", ALPHA), **(declared.get("alpha_pattern") or {})}
    for key, value in ranks.items():
        if type(value) is not int or not 1 <= value <= MOST_RANK:
            yield f"{key}={repr(value)[:40]} is no rank: a whole number from 1 to {MOST_RANK}"
    for key, value in alphas.items():
        if type(value) not in (int, float) or not abs(value) < 1e9:
            yield f"{key}={str(value)[:40]} is no alpha: a number"
    if not isinstance(declared.get("use_rslora") or False, bool):
        yield f"use_rslora={declared['use_rslora']!r} is not true or false"


def _odd_names(declared: Mapping[str, Any]) -> Iterator[str]:
    targets, layers = declared.get("target_modules"), declared.get("layers_to_transform")
    if not targets:
        yield "target_modules is empty: name the linears that it adapts"
    for key in ("target_modules", "exclude_modules", "layers_pattern"):
        value = declared.get(key) or []
        if not isinstance(value, str) and not (
            isinstance(value, list) and all(isinstance(one, str) for one in value)
        ):
            yield f"{key} is neither a list of names nor a pattern"
    if layers is not None:
        if not all(type(one) is int for one in (layers if isinstance(layers, list) else [layers])):
            yield "layers_to_transform is neither a number nor a list of them"
        if isinstance(targets, str):
            yield "layers_to_transform goes with a list of target_modules, not with a pattern"


def targeted(declared: Mapping[str, Any], paths: Collection[str]) -> dict[str, tuple[int, float]]:
    """Rank and scaling of every linear that the configuration means, as PEFT chooses them. Raises ValueError."""
    match = _matcher(time.monotonic() + SECONDS)
    every = str(declared["target_modules"]).lower() == "all-linear"
    try:
        meant = [path for path in (*OTHERS, *paths) if every or _means(declared, path, match)]
        meant = [path for path in meant if not _excluded(declared, path, match)]
        others = [path for path in meant if path in OTHERS and not every]
        found = {path: _rank_and_scaling(declared, path, match) for path in meant if path not in OTHERS}
    except TimeoutError:
        raise ValueError("a pattern takes for ever: name the modules in a list") from None
    if others:
        raise ValueError(f"it adapts {others[0]}: experts are on {list(LINEARS)}")
    if not found:
        raise ValueError(f"target_modules names none of the backbone's linears ({list(LINEARS)})")
    return found


def _means(declared: Mapping[str, Any], path: str, match: Match) -> bool:
    targets, layers = declared["target_modules"], declared.get("layers_to_transform")
    if isinstance(targets, str):
        return match(targets, path) is not None
    if not _ends_with_any(path, targets):
        return False
    if layers is None or layers == []:
        return True
    patterns = declared.get("layers_pattern") or r"[^.]*"
    # the first number behind the first pattern that fits at all
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        found = match(rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\..*", path)
        if found is not None:
            return int(found["idx"]) in (layers if isinstance(layers, list) else [layers])
    return False


def _excluded(declared: Mapping[str, Any], path: str, match: Match) -> bool:
    excluded = declared.get("exclude_modules") or []
    if isinstance(excluded, str):
        return match(excluded, path) is not None
    return _ends_with_any(path, excluded)


def _ends_with_any(path: str, names: Collection[str]) -> bool:
    return any(path == name or path.endswith(f".{name}") for name in names)


def _rank_and_scaling(declared: Mapping[str, Any], path: str, match: Match) -> tuple[int, float]:
    def of(patterns: Mapping[str, Any] | None, default: Any) -> Any:
        """The value of the first pattern that the path ends with."""
        fitting = (value for key, value in (patterns or {}).items() if match(rf"(.*\.)?({key})", path))
        return next(fitting, default)

    rank = of(declared.get("rank_pattern"), declared.get("r", RANK))
    alpha = of(declared.get("alpha_pattern"), declared.get("lora_alpha", ALPHA))
    return rank, alpha / (math.sqrt(rank) if declared.get("use_rslora") else rank)


def _matcher(until: float) -> Match:
    """As re.fullmatch, which knows no limit of time; TimeoutError when it is `until`."""
    import regex

    @cache
    def compiled(pattern: str) -> Any:
        try:
            return regex.compile(pattern)
        except (regex.error, RecursionError, OverflowError):
            raise ValueError(f"{pattern[:40]!r} is no pattern") from None

    def match(pattern: str, path: str) -> Any:
        return compiled(pattern).fullmatch(path, timeout=max(until - time.monotonic(), 1e-3))

    return match


def linears(shape: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of every linear that can carry experts, by path."""
    return {
        f"model.layers.{block}.{'self_attn' if name in LINEARS[:4] else 'mlp'}.{name}": sizes
        for block in range(shape["num_hidden_layers"])
        for name, sizes in widths(shape).items()
    }
