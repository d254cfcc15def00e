"""A whole study in seconds: pre-training, a fit, an evaluation, latency, then packing, the page and the comparison.

In: a folder, and what goes wrong meanwhile. Out: a process that leaves there what `make reproduce`, publishing and
`make compare` leave, by the commands' own functions; and what it has found, without times and places, so that a study
that was disturbed can be held against one that was not.
"""

import ctypes
import errno
import os
import random
import resource
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil

from adafuse import archive, cell, membership
from synthetic.configurations import ROOT, read_once
from synthetic.scripts import script

JOBS = [
    *("-m", "hydra/launcher=basic", "task=evaluate,latency", "method=adafuse", "device=cpu"),
    *("model.shape.hidden_size=32", "model.shape.intermediate_size=48", "model.shape.num_hidden_layers=2"),
    *("pretrain.steps=6", "pretrain.batch=2", "pretrain.max_length=32", "pretrain.save_every_steps=2"),
    *("pretrain.warmup_steps=1", "train.steps=6", "train.batch=4", "train.save_every_steps=2"),
    *("train.warmup_steps=1", "data.families=[copy]", "data.train_items=16", "data.validation_items=4"),
    *("data.test_items=4", "experts.count=4", "experts.rank=2", "context=8", "latency.rounds=2"),
    *("latency.check_tokens=4", "latency.trained_adapters=true"),
    "arms.run=[base,base_again,adafuse_switch]",
]
# lines of a record that say what was found, and what of them says where or how
SAME = (
    *("tokens", "parameters", "loss", "metric", "items", "artifact", "backbone", "routing", "agreement"),
    *("check", "selections"),
)
BY_THE_WAY = ("path", "resumed_from_step")
# the names of a change to a file, as Python tells its auditors
CHANGES = ("os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link", "os.truncate")
WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
Fault = Callable[[Path], None]


def run(folder: Path, *more: str) -> int:
    """Everything, or what is left of it; the exit status of the first command that has another one than 0."""
    os.chdir(ROOT)
    quicken()
    runs, packed, page = folder / "runs", folder / "packed", folder / "report"
    draw, records = script("report").main, str(runs / "records")
    commands = [
        lambda: jobs(f"runs_dir={runs}", *JOBS, *more),
        lambda: archive.main(["pack", records, "--out", str(packed)]),
        lambda: draw(["--records", records, "--out", str(page)]),
        lambda: draw(
            ["--records", records, "--compare", str(page / "measurements.csv.gz"), "--out", str(page)]
        ),
    ]
    return next((status for command in commands if (status := command())), 0)


def quicken() -> None:
    """Little text; blocks count on a busy machine as well, and records of changed sources can be packed."""
    from adafuse import machine
    from adafuse.bench import rounds
    from adafuse.data import pretraining_text
    from adafuse.training import stage

    rounds.preempted = lambda *_: None
    machine.git_state = lambda: ("0" * 40, False)
    stage.HELD_OUT_TOKENS, pretraining_text.CHUNKS_AT_ONCE = 1024, 4


def jobs(*arguments: str) -> int:
    """scripts/run.py with these arguments, as a command of its own."""
    from adafuse import stages

    sys.argv = ["scripts/run.py", *arguments]
    os.environ[stages.COMMAND] = uuid.uuid4().hex
    try:
        with read_once():
            return script("run").main()
    except SystemExit as ended:
        return int(ended.code or 0)


def told(folder: Path) -> dict[str, Any]:
    """What a finished study has found and shows; AssertionError for one that is not whole."""
    found = results(folder)
    rows = membership.read(folder / "runs/records" / membership.FILE)
    found["membership"] = sorted(map(str, rows))
    assert archive.verify(folder / "packed") == len(list((folder / "runs/records").rglob("*.jsonl")))
    found["drawn"] = sorted(path.name for path in (folder / "report").rglob("*") if path.suffix != ".partial")
    return found


def results(folder: Path) -> dict[str, Any]:
    """What records say, by name, and what is in files; AssertionError for a record that is not whole."""
    loaded = archive.load([folder / "runs/records"])
    assert not loaded.left_out, loaded.left_out
    assert not [record.path.name for record in loaded.records if record.status != "ok"]
    found: dict[str, Any] = {
        record.path.name: [_same(line) for line in record.lines if line["kind"] in SAME]
        for record in loaded.records
    }
    for kind in ("adapters", "backbones", "data"):
        for path in sorted((folder / "runs" / kind).rglob("*")):
            # a name of its own, and of nobody's reading
            if path.is_file() and path.suffix != ".partial":
                found[str(path.relative_to(folder))] = cell.file_hash(path)
    return found


def _same(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if key not in BY_THE_WAY}


def start(folder: Path, fault: Fault | None = None, *more: str) -> BaseProcess:
    """A process in a group of its own that runs the study, started in a tenth of a second; it writes what it says to
    `folder`/said.
    """
    for name in ("src", "tests"):
        if str(ROOT / name) not in os.environ.get("PYTHONPATH", "").split(":"):
            os.environ["PYTHONPATH"] = f"{ROOT / name}:{os.environ.get('PYTHONPATH', '')}"
    context = get_context("forkserver")
    context.set_forkserver_preload(["synthetic.warm"])
    folder.mkdir(exist_ok=True)
    found = context.Process(target=_child, args=(folder, fault, more))
    found.start()
    return found


def _child(folder: Path, fault: Fault | None, more: tuple[str, ...]) -> None:
    os.setpgid(0, 0)
    said = os.open(folder / "said", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1)
    os.dup2(said, 2)
    if fault is not None:
        fault(folder)
    sys.exit(run(folder, *more))


def whole(folder: Path, fault: Fault | None = None, *more: str) -> tuple[int | None, str]:
    """Let a study run to its end: its exit status, and what it said."""
    process = start(folder, fault, *more)
    process.join(300)
    assert process.exitcode is not None, "it hung"
    nothing_outlives(process.pid)
    return process.exitcode, (folder / "said").read_text()


def finished(folder: Path) -> dict[Path, bytes]:
    """The records of a disturbed study that are finished; AssertionError for one that is damaged."""
    records = folder / "runs/records"
    loaded = archive.load([records]) if records.exists() else archive.Loaded([], [])
    # a file of which not even the first line was written
    assert not [line for line in loaded.left_out if "no header" not in line], loaded.left_out
    return {one.path: one.data for one in loaded.records if one.status == "ok"}


def survives(
    folder: Path, faults: Iterable[Fault], meet: Callable[[Path, Fault], bool], undisturbed: dict[str, Any]
) -> int:
    """Let one study after the other meet these faults, each time going on by the same command, and hold every one to
    what was found without them; how many faults were met. `meet` says whether the study was not over before.
    """
    studies, met, shown = 0, 0, list[Any]()
    for fault in [*faults, None]:
        own = folder / str(studies)
        there = finished(own)
        shown.append(vars(fault) if hasattr(fault, "__dict__") else fault)
        if fault is not None and meet(own, fault):
            met += 1
            assert there.items() <= finished(own).items(), (shown, "a finished record is lost")
            continue
        status, said = whole(own)
        assert status == 0, (shown, said)
        assert told(own) == undisturbed, shown
        studies, shown = studies + 1, []
    return met


def refused(folder: Path, fault: Fault) -> bool:
    """Let a study meet a fault that is to be refused in lines of one error each; whether it was not over before."""
    status, said = whole(folder, fault)
    assert "Traceback" not in said, (vars(fault) if hasattr(fault, "__dict__") else fault, said)
    assert status == 0 or any(word in said for word in ("cannot ", "error: ")), said
    return status != 0


# -- what goes wrong


class Kill:
    """SIGKILL, by whoever calls it, after so many seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, folder: Path) -> None:
        """Nothing: the process does not know."""


class Changes:
    """From the `number`th change to a file of the study on, every one, or that one alone, meets with a fault."""

    def __init__(self, number: int, code: int | None = None) -> None:
        self.left, self.code = number, code

    def __call__(self, folder: Path) -> None:
        here = str(folder)

        def audit(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & WRITES
            if not (writes or event in CHANGES) or not str(arguments[0]).startswith(here):
                return
            self.left -= 1
            if self.left <= 0 and self.code is None:
                os.kill(os.getpid(), signal.SIGKILL)
            if self.left <= 0:
                raise OSError(self.code, os.strerror(self.code), arguments[0])

        sys.addaudithook(audit)


def full(number: int) -> Changes:
    """No room from the `number`th change on."""
    return Changes(number, errno.ENOSPC)


class Limit:
    """No file may be larger: whatever writes meets with it, in any language."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, folder: Path) -> None:
        # what is said is no file of the study
        cat = subprocess.Popen(["cat"], stdin=subprocess.PIPE)
        assert cat.stdin is not None
        for number in (1, 2):
            os.dup2(cat.stdin.fileno(), number)
        resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, self.size))


def without_rights(folder: Path) -> None:
    """As anybody but root: what a folder's permissions forbid is forbidden."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    # CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH, effective, permitted, inheritable
    for place in range(3):
        data[place] &= ~0b110
    assert libc.capset(header, data) == 0


class Clock:
    """A clock that is stepped back by an hour, again and again."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def __call__(self, folder: Path) -> None:
        true, draw, back = time.time, random.Random(self.seed), [0.0]

        def stepped() -> float:
            back[0] += 3600 * (draw.random() < 0.05)
            return true() - back[0]

        time.time = stepped


# -- processes


def below(pid: int) -> list[int]:
    """The processes that a process started."""
    return [child.pid for child in psutil.Process(pid).children()]


def nothing_outlives(group: int) -> None:
    """AssertionError if anything that a process in a group of its own started is still there after ten seconds."""
    deadline = time.monotonic() + 10
    while left := [one for one in psutil.process_iter() if _group_of(one) == group]:
        assert time.monotonic() < deadline, [one.cmdline() for one in left]
        time.sleep(0.05)


def _group_of(process: psutil.Process) -> int | None:
    try:
        return None if process.status() == psutil.STATUS_ZOMBIE else os.getpgid(process.pid)
    except (psutil.Error, ProcessLookupError):
        return None
