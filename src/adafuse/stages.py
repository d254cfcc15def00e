"""The stages of a run, and what each stands on: pretrain <- train <- evaluate, drift and what measures arms.

In: a checked `Config`. Out: a record per cell (and a backbone or an adapter), or nothing if a finished record is
there already. A stage first brings up to date what it needs, so any stage can be asked for by itself. Heavy imports
happen only when a cell has to run. Next: backbone.py, adapters/, training/, evaluation/, bench/.
"""

from __future__ import annotations

import datetime
import errno
import importlib
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

from adafuse import cell, machine, membership, records, tracking
from adafuse.config import Config, Task
from adafuse.distributed import MAIN_PROCESS, Silent, join, wait_for_everyone
from adafuse.files import disk_error, refuse_irregular
from adafuse.locking import Busy, wait_for_writer
from adafuse.model import backbone
from adafuse.model.checkpoint import dtype_of
from adafuse.model.declared import OF_ARMS, check_cell
from adafuse.records import Recorder
from adafuse.refusals import refuse_device, refuse_processes, refuse_untrained

# the environment variable that tells all processes of a command which one it is; no clock does, which may be set back
COMMAND = "ADAFUSE_COMMAND_ID"
# what torch says where a tensor has no room
OUT_OF_MEMORY = ("can't allocate memory", "out of memory", "Storage size calculation overflowed")
# less than this and a failed write is for want of room
FULL_BYTES = 2**20

# records that this process has called done already
_said: set[Path] = set()

Outcome = Literal["done", "skipped", "failed"]


def run(config: Config, command: str, experiment: str | None = None) -> Outcome:
    """Bring one cell up to date and say what happened; a failure is in the record and raised by `records`.

    A cell that another process is writing is waited for: jobs side by side stand on one backbone.
    """
    waited = False
    while True:
        path = cell.record_path(config)
        try:
            outcome = _run(config, command, experiment)
        except Busy:
            waited = True
            print(f"waiting for another process that writes {path}")
            wait_for_writer(records.partial_path(path))
            continue
        if waited and outcome == "skipped" and path not in _said:
            print(f"done already: {path}")
        return outcome


def _run(config: Config, command: str, experiment: str | None) -> Outcome:
    task = config.task
    if task is Task.train and not config.method.is_trained:
        print(f"{config.method.name} has nothing to train")
        return "skipped"
    known = _known(config)
    if known is not None:
        with _said_alone():
            _note(config, command, experiment)
        _mirror(config)
        return known
    backbone.check_source(config.model)
    check_cell(config)
    refuse_untrained(config)
    refuse_processes(config)
    refuse_device(config, backbone.device(config))
    _refuse_irregular(config)
    _note(config, command, experiment)
    for needed in cell.needs(config):
        if run(needed, command, experiment) == "failed":
            raise ValueError(
                f"{task.name} needs {needed.task.name}, which failed: see {cell.record_path(needed)}"
            )
    path = cell.record_path(config)
    print(f"{task.name}: {path}")
    join(backbone.device(config))
    recorded: AbstractContextManager[Any] = nullcontext(Silent())
    if MAIN_PROCESS:
        recorded = records.open_record(path, run_fields(config, command, experiment))
    with recorded as record, _want_of_room_in_one_line(config):
        if config.model.path is not None:
            folder = Path(config.model.path)
            record.write("checkpoint", path=str(folder), stored_in=dtype_of(folder).name)
        _STAGES[task](config, record)
    wait_for_everyone()
    if not MAIN_PROCESS:
        return "done"
    _mirror(config)
    written = records.read(path)
    for error in written.of("error"):
        print(f"error: {error['where']}: {error['message']}", file=sys.stderr)
    return "failed" if written.status == "error" else "done"


def _known(config: Config) -> Outcome | None:
    """What became of this cell when it ran before, said once; what another job of the same sweep has just written, well
    or not, runs no second time and is not told again.
    """
    path = cell.record_path(config)
    written = records.read(path) if path.exists() else None
    if written and written.run.get("command_id") == os.environ.get(COMMAND, ""):
        return "failed" if written.status == "error" else "skipped"
    done = finished(config)
    if done is None:
        return None
    if done not in _said:
        print(f"done already: {done}")
    _said.add(done)
    return "skipped"


def finished(config: Config) -> Path | None:
    """The record of this cell that finished without an error and whose result is there, under any hash that it had.

    Raises ValueError with one line for one that is damaged.
    """
    # what others are built on is of this Python's text
    others = config.task not in (Task.pretrain, Task.train)
    for path, known in cell.known_records(config, other_pythons=others).items():
        if records.is_done(path, known) and _result_there(config, path):
            return path
    return None


def run_fields(config: Config, command: str, experiment: str | None = None) -> dict[str, Any]:
    """All fields of the `run` line except the schema: cell, configuration, code, versions, machine."""
    commit, dirty = machine.git_state()
    return {
        "task": config.task.name,
        "cell_id": cell.cell_id(config),
        "config_hash": cell.cell_hash(config),
        "text": cell.text(config),
        "arm_versions": cell.versions_of_arms(config) if config.task in (*OF_ARMS, Task.fit_speed) else {},
        "experiment": experiment,
        "profile": config.profile,
        "commit": commit,
        "dirty": dirty,
        "seed": config.seed,
        "replicate": config.replicate,
        "versions": machine.versions(),
        "machine": machine.machine(config.device),
        "command": command,
        "command_id": os.environ.get(COMMAND),
        "started_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": cell.as_plain(config),
    }


def _refuse_irregular(config: Config) -> None:
    """Raise ValueError where a fit would write through a link, or wait: in its folder, or that of its checkpoints."""
    if config.task not in (Task.pretrain, Task.train):
        return
    pretrain = config.task is Task.pretrain
    folder = cell.backbone_dir(config) if pretrain else cell.adapter_dir(config, config.method)
    for written in folder.parent.glob(f"{folder.name}*"):
        refuse_irregular(written, links=False)


def _note(config: Config, command: str, experiment: str | None) -> None:
    if MAIN_PROCESS:
        membership.note(config, command, experiment)


@contextmanager
def _said_alone() -> Iterator[None]:
    """Where nothing can be written what is finished is read all the same."""
    try:
        yield
    except OSError as error:
        print(error, file=sys.stderr)


def _mirror(config: Config) -> None:
    """Show the cell's record to the tracker, which shows each but once."""
    if MAIN_PROCESS and config.tracker != "off":
        path = next(path for path in cell.known_records(config) if path.exists())
        tracking.track(path, config.tracker, cell.identity(config))


def _name_backbone(config: Config, record: Recorder) -> None:
    if config.model.is_made_here:
        record.write("backbone", sha256=cell.file_hash(cell.backbone_dir(config) / backbone.WEIGHTS_FILE))


def _pretrain(config: Config, record: Recorder) -> None:
    from adafuse.training import stage

    stage.pretrain(config, record)


def _train(config: Config, record: Recorder) -> None:
    from adafuse.training import stage

    _name_backbone(config, record)
    stage.train(config, record)


def _evaluate(config: Config, record: Recorder) -> None:
    from adafuse.evaluation import stage

    _name_backbone(config, record)
    stage.run(config, record)


def _on_backbone(config: Config, record: Recorder) -> None:
    model, _ = backbone.load(config, cell.pretrained_dir(config))
    _bench(config).run(config, model, backbone.device(config), record)


def _alone(config: Config, record: Recorder) -> None:
    _bench(config).run(config, backbone.device(config), record)


def _bench(config: Config) -> Any:
    """The module of bench/ that is called as its task."""
    return importlib.import_module(f"adafuse.bench.{config.task.name}")


_STAGES: dict[Task, Callable[[Config, Any], None]] = {
    Task.pretrain: _pretrain,
    Task.train: _train,
    Task.evaluate: _evaluate,
    Task.latency: _on_backbone,
    Task.memory: _on_backbone,
    Task.trace: _on_backbone,
    Task.layer: _alone,
    Task.kernel: _alone,
    Task.drift: _on_backbone,
    Task.fit_speed: _on_backbone,
}


def _result_there(config: Config, path: Path) -> bool:
    """A finished record of a fit stands for a folder; if somebody removed it, the fit runs again."""
    if config.task is Task.pretrain:
        return _is_recorded(cell.backbone_dir(config), path, "config.json", backbone.WEIGHTS_FILE)
    if config.task is Task.train:
        files = ("config.json", backbone.WEIGHTS_FILE) if config.method.full else ("router_config.json",)
        return _is_recorded(cell.adapter_dir(config, config.method), path, *files)
    return True


def _is_recorded(folder: Path, path: Path, *files: str) -> bool:
    """Whether what was fitted is there, and that it is what its record says, by the last of its files. Raises
    ValueError if it is something else.
    """
    if not all((folder / name).is_file() for name in files):
        return False
    written = [line["sha256"] for line in records.read(path).of("artifact")]
    if [cell.file_hash(folder / files[-1])] != written:
        raise ValueError(f"{folder} is not what {path} describes: delete both and run again")
    return True


@contextmanager
def _want_of_room_in_one_line(config: Config) -> Iterator[None]:
    """torch and safetensors each have exceptions of their own for a full disk or memory, none of them an OSError."""
    try:
        yield
    except Exception as error:
        if isinstance(error, MemoryError) or any(said in str(error) for said in OUT_OF_MEMORY):
            (why, *_) = str(error).splitlines() or ["MemoryError"]
            cure = "choose smaller sizes, a smaller batch or less context"
            raise OSError(
                f"task={config.task.name} needs more memory than there is: {cure} ({why[:120]})"
            ) from error
        refused = _refused_by_disk(error, Path(config.runs_dir))
        if refused is None:
            raise
        raise disk_error(Path(config.runs_dir), refused) from error


def _refused_by_disk(error: Exception, folder: Path) -> OSError | None:
    """What the disk said to a library; None for what is no refusal, or names its file already."""
    if isinstance(error, OSError):
        return error if error.strerror and error.filename is None else None
    # as Rust says it, for safetensors and tokenizers; torch says nothing, and leaves no room or half an archive
    if code := re.search(r"\(os error (\d+)\)", str(error)):
        return OSError(int(code[1]), "")
    if shutil.disk_usage(folder).free < FULL_BYTES:
        return OSError(errno.ENOSPC, "")
    return OSError("torch cannot end a file") if "inline_container" in str(error) else None
