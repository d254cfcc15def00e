"""scripts/suite.py and conf/suites.yaml: which experiments a command runs."""

import importlib.util
import shutil
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from synthetic.configurations import CONF, ROOT, options

EXPERIMENTS, PROFILES = options("experiment"), options("profile")
SUITES = yaml.safe_load((CONF / "suites.yaml").read_text())
LATENCY = ["table1", "table5", "attribution", "peft", "figure1", "figure2", "trace"]


@pytest.fixture
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("suite_script", ROOT / "scripts/suite.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_experiment_is_in_a_suite_and_every_suite_holds_experiments(script: ModuleType) -> None:
    held = {name: [e for profile in PROFILES for e in script.experiments(name, profile)] for name in SUITES}
    assert {experiment for found in held.values() for experiment in found} == set(EXPERIMENTS)
    assert all(held.values())
    by_name = [*held["choices"], *held["further"], *held["own"]]
    assert len(by_name) == len(PROFILES) * len(set(by_name)), "in one of these"
    assert not set(by_name) & {*held["paper"], *held["accuracy"]}


def test_what_make_runs(script: ModuleType) -> None:
    for profile in PROFILES:
        captured = script.experiments("captured", profile)
        assert bool(captured) is (profile == "gpu")
        assert script.experiments("latency", profile) == [*LATENCY, *captured]
        # the domains are the paper's own, or part of the study of accuracy
        domains = ["table3", "table4"] if profile == "paper" else []
        assert script.experiments("paper", profile) == ["table2", *domains, *LATENCY, *captured]
        assert script.experiments("accuracy", profile)[:3] == ["table2", "table3", "table4"]
        for suite in SUITES:
            found = script.experiments(suite, profile)
            assert len(set(found)) == len(found)


def test_experiments_that_need_a_gpu_are_in_its_suite(script: ModuleType) -> None:
    needy = [e for e in EXPERIMENTS if "Needs a GPU" in (CONF / f"experiment/{e}.yaml").read_text()]
    for profile in ("cpu", "paper"):
        assert not set(needy) & set(script.experiments("paper", profile))


def test_mistakes_are_one_line(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(CONF / "profile", tmp_path / "profile")
    (tmp_path / "experiment").mkdir()
    for arguments, message in (
        (["paper"], "name a suite and a profile"),
        (["nonesuch", "cpu"], "there is no suite nonesuch"),
        (["paper", "nonesuch"], "there is no profile nonesuch"),
    ):
        assert script.main(arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ") and message in line
    (tmp_path / "suites.yaml").write_text("paper: [no_such]\n")
    with pytest.raises(ValueError, match="paper names no_such, which is no experiment and no suite"):
        script.experiments("paper", "cpu", tmp_path)
