"""The frozen language model: from a local folder, from the hub, seeded random by shape, or pre-trained here.

In: a `Config`. Out: a causal LM of transformers in eval mode and its tokenizer. `check_source` looks at a folder before
anything heavy is imported: torch and transformers, which take seconds, come with the functions that need them.
Next: llama.py, adapters/.
"""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adafuse.config import Config, Dtype, Model, Weights
from adafuse.distributed import MAIN_PROCESS, in_turn, own_part
from adafuse.model.checkpoint import WEIGHTS_FILE as WEIGHTS_FILE
from adafuse.model.checkpoint import check_folder, first_few, one_line, refuse_ids
from adafuse.model.declared import FAMILIES, check_declared, check_sizes

# what a config.json may say of how the model is called, and not of what it is
PLAIN = {"return_dict": True, "output_hidden_states": False, "output_attentions": False}

# classes that add nothing to tokenizer.json
WHOLE_IN_JSON = ("PreTrainedTokenizerFast", "TokenizersBackend")

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast


def check_source(model: Model) -> None:
    """Refuse a folder that is no Llama-family causal LM, or a shape that is missing. Raises ValueError, one line."""
    if model.path is not None:
        if model.path == f"models/{model.name}" and not Path(model.path).exists():
            raise ValueError(
                f"there is no {model.path}: scripts/prepare.py makes smollm2, llama2_7b and mistral_7b; or name your "
                "own, model.path=FOLDER"
            )
        check_folder(Path(model.path))
    elif model.weights is Weights.hub:
        if not model.hub_id:
            raise ValueError(
                f"model {model.name} has no hub_id and no folder: add model.path=FOLDER, a checkpoint in Hugging Face "
                "format, or set model.weights=random"
            )
    elif model.shape.get("model_type") not in FAMILIES:
        raise ValueError(
            f"model.shape.model_type must be one of {list(FAMILIES)} for model.weights={model.weights.name}"
        )
    else:
        check_sizes(model.shape, "model.shape")
    if model.path is None and model.dtype is Dtype.auto:
        raise ValueError(
            "model.dtype=auto is that of a checkpoint folder: add model.path=FOLDER, or name a dtype"
        )


def load(
    config: Config, pretrained: Path | None = None, *, sharded: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The backbone on its device, frozen, in eval mode, and its tokenizer with left padding.

    `pretrained` is the folder of a backbone that was fitted here, for `weights=scratch`. `sharded`: every process
    keeps a part on its device, and all of a block while the block runs. Raises ValueError, one line.
    """
    from adafuse.model.finite import require_finite
    from adafuse.model.llama import blocks_of

    where = device(config)
    with in_turn(where) if sharded else nullcontext() as shard:
        backbone, tokenizer = _read(config.model, pretrained, where)
        backbone.requires_grad_(False)
        if shard is None:
            backbone = backbone.to(where)
        else:
            for module in (*blocks_of(backbone), backbone):
                shard(module)
    if sharded and MAIN_PROCESS:
        own = sum(own_part(p).numel() for p in backbone.parameters())
        print(f"FSDP: this process holds {own:,} of the backbone's {backbone.num_parameters():,} numbers")
    require_finite(backbone, f"copy {pretrained or config.model.path or config.model.name} again")
    return backbone.eval(), tokenizer


def _read(
    model: Model, pretrained: Path | None, where: str
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """As it comes from its files, or is drawn on the device `where`."""
    if model.path is None and model.weights is Weights.random:
        return build_random(model, where), byte_tokenizer()
    if model.path is None and model.weights is Weights.scratch:
        assert pretrained is not None, "a backbone from scratch is fitted first"
        return from_folder(str(pretrained), None, model)
    return from_folder(model.path or str(model.hub_id), model.revision, model)


def from_folder(
    source: str, revision: str | None, model: Model
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A checkpoint folder or hub id in `model.dtype`; no code of its own is ever run.

    Raises ValueError, one line, if there is none, or if it is not the whole of what its config.json describes.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    plainly = {"revision": revision or "main", "trust_remote_code": False}
    dtype = getattr(torch, model.dtype.name)
    try:
        declared = AutoConfig.from_pretrained(source, **plainly)
        check_declared(declared.to_dict(), source)
        for key, value in PLAIN.items():
            setattr(declared, key, value)
        tokenizer = _tokenizer(source, **plainly)
        backbone, found = AutoModelForCausalLM.from_pretrained(
            source,
            config=declared,
            dtype=dtype,
            attn_implementation="sdpa",
            output_loading_info=True,
            **plainly,
        )
    except Exception as error:  # transformers, tokenizers and safetensors have no class in common
        raise ValueError(
            f"cannot load the backbone from {source} ({one_line(error)}): name another checkpoint folder or hub id"
        ) from error
    for what, names in found.items():
        if names:
            raise ValueError(
                f"{source} is not what its config.json describes: {what} {first_few(sorted(map(str, names)))}"
            )
    _refuse_untied(backbone, source)
    refuse_ids(
        tokenizer.get_vocab(), backbone.get_input_embeddings().num_embeddings, f"the tokenizer of {source}"
    )
    return backbone, tokenizer


def tokenizer_of(model: Model, pretrained: Path | None) -> PreTrainedTokenizerFast:
    """The tokenizer that `load` gives, alone."""
    if model.path is None and model.weights is Weights.random:
        return byte_tokenizer()
    source = pretrained if model.is_made_here else model.path or model.hub_id
    return _tokenizer(str(source), revision=model.revision or "main", trust_remote_code=False)


def _tokenizer(source: str, **plainly: Any) -> PreTrainedTokenizerFast:
    """Where the files say that tokenizer.json is all of it, they are believed: for some kinds of model transformers
    would take a class of its own, which cuts texts otherwise and has tokens more.
    """
    from transformers import AutoTokenizer, PreTrainedTokenizerFast
    from transformers.models.auto.tokenization_auto import get_tokenizer_config

    tokenizer: PreTrainedTokenizerFast
    try:
        named = get_tokenizer_config(source, revision=plainly["revision"]).get("tokenizer_class")
        maker = PreTrainedTokenizerFast if named in WHOLE_IN_JSON else AutoTokenizer
        tokenizer = maker.from_pretrained(source, padding_side="left", **plainly)
    except Exception as error:  # as above
        raise ValueError(f"the tokenizer of {Path(source).name}: {one_line(error)}") from error
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def _refuse_untied(backbone: PreTrainedModel, source: str) -> None:
    """transformers leaves an output of its own where config.json says that there is none, with a warning."""
    same = backbone.get_input_embeddings().weight is backbone.get_output_embeddings().weight
    if backbone.config.tie_word_embeddings and not same:
        raise ValueError(
            f"{source} has a lm_head.weight of its own: set tie_word_embeddings=false in its config.json"
        )


def build_random(model: Model, where: str) -> PreTrainedModel:
    """Seeded random weights of the true shape, made on the device `where` (speed does not depend on values)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = dict(model.shape)
    known = AutoConfig.for_model(shape["model_type"])
    # these two are accepted without being attributes of every family
    unknown = [key for key in shape if not hasattr(known, key) and key not in ("rope_theta", "head_dim")]
    if unknown:
        raise ValueError(f"model.shape has {unknown}, which {type(known).__name__} does not know")
    declared = AutoConfig.for_model(shape.pop("model_type"), **shape)
    with torch.random.fork_rng(), torch.device(where):
        torch.manual_seed(model.seed)
        return AutoModelForCausalLM.from_config(declared, dtype=getattr(torch, model.dtype.name))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """260 ids: <pad> <bos> <eos> <unk> and the 256 bytes; any UTF-8 text survives the round trip."""
    from tokenizers import Tokenizer, decoders, models
    from tokenizers.pre_tokenizers import ByteLevel
    from transformers import PreTrainedTokenizerFast

    symbols = ["<pad>", "<bos>", "<eos>", "<unk>", *sorted(ByteLevel.alphabet())]
    tokenizer = Tokenizer(
        models.BPE(vocab={s: i for i, s in enumerate(symbols)}, merges=[], unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        unk_token="<unk>",
        padding_side="left",
    )


def device(config: Config) -> str:
    """`cuda` where there is one, unless the configuration says otherwise. Raises ValueError where there is none."""
    if config.device == "cpu":
        return "cpu"
    import torch

    there = torch.cuda.is_available()
    if config.device == "cuda" and not there:
        raise ValueError(
            "device=cuda, and torch finds none on this machine: leave device out, or set device=cpu"
        )
    return "cuda" if there else "cpu"
