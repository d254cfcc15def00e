"""A fit of seconds: rows to learn, and an adapter trained on them; shared by the tests of training/."""

from pathlib import Path

import torch

from adafuse.adapters.adapter import Adapter
from adafuse.config import Config, Fit
from adafuse.model.backbone import byte_tokenizer
from adafuse.training import trainer

TOKENIZER = byte_tokenizer()


def rows(count: int = 64) -> list[dict[str, list[int]]]:
    """`abc>abc`, with a loss on the answer only; two lengths, so that batches are padded."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for i in range(count):
        word = "".join("abcd"[j] for j in torch.randint(0, 4, (3 + i % 2,), generator=generator))
        ids = TOKENIZER(f"{word}>{word}\n").input_ids
        made.append({"input_ids": ids, "labels": [-100] * (len(word) + 1) + ids[len(word) + 1 :]})
    return made


def knobs(**changes: object) -> Fit:
    defaults = {"steps": 8, "batch": 8, "learning_rate": 1e-2, "max_length": 32, "save_every_steps": 4}
    return Fit(**(defaults | changes))  # type: ignore[arg-type]


def train(model, config: Config, folder: Path, fit: Fit) -> tuple[Adapter, list[dict[str, float]]]:
    adapter = Adapter(model, config.method, config.experts, seed=0)
    adapter.install()
    fitted = trainer.fit(model, rows(), fit, folder, adapter, seed=1)
    adapter.remove()
    return adapter, fitted.losses
