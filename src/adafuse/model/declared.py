"""What config.json says of a model, checked before anything heavy is imported.

In: the sizes as a transformers config names them, or a `Config`. Out: nothing, or a ValueError of one line that names
the field. Where a field is missing transformers takes that of some other model. Next: checkpoint.py, which holds the
files against it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from itertools import chain
from operator import itemgetter
from pathlib import Path
from typing import Any

from adafuse.config import Config, ExpertKind, Experts, Method, Routing, Task
from adafuse.refusals import MOST
from adafuse.shape import shape_of, widths

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
SIZES = (
    *("vocab_size", "hidden_size", "intermediate_size"),
    *("num_hidden_layers", "num_attention_heads", "max_position_embeddings"),
)
ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "yarn": ("factor",),
    "longrope": ("short_factor", "long_factor"),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}
# what transformers reads beside them; other fields are somebody's notes
ROPE_NUMBERS = ("rope_theta", "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim")
FLAGS = ("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "use_cache")
DTYPES = ("float64", "float32", "float16", "bfloat16")
# their frequencies are others beyond some length
LENGTH_DEPENDENT = ("dynamic", "longrope")
ACTIVATIONS = (
    *("silu", "swish", "relu", "relu2"),
    *("gelu", "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "quick_gelu"),
)
OF_ARMS = (Task.latency, Task.memory, Task.trace)
FULL, SLIDING = "full_attention", "sliding_attention"

Shape = Mapping[str, Any]


def check_declared(declared: Shape, where: str) -> None:
    """Refuse the config.json of another architecture, of quantised weights, or one that asks for code of its own."""
    _refuse(where, _of_kind(declared))
    refuse_code(declared, where)
    check_sizes(declared, where)


def check_sizes(shape: Shape, where: str) -> None:
    """Refuse sizes that are missing, or that no model can be built with; `where` names them in the message."""
    for faults in (_of_counts, _of_kinds, _of_heads, _of_rope, _of_layers, _of_names):
        _refuse(where, faults(shape))


def check_cell(config: Config) -> None:
    """Refuse a cell whose prompts or experts do not fit its backbone. Raises ValueError, one line."""
    shape, knobs = shape_of(config.model), config.latency
    if config.task in (*OF_ARMS, Task.drift):
        decoded = knobs.settle_tokens + max(knobs.block_tokens, knobs.check_tokens)
        _refuse("the model", _of_length(shape, config.context, 0 if config.task is Task.drift else decoded))
    if config.task in (Task.layer, Task.kernel, Task.pretrain):
        return
    of_arms = [config.methods[config.arms.table[name].method] for name in config.arms.run]
    for method in of_arms if config.task in OF_ARMS else [config.method]:
        check_rank(shape, method, config.experts)


def check_rank(shape: Shape, method: Method, experts: Experts) -> None:
    """Refuse experts that are wider than what they are beside. Raises ValueError, one line."""
    _refuse(f"method {method.name}", _of_rank(shape, method, experts))


def positions(shape: Shape) -> int:
    """How many tokens a sequence may have for all its frequencies to be those of a short one."""
    key, most = "original_max_position_embeddings", shape["max_position_embeddings"]
    if _rope_type(shape) == "longrope":
        most = min(most, shape.get(key) or _rope(shape).get(key) or most)
    return int(most)


def refuse_code(declared: Shape, where: str | Path) -> None:
    """Code that comes with a checkpoint is never run; without it the same files may mean something else."""
    if declared.get("auto_map"):
        raise ValueError(
            f"{where}: it asks for code of its own (auto_map), which is never run: save it with a class of transformers"
        )


def _refuse(where: str, faults: Iterable[str]) -> None:
    """Raise ValueError with the first; those behind it may not be asked for any more."""
    for fault in faults:
        raise ValueError(f"{where}: {fault}")


def _of_kind(declared: Shape) -> Iterator[str]:
    names, kind = declared.get("architectures") or [], declared.get("model_type")
    if not isinstance(names, list):
        yield f"architectures={names!r} is not a list of names"
    # a folder may leave them out: its tensors tell
    of_another = names and not any(str(name).endswith("ForCausalLM") for name in names)
    if kind not in FAMILIES or of_another:
        yield f"it describes {names or kind}, not a causal LM of {list(FAMILIES)}"
    for key in ("quantization_config", "compression_config"):
        if declared.get(key) is not None:
            yield f"it has a {key}: de-quantise the weights and save them in bfloat16 without it"


def _of_length(shape: Shape, prompt: int, tokens: int) -> Iterator[str]:
    """RoPE that depends on the length has other frequencies for a long sequence than those under which the cache was
    filled: decoding across that length is no longer what the same sequence gives as a whole.
    """
    kind, most, first = _rope_type(shape), shape["max_position_embeddings"], positions(shape)
    if prompt > most:
        yield f"context={prompt} exceeds its max_position_embeddings={most}: set context={most} or less"
    if kind in LENGTH_DEPENDENT and prompt <= first < prompt + tokens:
        yield (
            f"rope_type={kind} changes its frequencies beyond {first} positions, which context={prompt} with {tokens} "
            f"tokens behind it crosses: set context={max(first - tokens, 1)} or less"
        )


def _of_rank(shape: Shape, method: Method, experts: Experts) -> Iterator[str]:
    """Plain LoRA may be wider than a linear: it has the budget of all experts together (conf/method/lora.yaml)."""
    rank, sizes = method.rank or experts.rank, widths(shape)
    targets = experts.targets if method.expert_targets is None else method.expert_targets
    if method.routing is Routing.none or method.expert_kind is ExpertKind.bottleneck or not targets:
        return
    name, narrow = min(((name, min(sizes[name])) for name in targets), key=itemgetter(1))
    if rank > narrow:
        yield f"experts of rank {rank} exceed the width {narrow} of {name}: set experts.rank={narrow} or less"


def _of_counts(shape: Shape) -> Iterator[str]:
    kind = shape.get("model_type")
    # what transformers takes for these where they are missing fits one size of model; Llama's rule fits all
    required = [*SIZES, *(["num_key_value_heads"] if kind != "llama" else [])]
    required += ["head_dim"] if kind == "qwen3" else []
    lacking = [key for key in required if shape.get(key) is None]
    if lacking:
        yield f"it has no {', '.join(lacking)}: copy the checkpoint's own config.json, or add it"
    for key in (*required, "num_key_value_heads", "head_dim", "sliding_window"):
        value = shape.get(key)
        if value is not None and (not _is_whole(value) or not 1 <= value <= MOST):
            yield f"{key}={value!r} is not a whole number from 1 to {MOST}"


def _of_kinds(shape: Shape) -> Iterator[str]:
    for key in FLAGS:
        if not isinstance(shape.get(key, False), bool):
            yield f"{key}={shape[key]!r} is not true or false"
    epsilon = shape.get("rms_norm_eps", 1e-6)
    if not _is_number(epsilon) or not 0 < epsilon < 1:
        yield f"rms_norm_eps={epsilon!r} is not a number between 0 and 1"
    for key in ("attention_dropout", "initializer_range"):
        share = shape.get(key)
        if share is not None and (not _is_number(share) or not 0 <= share <= 1):
            yield f"{key}={share!r} is not a number from 0 to 1"
    for key in ("dtype", "torch_dtype"):
        if shape.get(key) not in (None, *DTYPES):
            yield f"{key}={shape[key]!r} is not one of {list(DTYPES)}"


def _of_heads(shape: Shape) -> Iterator[str]:
    hidden, heads, head = shape["hidden_size"], shape["num_attention_heads"], _head(shape)
    groups = shape.get("num_key_value_heads") or heads
    if hidden % heads and (shape.get("head_dim") is None or shape.get("model_type") == "llama"):
        yield f"hidden_size={hidden} is no multiple of num_attention_heads={heads}"
    if heads % groups:
        yield f"num_attention_heads={heads} is no multiple of num_key_value_heads={groups}"
    if head % 2:
        yield f"head_dim={head} is odd, and RoPE turns pairs"


def _of_rope(shape: Shape) -> Iterator[str]:
    rope, key = _rope(shape), "rope_scaling" if shape.get("rope_scaling") else "rope_parameters"
    if not isinstance(rope, Mapping):
        yield f"{key}={rope!r} is not an object with a rope_type"
    kind = _rope_type(shape)
    if str(kind) not in ROPE_FIELDS or any(isinstance(value, Mapping) for value in rope.values()):
        yield f"{key} has rope_type={kind!r}, which is none of {list(ROPE_FIELDS)} for all blocks"
    lacking = [field for field in ROPE_FIELDS[kind] if rope.get(field) is None]
    if lacking:
        yield f"{key} of rope_type={kind} has no {', '.join(lacking)}"
    values = {"rope_theta": shape.get("rope_theta"), **rope}
    for field in (*ROPE_NUMBERS, *chain(*ROPE_FIELDS.values())):
        value = values.get(field)
        numbers = value if isinstance(value, list) else [value]
        if not all(one is None or _is_number(one) for one in numbers):
            yield f"{key} has {field}={value!r}, which is no number"
        if any(one is not None and one <= 0 for one in numbers):
            yield f"{key} has {field}={value!r}, which must be above 0"
    if (values.get("factor") or 1) < 1:
        yield f"{key} has factor={values['factor']}, which must be at least 1"
    for low, high in (("low_freq_factor", "high_freq_factor"), ("beta_slow", "beta_fast")):
        if low in rope and high in rope and rope[low] >= rope[high]:
            yield f"{key} has {low}={rope[low]}, which must be below {high}={rope[high]}"
    yield from _of_factors(shape, rope, key)


def _of_factors(shape: Shape, rope: Shape, key: str) -> Iterator[str]:
    half = _head(shape) // 2
    for field in ("short_factor", "long_factor"):
        if field in rope and (not isinstance(rope[field], list) or len(rope[field]) != half):
            yield f"{key} needs {half} numbers, half of head_dim, as its {field}"
    share = rope.get("partial_rotary_factor") or shape.get("partial_rotary_factor") or 1
    if share != 1:
        yield f"partial_rotary_factor={share}, but {list(FAMILIES)} turn whole heads"


def _of_layers(shape: Shape) -> Iterator[str]:
    """`layer_types` that the family does not follow would be dropped without a word."""
    kinds, kind, layers = shape.get("layer_types"), shape.get("model_type"), shape["num_hidden_layers"]
    if kinds is None:
        return
    if (
        not isinstance(kinds, list)
        or len(kinds) != layers
        or any(one not in (FULL, SLIDING) for one in kinds)
    ):
        yield f"layer_types must name {FULL} or {SLIDING} for each of num_hidden_layers={layers} blocks"
    window, used = shape.get("sliding_window"), shape.get("use_sliding_window", False)
    allowed = {FULL, SLIDING} if window and used else {FULL}
    if kind == "mistral":
        allowed = {SLIDING} if window else {FULL}
    other = sorted(set(kinds) - (allowed if kind != "llama" else {FULL}))
    if other:
        have = f"model_type={kind} with sliding_window={window} and use_sliding_window={used}"
        yield f"layer_types names {other}, which {have} does not have"


def _of_names(shape: Shape) -> Iterator[str]:
    act, rows = shape.get("hidden_act", ACTIVATIONS[0]), shape["vocab_size"]
    if act not in ACTIVATIONS:
        yield f"hidden_act={act} is not one of {list(ACTIVATIONS)}"
    yield from strange_ids(shape, rows)


def strange_ids(told: Mapping[str, Any], rows: int) -> Iterator[str]:
    """What a configuration calls a token and is none."""
    for key in ("pad_token_id", "bos_token_id", "eos_token_id"):
        ids = told.get(key)
        for one in ids if isinstance(ids, list) else [ids]:
            # -1 is how some say that there is none
            if one is not None and (not _is_whole(one) or one >= rows):
                yield f"{key}={one} is no token: vocab_size is {rows}"


def _rope(shape: Shape) -> Mapping[str, Any]:
    """As transformers chooses: the older key wins where a config.json has both."""
    return shape.get("rope_scaling") or shape.get("rope_parameters") or {}


def _rope_type(shape: Shape) -> Any:
    rope = _rope(shape)
    return rope.get("rope_type", rope.get("type", "default"))


def _head(shape: Shape) -> int:
    width: int = shape.get("head_dim") or shape["hidden_size"] // shape["num_attention_heads"]
    return width


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))
