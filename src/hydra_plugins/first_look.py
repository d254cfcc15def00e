"""What all jobs of a sweep share is looked at once, before the first, instead of refused by every one of them.

In: what Hydra composed without the swept keys. Out: what is said of a backbone's precision; or one line and exit status
2. Chosen by conf/config.yaml. `jobs` are those of the sweep. Next: summary.py, which looks back at them.
"""

from __future__ import annotations

import copy
import itertools
import shutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adafuse.compose import build
from adafuse.config import Config, Task
from adafuse.files import refuse_irregular
from adafuse.model.backbone import check_source
from adafuse.model.checkpoint import dtype_of
from adafuse.model.declared import check_cell

SLURM = ".SlurmLauncher"
# what check_cell reads beside task and method: where a sweep changes it, every job looks for itself
READ = {"model", "experts", "arms", "latency", "context", "budget", "profile", "data"}


class FirstLook(Callback):
    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Hydra takes an Exception of a callback for a warning, so this leaves by SystemExit."""
        if config.hydra.launcher._target_.endswith(SLURM) and shutil.which("srun") is None:
            _refuse("there is no srun here, so no Slurm job can be sent: leave hydra/launcher=slurm out")
        swept = {one.get_key_element(): _values(one) for one in _overrides(config)}
        changed = {key.split(".")[0] for key, values in swept.items() if len(values) > 1}
        composed = copy.deepcopy(config)
        composed._set_flag(["struct", "readonly"], [False, False])
        del composed["hydra"]
        try:
            # Hydra writes there what it composed
            refuse_irregular(Path(config.hydra.sweep.dir), links=False)
            if "model" not in changed:
                model: Any = OmegaConf.to_object(composed.model)
                check_source(model)
            shared = _shared(composed, [f"{key}={values[0]}" for key, values in swept.items()])
            if shared is None:
                return
            if not changed & READ:
                tasks, methods = (
                    swept.get("task", [shared.task.name]),
                    swept.get("method", [shared.method.name]),
                )
                for task, method in itertools.product(tasks, methods):
                    check_cell(replace(shared, task=Task[task], method=shared.methods[method]))
        except (ValueError, OSError, OmegaConfBaseException) as error:
            _refuse(str(error))
        if "model" not in changed and shared.model.path is not None:
            own, used = dtype_of(Path(shared.model.path)).name, shared.model.dtype.name
            print(f"backbone: {shared.model.path}, stored in {own}, computed in {used}")


def _refuse(line: str) -> NoReturn:
    print(f"error: {line}", file=sys.stderr)
    sys.exit(2)


def jobs(config: DictConfig) -> Iterator[list[str]]:
    """The overrides of every job of the sweep that Hydra composed `config` for, in their order."""
    return itertools.chain(*BasicSweeper.split_arguments(_overrides(config), None))


def _overrides(config: DictConfig) -> list[Override]:
    """Those of the experiment's own sweep, and behind them, to take their place, those of the command."""
    params = (config.hydra.sweeper.get("params") or {}).items()
    given = [*(f"{key}={value}" for key, value in params), *config.hydra.overrides.task]
    parsed = OverridesParser.create().parse_overrides(given)
    return list({one.get_key_element(): one for one in parsed}.values())


def _values(override: Override) -> list[str]:
    if override.is_sweep_override():
        return [str(value) for value in override.sweep_string_iterator()]
    return [str(override.get_value_element_as_str())]


def _shared(composed: DictConfig, overrides: list[str]) -> Config | None:
    """None for defaults that no job may have: each job says what is wrong with its own."""
    try:
        return build(composed, overrides)
    except (ValueError, OmegaConfBaseException):
        return None
