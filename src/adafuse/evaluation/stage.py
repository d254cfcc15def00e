"""The stage that evaluates: a suite through one method's forward and one strategy's decoding, every item kept.

In: a checked `Config` and its record; the fitted adapter in its folder. Out: `metric` and `items` lines.
Next: harness.py.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase

from adafuse import cell, strategies
from adafuse.adapters import store
from adafuse.adapters.adapter import Adapter
from adafuse.config import Config
from adafuse.data import items as data
from adafuse.distributed import Silent
from adafuse.evaluation.harness import evaluate
from adafuse.model import backbone
from adafuse.model.finite import require_finite
from adafuse.records import Recorder


def run(config: Config, record: Recorder | Silent) -> None:
    """Evaluate what was fitted, or the plain backbone."""
    model, tokenizer, adapter = _fitted(config)
    source = data.write(config.data, cell.data_dir(config), config.seed)
    merging = False
    if adapter is not None:
        record.write("parameters", trainable=sum(p.numel() for p in adapter.trained()))
        adapter.restores = config.evaluate_restore
        adapter.install(strategies.make(config.evaluate_strategy))
        merging = adapter.merging
    elif config.method.full:
        record.write("parameters", trainable=sum(p.numel() for p in model.parameters()))
    require_finite(model, "what was trained or copied is damaged, so make it again")
    own = config.data.path
    for result in evaluate(
        model, tokenizer, adapter, config.suite, source, merging=merging, seed=config.seed, own=own
    ):
        fields = {"suite_task": result.suite_task, "metric": result.metric}
        about = {"n": result.n, "task_hash": result.task_hash, "version": result.version}
        record.write("metric", **fields, value=result.value, stderr=result.stderr, **about)
        record.write("items", **fields, correct=result.correct)


def _fitted(config: Config) -> tuple[nn.Module, PreTrainedTokenizerBase, Adapter | None]:
    """Backbone, tokenizer and adapter as `evaluate_dtype` has them; full fine-tuning has a backbone of its own."""
    dtype = getattr(torch, config.evaluate_dtype.name)
    folder = cell.adapter_dir(config, config.method)
    if config.method.full:
        own = dataclasses.replace(config.model, path=str(folder))
        model, tokenizer = backbone.load(dataclasses.replace(config, model=own))
        return model.to(dtype), tokenizer, None
    model, tokenizer = backbone.load(config, cell.pretrained_dir(config))
    model = model.to(dtype)
    if not config.method.has_experts:
        return model, tokenizer, None
    adapter = Adapter(model, config.method, config.experts, config.seed)
    return model, tokenizer, store.load(adapter, folder).to_dtype(dtype)
