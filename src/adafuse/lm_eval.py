"""lm-eval's own command line, with our model in it: python -m adafuse.lm_eval --model adafuse --model_args ...

In: lm-eval's arguments; of `--model_args` pretrained=FOLDER, adapter=FOLDER, strategy=gather, dtype=bfloat16 and
any_base=True, as `adafuse.load` takes them. Out: what lm-eval prints and saves; a mistake is one line and status 2.
lm-eval 0.4.13 finds no models outside itself (it reads no entry points), so this module registers ours and calls it.
Several processes, by accelerate or torchrun, share the items as lm-eval shares them. Next: evaluation/adapted_lm.py.
"""

from __future__ import annotations

import logging
import sys
from typing import ClassVar

import torch
from accelerate import Accelerator
from lm_eval.__main__ import cli_evaluate
from lm_eval.api.registry import register_model

from adafuse import api
from adafuse.adapted import named
from adafuse.config import StrategyName
from adafuse.distributed import join
from adafuse.evaluation.adapted_lm import AdaptedLM
from adafuse.refusals import PEFT

TAKEN = ("pretrained", "adapter", "strategy", "dtype", "any_base")
# what lm-eval's own models take to spread one over devices
SPREAD = ("parallelize", "device_map", "tp_plan")


@register_model("adafuse")
class AdaFuse(AdaptedLM):
    """A backbone and a saved adapter, as `--model_args` name them."""

    made: ClassVar[list[AdaFuse]] = []

    def __init__(
        self,
        pretrained: str | None = None,
        adapter: str | None = None,
        strategy: str = "dense",
        dtype: str = "auto",
        any_base: bool = False,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        **unknown: object,
    ) -> None:
        """`strategy` decodes what is generated; log-likelihoods need none. Raises ValueError, one line."""
        for name in unknown:
            if name in SPREAD:
                raise ValueError(f"--model_args {name}: a backbone lies on one device (docs/running.md)")
            raise ValueError(f"--model_args has no {name}: choose from {', '.join(TAKEN)}")
        if pretrained is None:
            raise ValueError("--model_args lacks pretrained=FOLDER, a checkpoint in Hugging Face format")
        # before anything is loaded
        chosen = named(StrategyName, "strategy", str(strategy), PEFT)
        accelerator, where = _place(device)
        wanted = None if dtype == "auto" else str(dtype)
        # held here: it gives the model back when it goes
        self.adapted = api.load(str(pretrained), adapter, dtype=wanted, device=where, any_base=bool(any_base))
        self.adapted.use(chosen.name)
        ours = self.adapted.adapter
        merging = ours is not None and ours.merging
        super().__init__(self.adapted.model, self.adapted.tokenizer, ours, batch_size, merging)
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


if __name__ == "__main__":
    sys.exit(main())
