"""What the backbone is pre-trained on: library text and lessons by turns, as one stream of token ids cut into blocks.

In: a byte tokenizer, a count, a seed. Out: ids for training, and ids of content that training never shows. The lessons
teach the skills (copying, comparing) in other words than the families' exercises. Next: stage.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle, islice
from random import Random
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from adafuse.data import standard_library
from adafuse.data.families import lessons

END = "\n"
LESSONS_PER_CHUNK = 32
TEXT_CHARACTERS = 200
CHUNKS_AT_ONCE = 512


class Blocks(Dataset[dict[str, list[int]]]):
    """Rows of a stream [N, S] as the trainer takes them; 65 million ids as Python lists would take gigabytes."""

    def __init__(self, ids_NS: Tensor) -> None:
        self.ids_NS = ids_NS

    def __len__(self) -> int:
        return len(self.ids_NS)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        ids = self.ids_NS[index].tolist()
        return {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}


def pretraining_tokens(tokenizer: Any, n_tokens: int, seed: int) -> Tensor:
    """LongTensor [n_tokens] of training content."""
    return _stream(tokenizer, _chunks("train", seed), n_tokens)


def held_out_tokens(tokenizer: Any, n_tokens: int, seed: int) -> dict[str, Tensor]:
    """LongTensors [n_tokens], `text` and `lessons` apart, of content that belongs to the validation split."""
    both = {"text": _text("validation", seed), "lessons": _lessons("validation", seed)}
    return {name: _stream(tokenizer, chunks, n_tokens) for name, chunks in both.items()}


def _stream(tokenizer: Any, chunks: Iterator[str], n_tokens: int) -> Tensor:
    parts: list[np.ndarray[Any, Any]] = []
    missing = n_tokens
    while missing > 0:
        batch = tokenizer(list(islice(chunks, CHUNKS_AT_ONCE)), add_special_tokens=False, verbose=False)
        ids = np.concatenate([np.asarray(chunk, dtype=np.int64) for chunk in batch["input_ids"]])
        parts.append(ids[:missing])
        missing -= len(ids)
    return torch.from_numpy(np.concatenate(parts))


def _chunks(split: str, seed: int) -> Iterator[str]:
    for text, lesson in zip(_text(split, seed), _lessons(split, seed), strict=True):
        yield text
        yield lesson


def _text(split: str, seed: int) -> Iterator[str]:
    text = standard_library.text(split)
    starts = list(range(0, len(text), TEXT_CHARACTERS))
    Random(f"pretraining/{seed}").shuffle(starts)
    for start in cycle(starts):
        yield text[start : start + TEXT_CHARACTERS] + END


def _lessons(split: str, seed: int) -> Iterator[str]:
    teach = lessons(split, seed)
    while True:
        yield "".join(islice(teach, LESSONS_PER_CHUNK))
