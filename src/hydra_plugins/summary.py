"""How a command ends: a table of what its jobs have measured, the page, and where both are.

In: the sweep that has just ended. Out: text on the screen; report.html, drawn by scripts/report.py from all records of
the folder. Chosen by the experiments that somebody starts to see one model's numbers. Next: report/summary.py.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
from hydra.errors import HydraException
from hydra.experimental.callback import Callback
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from adafuse import cell, records
from adafuse.compose import build
from adafuse.config import Config
from adafuse.machine import ROOT
from adafuse.records import Record
from hydra_plugins.first_look import jobs


class Summary(Callback):
    def __init__(self, note: str = "") -> None:
        """`note` is what the reader of the table must know."""
        self.note = note

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        from adafuse.report.summary import summary  # pandas

        found: dict[Path, Record] = {}
        lacking: dict[str, None] = {}
        for overrides in jobs(config):
            for one, places in _cells(overrides):
                path = next((path for path in places if path.exists()), None)
                if path is None:
                    lacking[f"{one.task.name} of {cell.cell_id(one)}: no record, the reason stands above"] = (
                        None
                    )
                else:
                    found.setdefault(path, records.read(path))
        if not found:
            return
        runs = Path(config.runs_dir)
        print(f"\n{summary(list(found.values()), config.hydra.runtime.choices.experiment)}")
        print("\n".join(f"  {line}" for line in lacking))
        if self.note:
            print(self.note)
        print(f"records: {runs / 'records'}")
        _draw(runs)


def _cells(overrides: list[str]) -> list[tuple[Config, list[Path]]]:
    """What a job stands on, and where its records may be; nothing for a job that was refused."""
    try:
        own = build(hydra.compose("config", overrides=overrides), overrides)
        return [(one, list(cell.known_records(one))) for one in cell.with_needs(own)]
    except (HydraException, OmegaConfBaseException, ValueError):
        return []


def _draw(runs: Path) -> None:
    command = [sys.executable, str(ROOT / "scripts/report.py"), "--records", str(runs / "records")]
    drawn = subprocess.run([*command, "--out", str(runs / "report")], capture_output=True, text=True)
    if drawn.returncode:
        print(f"the page could not be drawn: {drawn.stderr.strip()}", file=sys.stderr)
    else:
        print(f"page: {runs / 'report' / 'report.html'}")
