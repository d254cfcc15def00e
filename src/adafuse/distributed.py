"""Several processes on one cell: torchrun --nproc_per_node 2 scripts/run.py task=evaluate ..., or accelerate launch.

transformers.Trainer spreads the batches and lm-eval the items. Every process runs the stage; the main one alone keeps
the record and the files. Under accelerate's FSDP each holds a part of the frozen backbone while an adapter is fitted.
In: the environment that the launcher sets. Next: records.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from accelerate import Accelerator
    from torch import Tensor, nn


def _is_set(name: str) -> bool:
    return os.environ.get(name, "").lower() in ("1", "true")


RANK = int(os.environ.get("RANK", "0"))
MAIN_PROCESS = RANK == 0
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
FSDP = "ACCELERATE_USE_FSDP"
# launched by accelerate's FSDP: the backbone is to be split
SHARDED = PROCESSES > 1 and _is_set(FSDP)
# a process that has finished waits for the slowest, as long as that takes
PATIENCE = timedelta(weeks=52)


def join(device: str) -> Accelerator | None:
    """Meet the other processes and take this one's own GPU as "cuda"; None for a process that is alone."""
    # in_turn does it: accelerate would split the adapter too, and transformers would give weights to one process alone
    os.environ.pop(FSDP, None)
    if PROCESSES == 1:
        return None
    from accelerate import Accelerator, InitProcessGroupKwargs

    return Accelerator(cpu=device == "cpu", kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)])


def refuse_sharding(trained: bool) -> None:
    """Raise ValueError under DeepSpeed, where FSDP would split what is `trained`, and for what our FSDP has not."""
    if _is_set("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(
            "DEEPSPEED would split an adapter's parameters, which are saved whole: launch with --multi_gpu or "
            "--use_fsdp (docs/running.md)"
        )
    if trained:
        raise ValueError(
            "FSDP splits a frozen backbone here, by scripts/run.py task=train, and nothing that is trained: launch "
            "with --multi_gpu, where every process holds the backbone (docs/running.md)"
        )
    for name in ("FSDP_OFFLOAD_PARAMS", "FSDP_ACTIVATION_CHECKPOINTING"):
        if SHARDED and _is_set(name):
            raise ValueError(f"--{name.lower()} is not done here: leave it out (docs/running.md)")


@contextmanager
def in_turn(device: str) -> Iterator[Callable[..., Any]]:
    """One process after the other is given torch's `fully_shard` over all of them: host memory holds one backbone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device, (PROCESSES,))
    for turn in range(PROCESSES):
        if turn == RANK:
            yield partial(fully_shard, mesh=mesh)
        wait_for_everyone()


def sharded(model: nn.Module) -> list[str]:
    """The names of the parameters of which every process holds a part."""
    return [name for name, parameter in model.named_parameters() if hasattr(parameter, "full_tensor")]


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    part: Tensor = tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole(tensor: Tensor) -> Tensor:
    """All of it, for which all processes must ask."""
    full: Tensor = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


def share(batch: int) -> int:
    """Rows per process, so that a fit's batch is the same however many share it.

    Raises ValueError if it does not divide, and for a launcher that splits what is trained.
    """
    # whoever is here without `join` has a backbone that nobody has split
    refuse_sharding(trained=_is_set(FSDP))
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
