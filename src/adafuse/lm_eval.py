"""lm-eval's own command line, with our model in it: python -m adafuse.lm_eval --model adafuse --model_args ...

In: lm-eval's arguments; of `--model_args` pretrained=FOLDER, adapter=FOLDER, strategy=gather, dtype=bfloat16. Out: what
lm-eval prints and saves; a mistake is one line and status 2. lm-eval 0.4.13 finds no models outside itself (it reads no
entry points), so this module registers ours and calls it. Several processes, by accelerate or torchrun, share the items
as lm-eval shares them. Next: evaluation/adapted_lm.py.
"""

from __future__ import annotations

import logging
import sys
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model
from torch import nn

from adafuse import strategies
from adafuse.adapters import store
from adafuse.adapters.adapter import Adapter
from adafuse.compose import typed
from adafuse.config import Config, Dtype, Experts, Method, Model, StrategyName
from adafuse.distributed import join
from adafuse.evaluation.adapted_lm import AdaptedLM
from adafuse.model import backbone
from adafuse.model.checkpoint import dtype_of
from adafuse.refusals import PEFT, refuse_strategy

# what lm-eval's own models take to spread one over devices
SPREAD = ("parallelize", "device_map", "tp_plan")


@register_model("adafuse")
class AdaFuse(AdaptedLM):
    """A checkpoint folder and a saved adapter, as `--model_args` name them."""

    made: ClassVar[list[AdaFuse]] = []

    def __init__(
        self,
        pretrained: str | None = None,
        adapter: str | None = None,
        strategy: str = "dense",
        dtype: str = "auto",
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: object,
    ) -> None:
        """`strategy` decodes what is generated; log-likelihoods need none. Raises ValueError, one line."""
        for name in set(unknown) & set(SPREAD):
            raise ValueError(f"--model_args {name}: a backbone lies on one device (docs/running.md)")
        if unknown:
            raise ValueError(
                f"--model_args has no {next(iter(unknown))}: choose from pretrained, adapter, strategy, dtype"
            )
        if pretrained is None:
            raise ValueError("--model_args lacks pretrained=FOLDER, a checkpoint in Hugging Face format")
        chosen = _one_of(StrategyName, strategy, "strategy", set(PEFT))
        accelerator, where = _place(device)
        model, tokenizer = _backbone(Path(pretrained).expanduser(), dtype, where)
        adapted = None if adapter is None else _adapter(model, Path(adapter).expanduser(), chosen)
        merging = adapted is not None and adapted.merging
        super().__init__(model, tokenizer, adapted, batch_size, merging)
        if max_batch_size is not None:
            self.max_batch_size = max_batch_size
        self.take_share(accelerator)
        self.made.append(self)


def main() -> int:
    """Run lm-eval on this process's arguments; returns the exit status."""
    AdaFuse.made.clear()
    # it warns that a model which is loaded already cannot be shared by processes; ours is
    logging.getLogger("lm_eval.models.huggingface").setLevel(logging.ERROR)
    try:
        cli_evaluate()
    except (ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    for lm in AdaFuse.made:
        lm.say_shortened()
    return 0


def _one_of(names: Any, value: str, argument: str, without: set[Any]) -> Any:
    """The member of an Enum that `value` names. Raises ValueError."""
    allowed = [one.name for one in names if one not in without]
    if value not in allowed:
        raise ValueError(f"--model_args {argument}={value}: choose from {', '.join(allowed)}")
    return names[value]


def _place(device: str | None) -> tuple[Accelerator | None, str]:
    """Where this process computes; with others what knows them and this one's GPU."""
    where = device or "cuda"
    if where.startswith("cuda") and not torch.cuda.is_available():
        # lm-eval asks for cuda:0 where its user names no device, and falls back as well
        where = "cpu"
    try:
        torch.empty(0, device=where)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"--device {where}: {str(error).splitlines()[0]}") from error
    accelerator = join(where)
    return accelerator, where if accelerator is None else str(accelerator.device)


def _backbone(folder: Path, dtype: str, where: str) -> tuple[nn.Module, Any]:
    if not folder.is_dir():
        raise ValueError(f"--model_args pretrained={folder} is not a folder")
    model = Model(name=folder.name, path=str(folder), dtype=_one_of(Dtype, dtype, "dtype", set()))
    backbone.check_source(model)
    if model.dtype is Dtype.auto:
        model.dtype = Dtype.float32 if where == "cpu" else dtype_of(folder)
    return backbone.load(Config(model=model, device=where))


def _adapter(model: nn.Module, folder: Path, strategy: StrategyName) -> Adapter:
    """What `folder` holds, installed to decode with `strategy`."""
    described = store.describe(folder)
    method, geometry = typed(Method, described["method"]), typed(Experts, described["experts"])
    refuse_strategy(method, strategy)
    adapter = Adapter(model, method, geometry, seed=0)
    store.load(adapter, folder).to_dtype(model.dtype)
    adapter.install(strategies.make(strategy))
    return adapter


if __name__ == "__main__":
    sys.exit(main())
