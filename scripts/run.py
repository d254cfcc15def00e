"""The one command: compose the configuration, refuse what cannot work, bring the cells up to date.

In: overrides (experiment=table2 profile=cpu seed=0,1 -m). Out: records under runs_dir. Exit status: 0 all is done,
1 a cell failed (its record says why; in a sweep the other cells went on), 2 the command or a file is wrong (one line).
See an experiment without running it: python scripts/run.py experiment=table2 --cfg job. Next: src/adafuse/compose.py.
"""

from __future__ import annotations

import os
import re
import shlex
import signal
import sys
import traceback
import uuid
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

# Hydra then raises what went wrong instead of printing it; main() below says it in one line.
os.environ.setdefault("HYDRA_FULL_ERROR", "1")
# libgomp's threads wait for each other by spinning for milliseconds, and stand still as soon as anything else wants a
# core: a training step of a million parameters took 0.06 s on two idle cores and 3.4 s on two shared ones, with this
# shorter wait 0.2 s. Profile cpu has one thread and waits for none (conf/profile/cpu.yaml). Set before torch is loaded.
os.environ.setdefault("GOMP_SPINCOUNT", "20000")

import hydra
import yaml
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.errors import (
    ConfigCompositionException,
    HydraException,
    MissingConfigException,
    OverrideParseException,
)
from hydra.types import RunMode
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from adafuse import stages
from adafuse.compose import build, register
from adafuse.config import Config, Task, Weights
from adafuse.evaluation.suites import check_sets, check_suite
from adafuse.files import refuse_irregular
from adafuse.membership import refuse_secrets
from hydra_plugins import isolated_launcher

CONF = Path(__file__).resolve().parents[1] / "conf"
DONE, FAILED, WRONG = 0, 1, 2
# PEFT folders as experts: `from` is a word of Python's, which no field can be called
FROM, FOLDERS = "experts.from", "experts.folders"
# what names a folder
PATHS = ("model.path", "data.path", "suite.path", "latency.prompts", "runs_dir")
NOISE = ("object_type=", "reference_type=", "full_key:", "See https://", "Set the environment variable")
OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
# what is the command's or a file's fault, and no traceback
REFUSED = (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError, OSError)
_said: set[str] = set()


def main() -> int:
    """Run the command line; returns the exit status."""
    statuses: list[int] = []
    isolated_launcher.statuses.clear()
    if isolated_launcher.CHILD in sys.argv:
        isolated_launcher.end_with_parent()
    register()
    # argparse takes no more overrides after a flag
    arguments = sorted(sys.argv[1:], key=lambda argument: argument not in ("-m", "--multirun"))
    sys.argv[1:] = map(whole_path, arguments)
    os.environ.setdefault(stages.COMMAND, uuid.uuid4().hex)
    # a sweep's child processes go with it
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))

    @hydra.main(version_base="1.3", config_path=str(CONF), config_name="config")
    def job(composed: Any) -> None:
        statuses.append(run_cell(composed))
        launcher = HydraConfig.get().launcher
        if statuses[-1] != DONE and "submitit" in launcher._target_:
            # it runs elsewhere, and what is raised there is raised here again
            raise ValueError(f"a job failed: its output is in {launcher.submitit_folder}")

    try:
        # Hydra makes folders of some overrides before it calls anything of ours
        refuse_secrets(sys.argv[1:])
        refuse_irregular(CONF)
        job()
    except REFUSED as error:
        return refuse(error)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 128 + signal.SIGINT
    statuses += map(bool, isolated_launcher.statuses)
    return statuses[0] if len(statuses) == 1 else max(map(bool, statuses), default=DONE)


def whole_path(argument: str) -> str:
    """An override that names a folder, as Hydra reads it whole: its grammar would split it at a comma and stop at `(`.

    Several folders with commas between stay a sweep, if all of them are there.
    """
    key, _, value = argument.partition("=")
    if key in (FROM, FOLDERS):
        return f"{FOLDERS}={_list_of_paths(value)}"
    if key not in PATHS or value == "null" or not value or "${" in value or value[0] in "'\"":
        return argument
    expanded = os.path.expanduser(value)
    parts = [os.path.expanduser(part) for part in value.split(",")]
    if len(parts) > 1 and all(map(os.path.exists, parts)) and not os.path.exists(expanded):
        return argument
    if re.fullmatch(r"[\w./@+-]+", expanded, re.ASCII):
        return f"{key}={expanded}"
    return f"{key}={QuotedString(expanded, Quote.single).with_quotes()}"


def _list_of_paths(value: str) -> str:
    """A list of folders as Hydra reads it, each whole; what is quoted, a sweep over lists or another key's is left."""
    if any(mark in value for mark in ("'", '"', "],[", "${")):
        return value
    parts = (os.path.expanduser(part.strip()) for part in value.strip("[]").split(","))
    paths = [QuotedString(part, Quote.single).with_quotes() for part in parts if part]
    return f"[{','.join(paths)}]"


def run_cell(composed: Any) -> int:
    """One cell, or one line that says why not; anything unforeseen keeps its traceback."""
    chosen = HydraConfig.get()
    overrides = list(chosen.overrides.task)
    try:
        config = build(composed, overrides)
        refuse_added_keys(config)
        if config.task is Task.evaluate:
            check_suite(config.suite, config.data)
            check_sets(config.suite)
        stay_offline(config)
        command = shlex.join(["python", "scripts/run.py", *overrides])
        outcome = stages.run(config, command, chosen.runtime.choices.get("experiment"))
    except (OmegaConfBaseException, ValueError, OSError) as error:
        of_a_sweep = chosen.mode is RunMode.MULTIRUN or isolated_launcher.CHILD in chosen.overrides.hydra
        return refuse(error, sweep_job=overrides if of_a_sweep else None)
    except Exception:
        traceback.print_exc()
        return FAILED
    return FAILED if outcome == "failed" else DONE


def refuse_added_keys(node: Any, path: str = "") -> None:
    """`+key=value` gets past the schema; a key that no one reads is a mistake all the same. Raises ValueError."""
    for name, value in vars(node).items() if is_dataclass(node) else node.items():
        if is_dataclass(node) and name not in {field.name for field in fields(node)}:
            raise ValueError(
                f"there is no key {path}{name}: choose from {[field.name for field in fields(node)]}"
            )
        if is_dataclass(value) or (isinstance(value, dict) and all(map(is_dataclass, value.values()))):
            refuse_added_keys(value, f"{path}{name}.")


def stay_offline(config: Config) -> None:
    """Spare the libraries their look-ups where nothing has to be fetched; what the user set stands."""
    from_hub = config.model.path is None and config.model.weights is Weights.hub
    if not from_hub and (not config.suite.bundled or config.suite.path is not None):
        for name, value in OFFLINE.items():
            os.environ.setdefault(name, value)


def refuse(error: Exception, sweep_job: list[str] | None = None) -> int:
    """Print the one line, once if several jobs of this process are refused for the same reason."""
    where, line = f" (job: {' '.join(sweep_job)})" if sweep_job else "", one_line(error)
    if line not in _said:
        print(f"error: {line}{where}", file=sys.stderr)
    _said.add(line)
    return WRONG


def one_line(error: BaseException) -> str:
    """What is wrong and what to do, without Hydra's and OmegaConf's layout, and with nothing that moves a terminal."""
    return " ".join("".join(c if c.isprintable() else " " for c in _without_layout(error)).split())


def _without_layout(error: BaseException) -> str:
    if isinstance(error, MissingConfigException) and error.options:
        return f"there is no conf/{error.missing_cfg_file}.yaml: choose from {list(error.options)}"
    if isinstance(error.__context__, InterpolationResolutionError):
        # of a defaults list: Hydra then lists every group there is instead of what is wrong
        return str(error.__context__).splitlines()[0]
    cause = error.__cause__
    if isinstance(error, ConfigCompositionException) and isinstance(cause, OmegaConfBaseException):
        # only the first line: Hydra would next advise to append the key, which the schema refuses
        wrong, why = (str(e).splitlines()[0].rstrip(".") for e in (error, cause))
        return f"{wrong} (see --cfg job)" if why in wrong else f"{wrong}: {why} (see --cfg job)"
    if isinstance(error, OverrideParseException) and "LexerNoViableAlt" in str(error):
        key = str(error.override).split("=")[0]
        return f"cannot read the override {error.override}: quote its value twice, '{key}=\"...\"'"
    lines = [line.strip() for line in str(error).splitlines()]
    return " ".join(line for line in lines if line and not line.startswith(NOISE)) or type(error).__name__


if __name__ == "__main__":
    sys.exit(main())
