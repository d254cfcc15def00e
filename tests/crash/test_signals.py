"""SIGINT and SIGTERM to a sweep, to one of its jobs and to all of them, with one and two jobs at a time."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from synthetic import whole
from synthetic.configurations import ROOT
from synthetic.hostile import SOAK

pytestmark = pytest.mark.slow
# scripts/run.py as it is, but for how much text there is: the launcher starts its jobs by this file as well
SCRIPT = """
import sys
sys.path[:0] = {paths!r}
from synthetic import whole
from synthetic.scripts import script
whole.quicken()
sys.exit(script("run").main())
"""
STATUS = {signal.SIGINT: 130, signal.SIGTERM: 143}
WHOM = ("the sweep", "a job", "all")
CASES = [(sent, jobs, whom) for sent in STATUS for jobs in (1, 2) for whom in WHOM]


def command(folder: Path, jobs: int) -> list[str]:
    (folder / "command.py").write_text(SCRIPT.format(paths=[str(ROOT / name) for name in ("src", "tests")]))
    given = [job for job in whole.JOBS if not job.startswith(("hydra/launcher", "task=", "method="))]
    sweep = ["task=train", "method=lora,adafuse,mola", "hydra/launcher=isolated"]
    own = [f"hydra.launcher.jobs_per_gpu={jobs}", f"runs_dir={folder / 'runs'}"]
    return [sys.executable, str(folder / "command.py"), *given, *sweep, *own]


def at_work(folder: Path, sweep: subprocess.Popen[str]) -> list[int]:
    """The jobs of a sweep, as soon as one of them writes a record."""
    deadline = time.monotonic() + 120
    while not list(folder.glob("runs/records/*/*.partial")):
        assert time.monotonic() < deadline and sweep.poll() is None
        time.sleep(0.02)
    time.sleep(random.uniform(0, 2))
    return whole.below(sweep.pid)


@pytest.mark.parametrize(("sent", "jobs", "whom"), CASES if SOAK else CASES[5:6])
def test_a_signal_ends_what_it_was_sent_to_and_loses_nothing(
    sent: signal.Signals, jobs: int, whom: str, undisturbed: dict[str, Any], tmp_path: Path
) -> None:
    with (tmp_path / "said").open("w+") as said:
        sweep = subprocess.Popen(
            command(tmp_path, jobs),
            cwd=ROOT,
            stdout=said,
            stderr=said,
            start_new_session=True,
            # tests that a shell started with & ignore interrupts, and what they start would too
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        children = at_work(tmp_path, sweep)
        assert children
        if whom == "all":
            os.killpg(sweep.pid, sent)
        else:
            os.kill(sweep.pid if whom == "the sweep" else children[0], sent)
        status = sweep.wait(240)
        whole.nothing_outlives(sweep.pid)
        shown = (tmp_path / "said").read_text()
    assert "Traceback" not in shown, shown
    # what is sent to a job ends that one, and the others go on; it may have been over just before
    assert status in ((0, 1) if whom == "a job" else (STATUS[sent],)), (status, shown)
    again = subprocess.run(command(tmp_path, jobs), cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    found = whole.results(tmp_path)
    assert len(list(tmp_path.glob("runs/records/train/*.jsonl"))) == 3
    shared = found.keys() & undisturbed.keys()
    assert len(shared) > 10 and {key: found[key] for key in shared} == {
        key: undisturbed[key] for key in shared
    }
