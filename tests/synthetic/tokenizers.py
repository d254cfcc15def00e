"""Tokenizers of the kinds that people bring, trained in a moment: what the tests of prompts and answers cut with."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from adafuse.data.families import NAMES, generate
from adafuse.model.backbone import byte_tokenizer

SPECIAL = ["<unk>", "<s>", "</s>"]
SENTENCES = ["Is it blue? Answer: yes", "Is it red? Answer: no", "What is 2+2? 4", "The sky is blue.\n"] * 20
MORE_CHARACTERS = ["\n", "é", "0123456789", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "abcdefghijklmnopqrstuvwxyz"]


def texts() -> list[str]:
    """Items of every family as one string each, so that frequent pairs stand on both sides of the border."""
    items = [item for name in NAMES for item in generate(name, "train", 200, 0)]
    return [item.prompt + item.answer + "\n" for item in items] + SENTENCES + MORE_CHARACTERS


def bpe() -> Tokenizer:
    """Bytes merged wherever they are frequent: over spaces, signs and the border of prompt and answer."""
    return _of_bytes(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))


def words(add_prefix_space: bool = False) -> Tokenizer:
    """Bytes merged within words and the space before them, as GPT-2, Llama 3 and Qwen do it."""
    tokenizer = _of_bytes(pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space, use_regex=True))
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=True)
    return tokenizer


def _of_bytes(pieces: pre_tokenizers.ByteLevel) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pieces, decoders.ByteLevel()
    alphabet = pieces.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=SPECIAL, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def metaspace() -> Tokenizer:
    """Unigram over pieces that begin with a visible space, as SentencePiece has them."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<unk>")
    tokenizer.train_from_iterator(texts(), trainer)
    return tokenizer


def ending(tokenizer: Tokenizer) -> Tokenizer:
    """One that opens and ends every text."""
    ids = [(token, tokenizer.token_to_id(token)) for token in ("<s>", "</s>")]
    template = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ids)
    tokenizer.post_processor = template
    return tokenizer


def wrapped(tokenizer: Tokenizer, **special: str) -> PreTrainedTokenizerFast:
    named = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"} | special
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, padding_side="left", **named)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "bytes": byte_tokenizer,
    "bpe": lambda: wrapped(bpe()),
    "words": lambda: wrapped(words()),
    "words after a space": lambda: wrapped(words(add_prefix_space=True)),
    "metaspace": lambda: wrapped(metaspace()),
    "appends its end": lambda: wrapped(ending(bpe())),
    "metaspace that appends its end": lambda: wrapped(ending(metaspace())),
    "without special tokens": lambda: PreTrainedTokenizerFast(tokenizer_object=words(), padding_side="left"),
}
