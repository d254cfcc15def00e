"""scripts/run.py as a user starts it, or in this process, and cells that had run before."""

import importlib.util
import os
import signal
import subprocess
import sys
import uuid
from pathlib import Path
from types import ModuleType

import pytest
from hydra.core.global_hydra import GlobalHydra

from adafuse import cell, records, stages
from synthetic.configurations import ROOT, compose, read_once

# blocks count on a busy machine as well: a cell of which none counts is an error
ALWAYS_COUNTED = """
import runpy, sys
from adafuse.bench import rounds
rounds.preempted = lambda *_: None
sys.argv[0] = "scripts/run.py"
runpy.run_path("scripts/run.py", run_name="__main__")
"""
LAYER = ("task=layer", "device=cpu")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "scripts/run.py", *arguments]
    return subprocess.run(
        command,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | environment,
        timeout=300,
    )


def script(name: str) -> ModuleType:
    """scripts/NAME.py as a module."""
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / f"scripts/{name}.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(capfd: pytest.CaptureFixture[str], *arguments: str) -> subprocess.CompletedProcess[str]:
    """What `run` gives, without a start of Python and Hydra: nothing is imported anew, the rest is the same."""
    before = signal.getsignal(signal.SIGTERM)
    capfd.readouterr()
    try:
        with pytest.MonkeyPatch.context() as patch, read_once():
            patch.chdir(ROOT)
            patch.setattr(sys, "argv", ["scripts/run.py", *arguments])
            patch.setenv(stages.COMMAND, uuid.uuid4().hex)
            status = script("run").main()
    except SystemExit as ended:  # Hydra's, after a sweep of which a job failed
        status = ended.code
    finally:
        signal.signal(signal.SIGTERM, before)
        GlobalHydra.instance().clear()
    return subprocess.CompletedProcess(arguments, status, *capfd.readouterr())


def finished(folder: Path, *overrides: str) -> Path:
    """A finished record of the cell that these overrides ask for, as if it had run before."""
    config = compose(f"runs_dir={folder}", *overrides)
    path = cell.record_path(config)
    header = {
        "task": config.task.name,
        "cell_id": cell.cell_id(config),
        "config_hash": cell.cell_hash(config),
        "config": {},
        "machine": {},
    }
    with records.open_record(path, header):
        pass
    return path
