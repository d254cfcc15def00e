"""A checkpoint folder, looked at before anything heavy is imported.

In: a folder in Hugging Face format, or the sizes as a transformers config names them. Out: nothing, or a ValueError of
one line that names the file or the field. config.json says which tensors there must be, and the headers of the weights
which there are: transformers would draw a missing tensor at random and drop one that it does not know, with a warning.
Next: backbone.py.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from math import prod
from operator import index
from pathlib import Path
from typing import Any

from adafuse.config import LINEARS, Dtype
from adafuse.files import printable, refuse_irregular
from adafuse.model.declared import check_declared, refuse_code, strange_ids
from adafuse.shape import read_json, refuse_unshown, widths

# in the folder of one that was fitted here, the file that stands for it
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# bytes of a number; whatever else a file may hold is packed by somebody's quantisation
DTYPES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
# a header of safetensors may not be longer
MAX_HEADER = 100_000_000
# what a message names of many
FEW = 3
# what a tokenizer was saved as before there was tokenizer.json
OLDER_TOKENIZERS = (("tokenizer.model",), ("vocab.json", "merges.txt"))
SPECIAL = tuple(f"{name}_token" for name in ("bos", "eos", "unk", "sep", "pad", "cls", "mask"))
# JSON that transformers reads when it is there
OPTIONAL = ("generation_config.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")
# older checkpoints hold what is computed today
_IGNORED = re.compile(r"rotary_emb\.inv_freq$")
_BLOCK = re.compile(r"^model\.layers\.(\d+)\.")


@dataclass(frozen=True)
class Stored:
    """A tensor as the header of its file describes it."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    # where its bytes begin in the file
    start: int = 0


def check_folder(folder: Path) -> None:
    """Refuse a folder that is no whole, plain checkpoint of a Llama-family causal LM. Raises ValueError, one line."""
    if not folder.is_dir():
        raise ValueError(
            f"model.path={folder} is not a folder: name a checkpoint folder in Hugging Face format"
        )
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ValueError(
            f"model.path={folder} has no config.json: it is not a checkpoint in Hugging Face format"
        )
    refuse_irregular(folder)
    declared = read_json(config_file)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"model.path={folder} holds adapter_config.json, with which transformers would load another model: merge "
            "the adapter into the weights, or move that file away"
        )
    check_declared(declared, str(config_file))
    for name in OPTIONAL:
        if (folder / name).is_file():
            told = read_json(folder / name)
            refuse_code(told, folder / name)
            for strange in strange_ids(told, declared["vocab_size"]) if name == OPTIONAL[0] else ():
                raise ValueError(f"{folder / name}: {strange}")
    _check_tensors(folder, declared, stored(folder))
    _check_tokenizer(folder, declared["vocab_size"])


def dtype_of(folder: Path) -> Dtype:
    """What most of the numbers of a checkpoint are stored as."""
    count = Counter[str]()
    for one in stored(folder).values():
        count[one.dtype] += prod(one.shape)
    halves = {"BF16": Dtype.bfloat16, "F16": Dtype.float16}
    return halves.get(count.most_common(1)[0][0], Dtype.float32)


def expected(shape: Mapping[str, Any]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor that a checkpoint of these sizes must hold, in the order of the model."""
    hidden, vocabulary, kind = shape["hidden_size"], shape["vocab_size"], shape["model_type"]
    biased = _biased(shape)
    yield "model.embed_tokens.weight", (vocabulary, hidden)
    for block in range(shape["num_hidden_layers"]):
        path = f"model.layers.{block}"
        yield f"{path}.input_layernorm.weight", (hidden,)
        for name, (inner, outer) in widths(shape).items():
            part = "self_attn" if name in LINEARS[:4] else "mlp"
            yield f"{path}.{part}.{name}.weight", (outer, inner)
            if name in biased:
                yield f"{path}.{part}.{name}.bias", (outer,)
        if kind == "qwen3":
            for name in ("q_norm", "k_norm"):
                yield f"{path}.self_attn.{name}.weight", (shape["head_dim"],)
        yield f"{path}.post_attention_layernorm.weight", (hidden,)
    yield "model.norm.weight", (hidden,)
    if not shape.get("tie_word_embeddings", False):
        yield "lm_head.weight", (vocabulary, hidden)


def stored(folder: Path) -> dict[str, Stored]:
    """The tensors in the files that transformers would read, by name. Raises ValueError, one line, for damage."""
    if (folder / WEIGHTS_FILE).is_file():
        return header(folder / WEIGHTS_FILE)
    index = folder / INDEX_FILE
    if not index.is_file():
        others = sorted(path.name for path in folder.glob("*.safetensors"))
        if others:
            raise ValueError(
                f"model.path={folder} has {first_few(others)} but neither {WEIGHTS_FILE} nor {INDEX_FILE}: rename the "
                "one file, or copy the index"
            )
        raise ValueError(
            f"model.path={folder} has no *.safetensors weights: save it with safe_serialization=True"
        )
    places = read_json(index).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(file, str) for file in places.values()):
        raise ValueError(f"{index} has no weight_map from tensors to files: copy it again")
    refuse_unshown((*places, *places.values()), index)
    if beyond := [file for file in places.values() if Path(file).name != file]:
        raise ValueError(f"{index} names {first_few(beyond)}, which leads out of its folder: copy it again")
    found: dict[str, Stored] = {}
    for file in sorted(set(places.values())):
        if not (folder / file).is_file():
            raise ValueError(f"{index} names {file}, which is not there: copy it again")
        held = header(folder / file)
        twice = [name for name in held if name in found]
        if twice:
            raise ValueError(
                f"{folder / file} has {first_few(twice)}, which is what {found[twice[0]].file} has: copy them again"
            )
        found |= held
    absent = [name for name in places if name not in found]
    if absent:
        raise ValueError(f"{index} names {first_few(absent)}, which is in none of its files: copy them again")
    return found


def first_few(names: Collection[str]) -> str:
    """Some of many names, and how many more there are."""
    more = f" and {len(names) - FEW} more" if len(names) > FEW else ""
    return printable(", ".join(list(names)[:FEW])) + more


def _check_tensors(folder: Path, shape: Mapping[str, Any], found: Mapping[str, Stored]) -> None:
    packed = {name: one for name, one in found.items() if one.dtype not in DTYPES}
    if packed:
        name, one = next(iter(packed.items()))
        raise ValueError(
            f"{folder / one.file} holds {printable(f'{name} as {one.dtype}')}: these are quantised weights, save "
            "them in bfloat16"
        )
    blocks = {int(match[1]) for match in map(_BLOCK.match, found) if match}
    # before all names are made, of which a wrong number may need very many
    if blocks and shape["num_hidden_layers"] > 2 * len(found):
        raise ValueError(_layers(folder, shape, blocks))
    wanted = dict(expected(shape))
    tied = {"lm_head.weight"} if shape.get("tie_word_embeddings", False) else set()
    missing = [name for name in wanted if name not in found]
    extra = [name for name in found if name not in wanted and name not in tied and not _IGNORED.search(name)]
    if missing or extra:
        said = [f"lacks {first_few(missing)}"] if missing else []
        said += [f"has {first_few(extra)}, which config.json does not describe"] if extra else []
        other = blocks and blocks != set(range(shape["num_hidden_layers"]))
        why = f" ({_layers(folder, shape, blocks)})" if other else ""
        raise ValueError(
            f"model.path={folder} {' and '.join(said)}{why}: copy the checkpoint again, or mend its names"
        )
    for name, want in wanted.items():
        if found[name].shape != want:
            raise ValueError(
                f"{folder / found[name].file} holds {name} as {list(found[name].shape)}, but config.json "
                f"({_sizes_of(name, shape)}) makes it {list(want)}"
            )


def _layers(folder: Path, shape: Mapping[str, Any], blocks: Collection[int]) -> str:
    return f"config.json says num_hidden_layers={shape['num_hidden_layers']}, the weights have {len(blocks)} blocks"


def _biased(shape: Mapping[str, Any]) -> tuple[str, ...]:
    """Linears with a bias: each family has a rule of its own."""
    kind = shape["model_type"]
    if kind == "qwen2":
        return LINEARS[:3]
    attention = LINEARS[:4] if kind in ("llama", "qwen3") and shape.get("attention_bias") else ()
    return (*attention, *(LINEARS[4:] if kind == "llama" and shape.get("mlp_bias") else ()))


def _sizes_of(name: str, shape: Mapping[str, Any]) -> str:
    """The fields that make a tensor's shape, as config.json has them."""
    part = name.split(".")[-2]
    keys = {
        **dict.fromkeys(("q_proj", "o_proj"), ("num_attention_heads", "head_dim", "hidden_size")),
        **dict.fromkeys(("k_proj", "v_proj"), ("num_key_value_heads", "head_dim", "hidden_size")),
        **dict.fromkeys(LINEARS[4:], ("intermediate_size", "hidden_size")),
        **dict.fromkeys(("q_norm", "k_norm"), ("head_dim",)),
        **dict.fromkeys(("embed_tokens", "lm_head"), ("vocab_size", "hidden_size")),
    }.get(part, ("hidden_size",))
    return ", ".join(f"{key}={shape[key]}" if shape.get(key) else f"no {key}" for key in keys)


def header(file: Path) -> dict[str, Stored]:
    """What a file of safetensors says that it holds, held against its size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        if start == b"version ":
            raise ValueError(
                f"{file} is a Git LFS pointer, not weights: run git lfs pull, or download it whole"
            )
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, MAX_HEADER):
            raise ValueError(f"{file} is damaged or truncated (its header does not fit): copy it again")
        text = stream.read(length)
    try:
        told = json.loads(text)
        told.pop("__metadata__", None)
        spans = {name: tuple(map(index, one["data_offsets"])) for name, one in told.items()}
        found = {
            name: Stored(
                file.name, str(one["dtype"]), tuple(map(index, one["shape"])), 8 + length + spans[name][0]
            )
            for name, one in told.items()
        }
        end = 8 + length + max((last for _, last in spans.values()), default=0)
    except (ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        raise ValueError(f"{file} is damaged (its header cannot be read): copy it again") from None
    refuse_unshown(found, file)
    if end != size:
        raise ValueError(f"{file} is damaged or truncated: it has {size} bytes and its header tells of {end}")
    for name, one in found.items():
        first, last = spans[name]
        if one.dtype in DTYPES and (first < 0 or last - first != DTYPES[one.dtype] * prod(one.shape)):
            raise ValueError(
                f"{file} is damaged: {name} has {last - first} bytes, which is not {list(one.shape)}"
            )
    return found


def _check_tokenizer(folder: Path, rows: int) -> None:
    file = folder / "tokenizer.json"
    if not file.is_file():
        if any(all((folder / name).is_file() for name in names) for names in OLDER_TOKENIZERS):
            return  # transformers makes a fast one of them; backbone.py counts its ids
        raise ValueError(
            f"model.path={folder} has no tokenizer.json: save the tokenizer into the same folder"
        )
    read_json(file)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
        ids = tokenizer.get_vocab(with_added_tokens=True)
    except Exception as error:  # the library has no class of its own for it
        raise ValueError(f"{file} is no tokenizer ({one_line(error)}): copy it again") from None
    if dropout := getattr(tokenizer.model, "dropout", None):
        raise ValueError(
            f"{file}: its model has dropout={dropout:g}, by which a text is cut otherwise each time: set it to null"
        )
    refuse_ids(ids, rows, str(file))
    named = folder / "tokenizer_config.json"
    if named.is_file():
        refuse_ids(ids | _added(read_json(named), ids, named), rows, str(named))


def _added(settings: Mapping[str, Any], ids: Mapping[str, int], file: Path) -> dict[str, int]:
    """Special tokens that a tokenizer gets when it is made, because it lacks them, and the ids that they get."""
    texts: list[str] = []
    for key in SPECIAL:
        value = settings.get(key)
        text = value.get("content") if isinstance(value, dict) else value
        if value is not None and not isinstance(text, str):
            raise ValueError(f"{file}: {key}={value!r} is no token: write its text")
        if text is not None and text not in (*ids, *texts):
            texts.append(text)
    return {text: number for number, text in enumerate(texts, start=len(ids))}


def refuse_ids(ids: Mapping[str, int], rows: int, where: str) -> None:
    """Refuse a vocabulary with ids that the embedding has no row for."""
    beyond = sorted((number, text) for text, number in ids.items() if number >= rows)
    if beyond:
        number, text = beyond[-1]
        raise ValueError(
            f"{where} has {len(beyond)} tokens beyond the {rows} rows of the embedding (config.json's vocab_size), "
            f"such as {text!r} with id {number}: resize the embedding, or take the tokenizer of this checkpoint"
        )


def one_line(error: BaseException) -> str:
    """What another library said, without its paragraphs."""
    return printable(" ".join(str(error).split()))[:200] or type(error).__name__
