"""scripts/run.py as a user starts it, and cells that had run before."""

import os
import subprocess
import sys
from pathlib import Path

from adafuse import cell, records
from synthetic.configurations import ROOT, compose

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
        timeout=60,
    )


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
