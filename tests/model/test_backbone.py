"""Where a backbone may come from, and the one line that a wrong folder gets before anything is loaded."""

import json
from pathlib import Path

import pytest
import torch

from adafuse.config import Model, Weights
from adafuse.model import backbone
from synthetic.configurations import compose


def checkpoint(folder: Path, **declared: object) -> Path:
    folder.mkdir()
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"]} | declared
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "model.safetensors").touch()
    (folder / "tokenizer.json").touch()
    return folder


def refused(folder: Path, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        backbone.check_source(Model(name="own", path=str(folder)))
    assert "\n" not in str(error.value)


def test_a_whole_checkpoint_folder_is_accepted(tmp_path: Path) -> None:
    backbone.check_source(Model(name="own", path=str(checkpoint(tmp_path / "m"))))


def test_what_is_wrong_with_a_folder_is_said(tmp_path: Path) -> None:
    refused(tmp_path / "nowhere", "is not a folder")
    refused(tmp_path, "no config.json")
    refused(checkpoint(tmp_path / "bert", model_type="bert", architectures=["BertModel"]), "not a causal LM")
    refused(
        checkpoint(tmp_path / "classes", architectures=["LlamaForSequenceClassification"]), "not a causal LM"
    )
    empty = checkpoint(tmp_path / "empty")
    (empty / "model.safetensors").unlink()
    refused(empty, "no \\*.safetensors")
    nameless = checkpoint(tmp_path / "nameless")
    (nameless / "tokenizer.json").unlink()
    refused(nameless, "save the tokenizer")
    broken = checkpoint(tmp_path / "broken")
    (broken / "config.json").write_text("{")
    refused(broken, "not valid JSON")


def test_a_local_folder_round_trip(tiny_llama, tmp_path: Path) -> None:
    saved = tiny_llama("qwen2")
    saved.save_pretrained(tmp_path)
    backbone.byte_tokenizer().save_pretrained(tmp_path)
    model, tokenizer = backbone.load(compose(f"model.path={tmp_path}"))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), saved.parameters(), strict=True))
    assert not any(p.requires_grad for p in model.parameters()) and not model.training
    assert tokenizer.padding_side == "left"


def test_random_weights_are_the_seeds_alone() -> None:
    shape = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    shape |= {"vocab_size": 32, "intermediate_size": 16}
    made = [Model(name="r", weights=Weights.random, seed=seed, shape=shape) for seed in (0, 0, 1)]
    first, again, other = (backbone.build_random(model, "cpu") for model in made)
    assert torch.equal(first.lm_head.weight, again.lm_head.weight)
    assert not torch.equal(first.lm_head.weight, other.lm_head.weight)


def test_the_byte_tokenizer_keeps_every_text() -> None:
    tokenizer = backbone.byte_tokenizer()
    text = "def f(x):\n\treturn 'é€😀'  # ok\n"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 260


def test_a_misspelt_shape_is_refused() -> None:
    model = Model(name="r", weights=Weights.random, shape={"model_type": "llama", "hiden_size": 16})
    with pytest.raises(ValueError, match="hiden_size"):
        backbone.build_random(model, "cpu")
