"""Several processes on one cell: torchrun --nproc_per_node 2 scripts/run.py task=evaluate ..., or accelerate launch.

transformers.Trainer spreads the batches and lm-eval the items. Every process runs the stage; the main one alone keeps
the record and the files. In: the environment that the launcher sets. Next: records.py.
"""

from __future__ import annotations

import os
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor

MAIN_PROCESS = os.environ.get("RANK", "0") == "0"
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
# a process that has finished waits for the slowest, as long as that takes
PATIENCE = timedelta(weeks=52)


def join(device: str) -> Accelerator | None:
    """Meet the other processes and take this one's own GPU as "cuda"; None for a process that is alone."""
    if PROCESSES == 1:
        return None
    from accelerate import Accelerator, InitProcessGroupKwargs

    return Accelerator(cpu=device == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


def refuse_sharding() -> None:
    """Raise ValueError under a launcher that splits parameters: an adapter is saved, and balanced, whole."""
    for name in ("FSDP", "DEEPSPEED"):
        if os.environ.get(f"ACCELERATE_USE_{name}", "").lower() in ("1", "true"):
            raise ValueError(
                f"{name} would split an adapter's parameters, which are saved whole: launch with --multi_gpu, where "
                "every process holds the backbone (docs/running.md)"
            )


def share(batch: int) -> int:
    """Rows per process, so that a fit's batch is the same however many share it.

    Raises ValueError if it is odd, and for a launcher that splits parameters.
    """
    refuse_sharding()
    if batch % PROCESSES:
        raise ValueError(
            f"a batch of {batch} rows does not divide over {PROCESSES} processes: change train.batch"
        )
    return batch // PROCESSES


def total(sums: Tensor) -> Tensor:
    """The sum of every process's `sums`. DDP takes the mean of gradients, so that of this process's part is scaled."""
    if PROCESSES == 1:
        return sums
    from torch import distributed

    found = sums.detach().clone()
    distributed.all_reduce(found)
    return found + PROCESSES * (sums - sums.detach())


class Silent:
    """The recorder of the other processes."""

    def write(self, kind: str, **fields: Any) -> None:
        pass


def wait_for_everyone() -> None:
    """The next stage reads what the main process has just written."""
    if PROCESSES > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
