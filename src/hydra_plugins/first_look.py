"""What all jobs of a sweep share is looked at once, before the first, instead of refused by every one of them.

In: what Hydra composed without the swept keys. Out: nothing, or one line and exit status 2. Chosen by conf/config.yaml.
"""

from __future__ import annotations

import copy
import sys
from dataclasses import replace
from itertools import product
from typing import Any

from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from adafuse.compose import build
from adafuse.config import Task
from adafuse.model.backbone import check_source
from adafuse.model.declared import check_cell

# what check_cell reads beside task and method: where a sweep changes it, every job looks for itself
READ = {"model", "experts", "arms", "latency", "context", "budget", "profile", "data"}


class FirstLook(Callback):
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra takes an Exception of a callback for a warning, so this leaves by SystemExit."""
        named = dict(override.split("=", 1) for override in config.hydra.overrides.task if "=" in override)
        swept = {
            key: str(value).split(",") for key, value in (config.hydra.sweeper.get("params") or {}).items()
        }
        swept |= {key: value.split(",") for key, value in named.items()}
        changed = {key.split(".")[0] for key, values in swept.items() if len(values) > 1}
        composed = copy.deepcopy(config)
        composed._set_flag(["struct", "readonly"], [False, False])
        del composed["hydra"]
        try:
            shared = build(composed)
        except (ValueError, OmegaConfBaseException):
            return  # of defaults, which no job may have: each says what is wrong with its own
        try:
            if "model" not in changed:
                check_source(shared.model)
            if not changed & READ:
                tasks, methods = (
                    swept.get("task", [shared.task.name]),
                    swept.get("method", [shared.method.name]),
                )
                for task, method in product(tasks, methods):
                    check_cell(replace(shared, task=Task[task], method=shared.methods[method]))
        except (ValueError, OSError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
