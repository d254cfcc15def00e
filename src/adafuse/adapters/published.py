"""Whole adapters in the files of MixLoRA (MoE-PEFT's too) and of MoLA: experts, routers, and LoRA beside them.

In: a folder with `adapter_config.json` and `adapter_model.bin` or `.safetensors`, and a backbone. Out: an `Adapter`
that computes what they compute. MixLoRA's files say everything; MoLA's say neither counts, which the tensors tell, nor
the top-k, which is asked for. A field that is not known is refused by name, as in PEFT's. Next: store.py, ours.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from adafuse.adapters import declared_lora, imports
from adafuse.adapters.adapter import Adapter
from adafuse.config import LINEARS, ExpertKind, Experts, Method, Routing
from adafuse.model.checkpoint import first_few
from adafuse.shape import read_json

MIXLORA = "MIXLORA"
# softmax over all, the top k, divided by their sum; in its first versions under Mixtral's name
TOP_K = ("mixlora", "mixtral")
OF_LORA = (
    "r",
    "lora_alpha",
    "use_rslora",
    "bias",
    "peft_type",
    *declared_lora.IRRELEVANT,
    *declared_lora.REFUSED,
    "lora_init",
)
OF_MIXLORA = (
    *("target_modules", "expert_lora", "routing_strategy", "num_experts", "top_k", "act_fn", "jitter_noise"),
    *("router_aux_loss_coef", "router_init_range", "router_loss", "router_dyn_loss_coef"),
)
# experts; more would be somebody's joke
MOST = 1024
OLD_NAMES = {"w1_proj": "gate_proj", "w2_proj": "down_proj", "w3_proj": "up_proj"}
_FACTOR = r"(?P<what>lora_[AB])\.weight"
_MIXLORA_KEYS = [
    re.compile(rf"mixlora\.layers\.(?P<block>\d+)\.{place}")
    for place in (
        rf"(?P<part>self_attn)\.(?P<name>\w+)\.{_FACTOR}",
        rf"mlp\.(?P<name>\w+)\.experts\.(?P<e>\d+)\.{_FACTOR}",
        rf"experts\.(?P<e>\d+)\.(?P<name>\w+)\.{_FACTOR}",
        r"(?:mlp\.moe_)?gate\.(?P<what>weight)",
    )
]
_MOLA_KEYS = [
    re.compile(r"(?P<path>.+)\.(?P<what>lora_[AB])(?:\.default)?_(?P<e>\d+)\.weight"),
    re.compile(r"(?P<path>.+)\.\w*router\w*(?:\.default)?\.(?P<what>weight)"),
]
# path of a linear or of what a router serves; the expert, or None; lora_A, lora_B or weight
Place = tuple[str, int | None, str]
Given = dict[Place, Tensor]
# rank and scaling of the factors at a path, of an expert or (None) beside the experts
Said = Callable[[str, int | None], tuple[int, float]]


def load_published(model: nn.Module, folder: Path, top_k: int | None = None) -> Adapter:
    """The adapter in `folder` on `model`. Raises ValueError, one line. `top_k` is for MoLA, whose files lack it."""
    declared, tensors = read_json(folder / imports.CONFIG), imports.tensors_of(folder)
    try:
        if declared.get("peft_type") == MIXLORA:
            return _mixlora(model, folder, declared, tensors)
        return _mola(model, folder, declared, tensors, top_k)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}".replace(f"{folder}: {folder}", str(folder))) from None


def is_published(folder: Path) -> bool:
    """MixLoRA's by its configuration, or MoLA's by its tensors' names."""
    if not (folder / imports.CONFIG).is_file():
        return False
    if read_json(folder / imports.CONFIG).get("peft_type") == MIXLORA:
        return True
    return any(map(_MOLA_KEYS[1].fullmatch, imports.names_of(folder)))


def _mixlora(
    model: nn.Module, folder: Path, declared: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> Adapter:
    inner, targets = declared.get("expert_lora") or {}, declared.get("target_modules") or []
    if not isinstance(inner, dict) or not isinstance(targets, dict | list):
        raise ValueError("expert_lora or target_modules is of another kind than MixLoRA writes")
    _refuse(declared, (*OF_LORA, *OF_MIXLORA))
    _refuse(inner, OF_LORA)
    for fault in _other_routing(declared, model.config.hidden_act):
        raise ValueError(fault)
    names = map(str, targets if isinstance(targets, list) else filter(targets.get, targets))
    meant = {OLD_NAMES.get(name, name) for name in names}
    static, of_expert = map(_rank_and_scaling, (declared, {**declared, **inner}))
    method = Method(
        name="mixlora",
        routing=Routing.blockwise,
        expert_kind=ExpertKind.mlp_lora,
        static_targets=[name for name in LINEARS[:4] if name in meant],
        static_rank=static[0],
        static_alpha=static[1] * static[0],
    )
    rank, scaling = of_expert
    count, top_k = declared["num_experts"], declared.get("top_k") or 2
    adapter = Adapter(model, method, Experts(list(LINEARS[4:]), rank, count, top_k, scaling * rank), seed=0)
    adapted = [path for path in adapter.loras() if path.rpartition(".")[2] in meant]
    given = dict(_of_mixlora(tensors))
    return _filled(adapter, folder, given, adapted, lambda _, e: static if e is None else of_expert)


def _other_routing(declared: Mapping[str, Any], activation: str) -> Iterator[str]:
    strategy, count = declared.get("routing_strategy"), declared.get("num_experts")
    top_k = declared.get("top_k") or 2
    if strategy not in TOP_K:
        yield f"routing_strategy={strategy!r} is another routing than top-k ({TOP_K[0]})"
    if declared.get("act_fn") not in (None, activation):
        yield f"act_fn={declared['act_fn']!r} is not the backbone's {activation}"
    if declared.get("jitter_noise"):
        yield "jitter_noise draws at random what the router reads"
    if type(count) is not int or type(top_k) is not int or not 1 <= top_k <= count <= MOST:
        yield f"num_experts={count!r} and top_k={top_k!r} are no numbers of experts"


def _of_mixlora(tensors: Mapping[str, Tensor]) -> Iterator[tuple[Place, Tensor]]:
    for key, tensor in tensors.items():
        of = _parsed(key, _MIXLORA_KEYS, "MixLoRA")
        name = OLD_NAMES.get(of.get("name", ""), of.get("name", ""))
        words = ("model.layers", of["block"], of.get("part", "mlp"), name)
        yield (".".join(word for word in words if word), _number(of), of["what"]), tensor


def _mola(
    model: nn.Module,
    folder: Path,
    declared: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    top_k: int | None,
) -> Adapter:
    _refuse({**declared, "r": 1}, (*OF_LORA, *declared_lora.UNDERSTOOD, "number_experts", "top_k"))
    given: Given = {}
    for key, tensor in tensors.items():
        of = _parsed(imports.plain_name(key), _MOLA_KEYS, "MoLA")
        if (place := (of["path"], _number(of), of["what"])) in given:
            raise ValueError(f"it holds {key} twice")
        given[place] = tensor
    linears, depth = declared_lora.linears(model.config.to_dict()), model.config.num_hidden_layers
    if strange := sorted({path for path, _, _ in given} - linears.keys()):
        raise ValueError(
            f"it adapts {first_few(strange)}, which the backbone does not have among its linears"
        )
    quarters, ranks = _quarters(given, depth), _ranks(declared, depth)
    k = _one(declared.get("top_k") or top_k)
    if type(k) is not int or not 1 <= k <= min(quarters):
        raise ValueError(f"its files do not say how many of {min(quarters)} experts a token has: pass top_k=")
    alpha = float(declared.get("lora_alpha", declared_lora.ALPHA))
    names = [name for name in LINEARS if any(path.endswith(f".{name}") for path, _, _ in given)]
    by_quarter = None if len(set(quarters)) == 1 else quarters
    method = Method(name="mola", routing=Routing.layerwise, experts_by_quarter=by_quarter)
    adapter = Adapter(model, method, Experts(names, max(ranks), max(quarters), k, alpha), seed=0)

    def said(path: str, _: int | None) -> tuple[int, float]:
        rank = ranks[int(path.split(".")[2])]
        return rank, alpha / rank

    return _filled(adapter, folder, given, adapter.loras(), said)


def _quarters(given: Given, depth: int) -> list[int]:
    """Experts of the blocks of each quarter of the depth."""
    counts = [0] * depth
    for path, e, _ in given:
        block = int(path.split(".")[2])
        counts[block] = max(counts[block], (e or 0) + 1)
    found: dict[int, int] = {}
    for block, count in enumerate(counts):
        if not 1 <= count <= MOST or found.setdefault(block * 4 // depth, count) != count:
            raise ValueError(
                f"its blocks have {counts} experts, and ours one number in each quarter of the depth"
            )
    return [found.get(quarter, counts[-1]) for quarter in range(4)]


def _ranks(declared: Mapping[str, Any], depth: int) -> list[int]:
    said = declared.get("r", declared_lora.RANK)
    ranks = said if isinstance(said, list) else [said] * depth
    if len(ranks) != depth or not all(
        type(rank) is int and 1 <= rank <= declared_lora.MOST_RANK for rank in ranks
    ):
        raise ValueError(f"r={str(said)[:40]} is no rank, and none for each of {depth} blocks")
    return ranks


def _one(value: Any) -> Any:
    """What a list has in all of its places."""
    return value[0] if isinstance(value, list) and value and value == value[:1] * len(value) else value


def _filled(adapter: Adapter, folder: Path, given: Given, adapted: Collection[str], said: Said) -> Adapter:
    """Everything that is given in its place; experts of linears that are not `adapted` are zero."""
    loras, statics, routers = adapter.loras(), adapter.statics(), adapter.routers()
    wanted = [(path, e) for path in adapted for e in range(loras[path].count)] + [
        (path, None) for path in statics
    ]
    places: list[Place] = [(path, e, what) for path, e in wanted for what in ("lora_A", "lora_B")]
    _refuse_other(given, [*places, *((path, None, "weight") for path in routers)])
    sizes = declared_lora.linears(adapter.model.config.to_dict())
    for path, e in wanted:
        rank, _ = said(path, e)
        _check(given[path, e, "lora_A"], (rank, sizes[path][0]), path)
        _check(given[path, e, "lora_B"], (sizes[path][1], rank), path)

    def factors(paths: Collection[str], e: int | None) -> imports.Factors:
        return {p: (given[p, e, "lora_A"], given[p, e, "lora_B"], said(p, e)[1]) for p in paths}

    for e in range(adapter.geometry.count):
        own = {path: lora for path, lora in loras.items() if e < lora.count}
        imports.fill(own, e, folder, factors([path for path in adapted if path in own], e))
    imports.fill(statics, 0, folder, factors(statics, None))
    for path, router in routers.items():
        _check(given[path, None, "weight"], tuple(router.weight.shape), path)
        router.weight.data.copy_(given[path, None, "weight"])
    return adapter


def _parsed(key: str, patterns: Collection[re.Pattern[str]], whose: str) -> dict[str, str]:
    for pattern in patterns:
        if found := pattern.fullmatch(key):
            return found.groupdict()
    raise ValueError(f"it holds {key}, which is no part of {whose}'s layout")


def _number(of: Mapping[str, str]) -> int | None:
    return int(of["e"]) if "e" in of else None


def _rank_and_scaling(declared: Mapping[str, Any]) -> tuple[int, float]:
    rank, alpha = declared.get("r", declared_lora.RANK), declared.get("lora_alpha", declared_lora.ALPHA)
    return rank, alpha / (math.sqrt(rank) if declared.get("use_rslora") else rank)


def _refuse(declared: Mapping[str, Any], known: tuple[str, ...]) -> None:
    for fault in declared_lora.lora_faults(declared):
        raise ValueError(fault)
    for key in declared_lora.unknown(declared, known):
        raise ValueError(f"{key} is a field that this code does not know: it may change what is computed")


def _refuse_other(given: Given, wanted: Collection[Place]) -> None:
    def named(places: list[Place]) -> str:
        return first_few([".".join(str(word) for word in place if word is not None) for place in places])

    known = set(wanted)
    if lacking := [place for place in wanted if place not in given]:
        raise ValueError(f"it lacks {named(lacking)}: copy it again")
    if beyond := [place for place in given if place not in known]:
        raise ValueError(f"it holds {named(beyond)}, which its configuration or the backbone does not have")


def _check(tensor: Tensor, shape: tuple[int, ...], path: str) -> None:
    if tuple(tensor.shape) != shape or not tensor.is_floating_point():
        raise ValueError(
            f"{path} has {tensor.dtype} {list(tensor.shape)}, where its configuration and the backbone make it "
            f"{list(shape)}"
        )
