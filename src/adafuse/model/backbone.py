"""The frozen language model: from a local folder, from the hub, seeded random by shape, or pre-trained here.

In: a `Config`. Out: a causal LM of transformers in eval mode and its tokenizer. `check_source` looks at a folder before
anything heavy is imported: torch and transformers, which take seconds, come with the functions that need them.
Next: llama.py, adapters/.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from adafuse.config import Config, Model, Weights

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# in the folder of one that was fitted here, the file that stands for it
WEIGHTS_FILE = "model.safetensors"


def check_source(model: Model) -> None:
    """Refuse a folder that is no Llama-family causal LM, or a shape that is missing. Raises ValueError, one line."""
    if model.path is not None:
        _check_folder(Path(model.path))
    elif model.weights is Weights.hub:
        if not model.hub_id:
            raise ValueError(
                f"model {model.name} has no hub_id: set model.path=FOLDER or model.weights=random"
            )
    elif model.shape.get("model_type") not in FAMILIES:
        raise ValueError(
            f"model.shape.model_type must be one of {list(FAMILIES)} for model.weights={model.weights.name}"
        )


def _check_folder(folder: Path) -> None:
    config_file = folder / "config.json"
    if not folder.is_dir():
        raise ValueError(
            f"model.path={folder} is not a folder: name a checkpoint folder in Hugging Face format"
        )
    if not config_file.is_file():
        raise ValueError(
            f"model.path={folder} has no config.json: it is not a checkpoint in Hugging Face format"
        )
    try:
        declared = json.loads(config_file.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{config_file} is not valid JSON ({error}): copy the checkpoint again") from None
    names = declared.get("architectures") or []
    if declared.get("model_type") not in FAMILIES or not any(n.endswith("ForCausalLM") for n in names):
        raise ValueError(
            f"model.path={folder} holds {names or declared.get('model_type')}, not a causal LM of {list(FAMILIES)}"
        )
    if not any(folder.glob("*.safetensors")):
        raise ValueError(
            f"model.path={folder} has no *.safetensors weights: save it with safe_serialization=True"
        )
    if not any((folder / name).is_file() for name in ("tokenizer.json", "tokenizer.model")):
        raise ValueError(
            f"model.path={folder} has no tokenizer.json: save the tokenizer into the same folder"
        )


def load(config: Config, pretrained: Path | None = None) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """The backbone on its device, frozen, in eval mode, and its tokenizer with left padding.

    `pretrained` is the folder of a backbone that was fitted here, for `weights=scratch`. Raises ValueError, one line.
    """
    model = config.model
    if model.path is None and model.weights is Weights.random:
        backbone, tokenizer = build_random(model, device(config)), byte_tokenizer()
    elif model.path is None and model.weights is Weights.scratch:
        assert pretrained is not None, "a backbone from scratch is fitted first"
        backbone, tokenizer = from_folder(str(pretrained), None, model)
    else:
        backbone, tokenizer = from_folder(model.path or str(model.hub_id), model.revision, model)
    backbone = backbone.to(device(config)).eval()
    backbone.requires_grad_(False)
    return backbone, tokenizer


def from_folder(
    source: str, revision: str | None, model: Model
) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """A checkpoint folder or hub id in `model.dtype`. Raises ValueError, one line, if there is none."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        revision = revision or "main"
        dtype = getattr(torch, model.dtype.name)
        backbone = AutoModelForCausalLM.from_pretrained(source, revision=revision, dtype=dtype)
        tokenizer = AutoTokenizer.from_pretrained(source, revision=revision, padding_side="left")
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"cannot load the backbone from {source} ({reason}): set model.path=FOLDER"
        ) from None
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return backbone, tokenizer


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
    """`cuda` where there is one, unless the configuration says otherwise."""
    if config.device != "auto":
        return config.device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
