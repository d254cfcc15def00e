"""Makefile: help lists every target, and a failing experiment stops neither the others nor the report."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from synthetic.configurations import ROOT

MAKEFILE = (ROOT / "Makefile").read_text()
PYTHON = f"""#!/bin/sh
case "$1" in scripts/suite.py) exec {sys.executable} "$@" ;; esac
echo "$@" >> "$SAID"
case "$*" in
  *experiment=$FAILS\\ *) exit ${{STATUS:-1}} ;;
  *report.py*) exit ${{REPORT:-0}} ;;
esac
"""


def make(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("MAKE", "MFLAGS"))}
    command = ["make", "--no-print-directory", *arguments]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, env=clean | environment, timeout=60
    )


@pytest.fixture
def venv(tmp_path: Path) -> Path:
    """An environment that looks installed; its python runs suite.py alone, and writes down what else it is asked."""
    folder = tmp_path / "venv"
    (folder / "bin").mkdir(parents=True)
    (folder / "bin/python").write_text(PYTHON)
    (folder / "bin/python").chmod(0o755)
    (folder / ".installed").touch()
    return folder


def reproduce(venv: Path, *arguments: str, **environment: str) -> tuple[int, list[str]]:
    said = venv / "said"
    said.unlink(missing_ok=True)
    done = make("reproduce", f"VENV={venv}", *arguments, SAID=str(said), **{"FAILS": "none", **environment})
    return done.returncode, said.read_text().splitlines()


def test_help_is_the_default_and_lists_every_target() -> None:
    targets = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))
    assert targets == set(re.search(r"\.PHONY: (.*)", MAKEFILE)[1].split())
    done = make()
    assert done.returncode == 0
    assert {line.split()[1] for line in done.stdout.splitlines()} == targets
    assert all(len(line.split()) > 3 for line in done.stdout.splitlines())


def test_every_experiment_of_reproduce_exists_and_says_how_long_it_takes(venv: Path) -> None:
    captured = ["graph", "batch_scan", "kernels", "drift"]
    for profile in ("cpu", "gpu"):
        done = make("reproduce", f"VENV={venv}", f"PROFILE={profile}", SAID=str(venv / "said"), FAILS="none")
        headings = re.findall(r"^== (\w+): (.*)$", done.stdout, re.MULTILINE)
        names = [name for name, _ in headings]
        assert names[:3] == ["table2", "table1", "table5"] and names[-1] == "report"
        assert (set(captured) <= set(names)) is (profile == "gpu")
        assert all("minute" in hint or "nothing more" in hint or "second" in hint for _, hint in headings)


def test_latency_leaves_the_training_out(venv: Path) -> None:
    done = make("latency", f"VENV={venv}", "PROFILE=cpu", SAID=str(venv / "said"), FAILS="none")
    names = re.findall(r"^== (\w+):", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and names[0] == "table1" and names[-1] == "report"


def test_accuracy_runs_every_seed_of_every_study(venv: Path) -> None:
    said = venv / "said"
    done = make("accuracy", f"VENV={venv}", "PROFILE=cpu", SAID=str(said), FAILS="none")
    names = re.findall(r"^== (\w+):", done.stdout, re.MULTILINE)
    assert (
        done.returncode == 0 and names[0] == "table2" and {"gate_input", "bypass", "generation"} < set(names)
    )
    assert "seed=" not in said.read_text()


def test_reproduce_runs_the_experiments_and_then_the_report(venv: Path) -> None:
    status, said = reproduce(venv, "PROFILE=cpu", "OVERRIDES=seed=0,1 -m", f"RUNS={venv}/runs")
    assert status == 0
    assert said[0] == f"scripts/run.py experiment=table2 profile=cpu runs_dir={venv}/runs seed=0 seed=0,1 -m"
    assert said[-1] == f"scripts/report.py --records {venv}/runs/records --out {venv}/runs/report"
    assert len(said) == 9


def test_a_failing_experiment_stops_nothing_but_is_told(venv: Path) -> None:
    status, said = reproduce(venv, "PROFILE=cpu", FAILS="table1")
    assert status != 0
    assert len(said) == 9 and "report.py" in said[-1]


def test_a_failing_report_is_told(venv: Path) -> None:
    assert reproduce(venv, "PROFILE=cpu", REPORT="1")[0] != 0


def test_an_interrupt_stops_everything(venv: Path) -> None:
    status, said = reproduce(venv, "PROFILE=cpu", FAILS="table1", STATUS="130")
    assert status != 0
    assert len(said) == 2


def test_experiments_can_be_named(venv: Path) -> None:
    status, said = reproduce(venv, "PROFILE=cpu", "EXPERIMENTS=table6 drift")
    assert status == 0
    assert [line.split()[1] for line in said[:-1]] == ["experiment=table6", "experiment=drift"]


@pytest.mark.parametrize("wrong", ["PROFILE=nonesuch", "SUITE=nonesuch"])
def test_a_suite_or_a_profile_that_does_not_exist_is_one_line(wrong: str, venv: Path) -> None:
    done = make("reproduce", f"VENV={venv}", "PROFILE=cpu", wrong, SAID=str(venv / "said"), FAILS="none")
    assert done.returncode != 0 and not (venv / "said").exists()
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("make")]
    assert line.startswith(f"error: there is no {wrong.split('=')[0].lower()} nonesuch: choose from ")


@pytest.mark.parametrize(("status", "profile"), [(0, "gpu"), (9, "cpu")])
def test_the_profile_follows_the_machine(venv: Path, tmp_path: Path, status: int, profile: str) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\nexit {status}\n")
    tool.chmod(0o755)
    _, said = reproduce(venv, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert all(f"profile={profile} " in line for line in said[:-1])


def test_an_old_python_is_refused_in_one_line(tmp_path: Path) -> None:
    old = tmp_path / "python"
    old.write_text('#!/bin/sh\necho "error: Python 3.11 or newer is needed" >&2\nexit 1\n')
    old.chmod(0o755)
    done = make("install", f"VENV={tmp_path / 'venv'}", f"PYTHON={old}")
    assert done.returncode != 0 and "3.11" in done.stderr
    assert not (tmp_path / "venv").exists()


def test_constraints_fit_any_machine() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.]+", pin) for pin in pins), (
        "no local versions, no paths"
    )
    assert not any(pin.startswith("adafuse") for pin in pins)
