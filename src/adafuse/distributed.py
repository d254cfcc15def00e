"""Several processes on one fit: torchrun --nproc_per_node 2 scripts/run.py task=train ...

transformers.Trainer spreads the batches. Every process runs the stage; the main one alone keeps the record and the
files. In: the environment that torchrun sets. Next: records.py.
"""

from __future__ import annotations

import os
from typing import Any

MAIN_PROCESS = os.environ.get("RANK", "0") == "0"
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def share(batch: int) -> int:
    """Rows per process, so that a fit's batch is the same however many share it. Raises ValueError if it is odd."""
    if batch % PROCESSES:
        raise ValueError(
            f"a batch of {batch} rows does not divide over {PROCESSES} processes: change train.batch"
        )
    return batch // PROCESSES


class Silent:
    """The recorder of the other processes."""

    def write(self, kind: str, **fields: Any) -> None:
        pass


def wait_for_everyone() -> None:
    """The next stage reads what the main process has just written."""
    if PROCESSES > 1:
        from accelerate import PartialState

        PartialState().wait_for_everyone()
