"""The two stages that fit something: the backbone from scratch, and an adapter (or the whole backbone) on the families.

In: a checked `Config` and its record. Out: a folder with what was fitted, and lines on how it went: losses, what was
held out, and how the routers spread. Next: trainer.py, validation.py; evaluation/stage.py uses the result.
"""

from __future__ import annotations

import dataclasses
import math
import shutil
from contextlib import nullcontext
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from adafuse import cell
from adafuse.adapters import imports, store
from adafuse.adapters.adapter import Adapter
from adafuse.config import Config
from adafuse.data import items as data
from adafuse.data import pretraining_text
from adafuse.distributed import MAIN_PROCESS, SHARDED, Silent
from adafuse.model import backbone
from adafuse.model.declared import positions
from adafuse.model.finite import require_finite
from adafuse.records import Recorder
from adafuse.training.trainer import Fitted, fit
from adafuse.training.validation import Rows, Validation, validate

# of text that no step has seen: what pre-training is judged by
HELD_OUT_TOKENS = 65536
# what to do about weights that a fit has left without numbers
LOWER = "the fit has lost them, so lower its learning rate"
Record = Recorder | Silent


def pretrain(config: Config, record: Record) -> None:
    """Fit the backbone on generated text; weights are saved rounded to bf16, in which a GPU serves them."""
    folder, seed, knobs = cell.backbone_dir(config), config.model.seed, config.pretrain
    model = backbone.build_random(config.model, backbone.device(config))
    tokenizer = backbone.byte_tokenizer()
    wanted = knobs.steps * knobs.batch * knobs.accumulation * knobs.max_length
    stream = pretraining_text.pretraining_tokens(tokenizer, wanted, seed)
    blocks = pretraining_text.Blocks(stream.view(-1, knobs.max_length))
    fitted = fit(model, blocks, knobs, checkpoints(folder), seed=seed)
    require_finite(model, LOWER)
    if MAIN_PROCESS:
        _round(model)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        held_out = pretraining_text.held_out_tokens(tokenizer, HELD_OUT_TOKENS, seed)
        for name, ids in held_out.items():
            loss = _mean_loss(model, ids.view(-1, knobs.max_length), knobs.batch)
            record.write("metric", suite_task=name, metric="loss", value=loss, stderr=None, n=ids.numel())
        record.write("parameters", trainable=sum(p.numel() for p in model.parameters()))
        _finish(record, fitted, folder, backbone.WEIGHTS_FILE)


def train(config: Config, record: Record) -> None:
    """Fit one method on the training items of its families, and say how it does on their validation items."""
    model, tokenizer = backbone.load(config, cell.pretrained_dir(config), sharded=SHARDED)
    method, folder, seed = config.method, cell.adapter_dir(config, config.method), config.seed
    rate = config.train.learning_rate * method.learning_rate_factor
    knobs = dataclasses.replace(config.train, learning_rate=rate)
    source = data.write(config.data, cell.data_dir(config), seed)
    limit = min(config.train.max_length, positions(model.config.to_dict()))
    learnt, held_out = (
        _rows(config, source, tokenizer, limit, split, record) for split in ("train", "validation")
    )
    adapter = Adapter(model, method, config.experts, seed) if method.has_experts else None
    if adapter is not None and adapter.experts_frozen:
        imports.load_own(adapter)
    if adapter is None:
        model.requires_grad_(True)
    with adapter.installing() if adapter is not None else nullcontext():
        trained = [p for p in model.parameters() if p.requires_grad]
        rows = list(chain(*learnt.values()))
        fitted = fit(model, rows, knobs, checkpoints(folder), adapter, seed=seed)
        require_finite(model, LOWER)
    record.write("parameters", trainable=sum(p.numel() for p in trained))
    file = _save(model, adapter, tokenizer, folder, config) if MAIN_PROCESS or SHARDED else ""
    if adapter is not None:
        # saved in fp32, held against what it will be served in
        adapter.to_dtype(model.dtype)
    found = validate(model, adapter, held_out, knobs.batch)
    _record_validation(found, record)
    if MAIN_PROCESS and adapter is not None:
        store.write_card(folder, {f"validation loss ({found.rows} rows)": found.loss})
    if MAIN_PROCESS:
        _finish(record, fitted, folder, file)


def _rows(
    config: Config, source: Path, tokenizer: PreTrainedTokenizerBase, limit: int, split: str, record: Record
) -> dict[str, Rows]:
    """What is learnt or held out, by family (the user's own by the name of its folder); how it was cut into tokens is
    printed and recorded.
    """
    found, folder = {}, config.data.path
    for family in data.families_of(config.data):
        encoded = data.dataset_of(config.data, family, source, tokenizer, limit, split)
        name = family if folder is None else Path(folder).resolve().name
        record.write("tokens", split=split, family=name, **dataclasses.asdict(encoded.said))
        if MAIN_PROCESS:
            print(f"{data.title(config.data, family, split)}: {encoded.said}")
        found[name] = encoded.rows
    return found


def checkpoints(folder: Path) -> Path:
    """Where a fit keeps its checkpoints until its result is saved."""
    return folder.parent / f"{folder.name}.checkpoints"


def _save(
    model: nn.Module,
    adapter: Adapter | None,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    config: Config,
) -> str:
    """Write what was fitted; the name of its one file that stands for it."""
    if adapter is None:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return backbone.WEIGHTS_FILE
    store.save(adapter, folder, config.model.path or config.model.hub_id or config.model.name)
    return "router_config.json"


def _record_validation(found: Validation, record: Record) -> None:
    record.write(
        "metric", suite_task="validation", metric="loss", value=found.loss, stderr=None, n=found.rows
    )
    for line in found.routing:
        record.write("routing", **line)
    if found.agreement is not None:
        record.write("agreement", **found.agreement)


@torch.no_grad()
def _round(model: nn.Module) -> None:
    """To bf16, in place and in fp32."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())


@torch.no_grad()
def _mean_loss(model: nn.Module, ids_BS: Tensor, batch: int) -> float:
    """Mean cross-entropy in nats per token."""
    device = next(model.parameters()).device
    losses = [
        float(model(input_ids=part, labels=part).loss) * len(part) for part in ids_BS.to(device).split(batch)
    ]
    if not math.isfinite(sum(losses)):
        raise ValueError(f"the loss of held-out text is {sum(losses)}: {LOWER}")
    return sum(losses) / len(ids_BS)


def _finish(record: Record, fitted: Fitted, folder: Path, file: str) -> None:
    """Write what the fit left; its checkpoints are needed no longer."""
    for line in fitted.losses:
        record.write("loss", **line)
    digest = cell.file_hash(folder / file)
    record.write("artifact", path=str(folder), sha256=digest, resumed_from_step=fitted.resumed_from_step)
    shutil.rmtree(checkpoints(folder), ignore_errors=True)
