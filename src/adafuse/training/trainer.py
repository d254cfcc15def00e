"""Fitting, for the backbone and for adapters alike, through transformers.Trainer.

In: a model (with an `Adapter` installed for training, or whole), token ids with labels, a `Fit`. Out: the fitted
parameters in place, and one loss line per logging step. Checkpoints, resuming, mixed precision, accumulation, DDP are
the library's; ours is the balance loss and that an adapter's checkpoint holds the adapter alone.
Next: stage.py, which calls this and saves the result.
"""

from __future__ import annotations

import json
import logging
import math
import shutil
import sys
import zipfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Dataset
from transformers import (
    BatchEncoding,
    PrinterCallback,
    ProgressCallback,
    Trainer,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK
from transformers.utils import ModelOutput

from adafuse.adapters import store
from adafuse.adapters.adapter import Adapter
from adafuse.adapters.router import routing_losses
from adafuse.config import Fit
from adafuse.data.tokens import IGNORED
from adafuse.distributed import sharded, share

LOG_LINES = 40
# of a checkpoint, written last
STATE = "trainer_state.json"
# How much more than at its first step a loss must be, that is above that of a model that knows nothing: of 1,280 fits
# that were published, one ended above its beginning, at 1.1 times it, and none above half the loss of knowing nothing.
DIVERGED = 1.2


@dataclass
class Fitted:
    """Loss lines (step, loss, balance_loss, learning_rate), and the step that an interrupted fit went on from."""

    losses: list[dict[str, float]]
    resumed_from_step: int


def fit(
    model: nn.Module,
    rows: list[dict[str, list[int]]] | Dataset[dict[str, list[int]]],
    knobs: Fit,
    folder: Path,
    adapter: Adapter | None = None,
    *,
    seed: int = 0,
) -> Fitted:
    """Fit `model` in place on `rows` (input_ids, labels; -100 is ignored), from the last checkpoint in `folder` on.

    Only parameters that require a gradient change. With an `adapter`, it is installed for training already. A backbone
    in half precision stays as it is where it is frozen, and is computed under autocast; what is trained is in fp32, for
    a step is often smaller than half of a bf16 weight's last bit. Raises ValueError, one line, at the first loss that
    is not finite, and where the fit diverged.
    """
    logging.getLogger("transformers").setLevel(logging.ERROR)
    knobs = replace(knobs, bf16=knobs.bf16 or any(p.dtype != torch.float32 for p in model.parameters()))
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()
    trainer = AdapterTrainer(
        adapter,
        model=model,
        args=_arguments(knobs, folder, seed, next(model.parameters()).device.type == "cpu"),
        train_dataset=rows,
        data_collator=collate,
    )
    trainer.remove_callback(PrinterCallback)
    # in a notebook it is another one, which draws a table in place of the bar
    trainer.remove_callback(DEFAULT_PROGRESS_CALLBACK)
    trainer.add_callback(Bar)
    # the others then find what the first has set aside
    with trainer.accelerator.main_process_first():
        checkpoint = last_complete(folder)
    if checkpoint and _step_of(Path(checkpoint)) >= knobs.steps:
        # the library would train one step more
        trainer.state = TrainerState.load_from_json(str(Path(checkpoint) / STATE))
        trainer._load_from_checkpoint(checkpoint)
    else:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.refuse_broken()
    model.eval()
    losses = [_loss_line(line) for line in trainer.state.log_history if "loss" in line]
    begun = losses[0]["loss"] if trainer.begun is None else trainer.mean(trainer.begun)
    unknowing = math.log(model.config.vocab_size)
    ends = [losses[-1]["loss"]]
    if _is_diverged(begun, ends[0], unknowing):
        # the last rows may just be harder ones
        ends += trainer.first_again()
    if _is_diverged(begun, ends[-1], unknowing):
        raise ValueError(
            f"the fit diverged: its loss went from {begun:.3g} to {ends[-1]:.3g}, and a model that knows nothing has "
            f"{unknowing:.3g}; lower the learning rate, which is {knobs.learning_rate:g}"
        )
    return Fitted(losses, _step_of(Path(checkpoint)) if checkpoint else 0)


def _is_diverged(first: float, last: float, unknowing: float) -> bool:
    return not last <= max(DIVERGED * first, unknowing)


def _arguments(knobs: Fit, folder: Path, seed: int, on_cpu: bool) -> TrainingArguments:
    return TrainingArguments(
        output_dir=str(folder),
        max_steps=knobs.steps,
        per_device_train_batch_size=share(knobs.batch),
        gradient_accumulation_steps=knobs.accumulation,
        learning_rate=knobs.learning_rate,
        warmup_steps=knobs.warmup_steps,
        lr_scheduler_type="cosine",
        weight_decay=knobs.weight_decay,
        # short fits: the second moment must follow within tens of steps
        adam_beta2=0.95,
        bf16=knobs.bf16,
        use_cpu=on_cpu,
        # looking for NaN at every step would make it wait for the device
        logging_nan_inf_filter=False,
        # every expert is part of the graph, whoever is chosen
        ddp_find_unused_parameters=False,
        dataloader_pin_memory=not on_cpu,
        save_steps=knobs.save_every_steps,
        # where the last one is damaged there is one before it
        save_total_limit=2,
        logging_steps=max(1, knobs.steps // LOG_LINES),
        # trackers get the curves from the record (tracking.py)
        report_to=[],
        run_name=folder.name,
        seed=seed,
        data_seed=seed,
        remove_unused_columns=False,
        disable_tqdm=False,
    )


def collate(rows: list[dict[str, list[int]]]) -> BatchEncoding:
    """Rows padded on the right to the longest: positions then need no correction while training.

    Any id is a padding, for no one sees it; not every tokenizer has one for it.
    """
    longest = max(len(row["input_ids"]) for row in rows)

    def padded(values: list[list[int]], padding: int) -> Tensor:
        return torch.tensor([own + [padding] * (longest - len(own)) for own in values])

    ids, labels = ([row[name] for row in rows] for name in ("input_ids", "labels"))
    batch = {
        "input_ids": padded(ids, 0),
        "attention_mask": padded([[1] * len(own) for own in ids], 0),
        "labels": padded(labels, IGNORED),
    }
    return BatchEncoding(batch)


class AdapterTrainer(Trainer):
    """Trainer with the routers' balance loss, whose checkpoints hold an adapter without its backbone."""

    def __init__(self, adapter: Adapter | None, **kwargs: object) -> None:
        super().__init__(**kwargs)
        self.adapter = adapter
        # stay on the device until a line is logged: reading one would make every step wait
        self._said: dict[str, list[Tensor]] = {"balance_loss": [], "used_share": []}
        self._first_broken: Tensor | None = None
        # the loss of the first step, unless the fit went on from a checkpoint
        self.begun: Tensor | None = None
        self._first: list[tuple[Any, ...]] = []

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Tensor],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Tensor | tuple[Tensor, ModelOutput]:
        """The library's loss, and from an adapter that is trained its balance loss and its price of experts."""
        adapter = self.adapter
        if adapter is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        keep_T = inputs["attention_mask"].bool().flatten()
        with adapter.collecting() as said:
            loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        balance, used = routing_losses([gates for _, gates in said], keep_T)
        self._said["balance_loss"].append(balance.detach())
        method = adapter.method
        if torch.is_grad_enabled() and any(not gates.probs_TE.requires_grad for _, gates in said):
            raise ValueError(
                "gradient checkpointing with use_reentrant=True would leave the routers' balance loss without a "
                "gradient: say use_reentrant=False"
            )
        if method.null_expert:
            self._said["used_share"].append(used.detach())
        ours = method.balance_coefficient * balance + method.bypass_penalty * used
        # a loss divided by the items of all micro-batches is summed over them: then ours must be a share too
        shares = self.args.gradient_accumulation_steps if num_items_in_batch is not None else 1
        loss = loss + ours / shares
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        """The library's step; the first whose loss is not finite is remembered, on the device."""
        loss = super().training_step(*args, **kwargs)
        if self.state.global_step == 0:
            self.begun = loss if self.begun is None else self.begun + loss
            self._first.append(args)
        step = torch.where(loss.isfinite(), 0, self.state.global_step + 1)
        first = self._first_broken
        self._first_broken = step if first is None else torch.where(first > 0, first, step)
        return loss

    @torch.no_grad()
    def first_again(self) -> list[float]:
        """The loss of the first step's rows as the model is now; of a fit that was resumed nothing."""
        losses = [
            self.compute_loss(model, self._prepare_inputs(inputs), False, *count)
            for model, inputs, *count in self._first
        ]
        return [self.mean(torch.stack(losses).sum())] if losses else []

    def mean(self, loss: Tensor) -> float:
        """Over all processes, which must judge a fit alike."""
        return float(self.accelerator.reduce(loss, reduction="mean"))

    def refuse_broken(self, loss: float = 0.0) -> None:
        """Raise ValueError if a step's loss was not finite, here or (by the mean `loss` of all) in another process."""
        first = 0 if self._first_broken is None else int(self._first_broken)
        if first or not math.isfinite(loss):
            raise ValueError(
                f"the loss of step {first or self.state.global_step} is not finite: lower the learning rate, which is "
                f"{self.args.learning_rate:g}"
            )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            self.refuse_broken(logs["loss"])
            for name, said in self._said.items():
                if said:
                    logs[name] = float(torch.stack(said).mean())
                    said.clear()
        super().log(logs, start_time)

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # else the same command would go on from it
        self.refuse_broken()
        super()._save_checkpoint(*args, **kwargs)

    def _wrap_model(self, model: nn.Module, training: bool = True, dataloader: Any = None) -> nn.Module:
        """Where processes hold parts of the backbone, DDP of the adapter alone: accelerate refuses such a model."""
        parts = sharded(model)
        if not parts or not training:
            return super()._wrap_model(model, training, dataloader)
        model = self.accelerator.prepare_model(model, device_placement=False, evaluation_mode=True)
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, parts)
        return DistributedDataParallel(model)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        if self.adapter is None:
            super().save_model(output_dir, _internal_call)
        elif self.args.should_save or sharded(self.model):
            store.save(self.adapter, Path(output_dir or str(self.args.output_dir)), base_name="checkpoint")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if self.adapter is None:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
        else:
            store.load(self.adapter, Path(resume_from_checkpoint))


class Bar(ProgressCallback):
    """The library's progress bar with the loss beside it, instead of a line per log."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **_: object,
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {float(logs['loss']):.3f}")


def last_complete(folder: Path) -> str | None:
    """The newest checkpoint that was written to its end (trainer_state.json comes last), or None.

    One that is damaged is named and set aside.
    """
    for found in sorted((p.parent for p in folder.glob(f"checkpoint-*/{STATE}")), key=_step_of, reverse=True):
        damaged = next((file for file in sorted(found.rglob("*")) if not _is_whole(file)), None)
        if damaged is None:
            return str(found)
        aside = found.with_name(f"damaged-{found.name}")
        shutil.rmtree(aside, ignore_errors=True)
        found.rename(aside)
        print(
            f"{damaged} is damaged: its checkpoint is now {aside}, and the fit goes on without it",
            file=sys.stderr,
        )
    return None


def _is_whole(file: Path) -> bool:
    """Whether a file of a checkpoint can be read to its end."""
    try:
        if file.suffix == ".json":
            json.loads(file.read_bytes())
        elif file.suffix in (".pt", ".pth", ".bin"):
            # what torch saves is a zip with a checksum of each part
            with zipfile.ZipFile(file) as parts:
                return parts.testzip() is None
        elif file.suffix == ".safetensors":
            with safe_open(file, "pt"):
                return True
    except (ValueError, zipfile.BadZipFile, SafetensorError):
        return False
    return True


def _step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def _loss_line(line: dict[str, float]) -> dict[str, float]:
    norm = line.get("grad_norm")
    return {
        "step": int(line["step"]),
        "loss": float(line["loss"]),
        "balance_loss": float(line.get("balance_loss", 0.0)),
        "learning_rate": float(line["learning_rate"]),
        **({} if norm is None else {"grad_norm": float(norm)}),
    }
