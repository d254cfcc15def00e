"""Where a backbone may come from: a folder (what is wrong with one: test_checkpoint.py), or a shape."""

from pathlib import Path

import pytest
import torch

from adafuse.config import Model, Weights
from adafuse.model import backbone
from synthetic.configurations import compose
from synthetic.tokenizers import KINDS


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


@pytest.mark.parametrize("kind", ["words", "appends its end", "metaspace"])
@pytest.mark.parametrize("model_type", ["llama", "mistral", "qwen2", "qwen3"])
def test_a_tokenizer_is_what_its_file_says(kind: str, model_type: str, tiny_llama, tmp_path: Path) -> None:
    """For some kinds of model transformers has a class of its own, and takes it."""
    own = KINDS[kind]()
    tiny_llama(model_type, vocab_size=len(own)).save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    _, found = backbone.from_folder(str(tmp_path), None, compose().model)
    text = "Is it blue? Answer: 12  yes\n"
    assert (found(text).input_ids, len(found)) == (own(text).input_ids, len(own))
    assert found.padding_side == "left"
