"""scripts/sanitize.py: a line for each tool and file, none run twice, errors of our kernels counted and placed."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from synthetic.configurations import ROOT

CLEAN = "3 passed in 1.0s\n========= ERROR SUMMARY: 0 errors\n"
RACE = (
    "========= Error: Race reported between Write access at product_kernel+0x22b0 in beside.py:212\n"
    "3 passed in 1.0s\n========= RACECHECK SUMMARY: 5 hazards displayed (1900 errors, 0 warnings)\n"
)


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """With a tool in its place that says what the real one says."""
    spec = importlib.util.spec_from_file_location("sanitize", ROOT / "scripts/sanitize.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tool = tmp_path / "compute-sanitizer"
    said = {"memcheck": CLEAN, "racecheck": RACE, "synccheck": "no device\n"}
    cases = "".join(f"  {name}) printf '%s' '{text}' ;;\n" for name, text in said.items())
    tool.write_text(f'#!/bin/sh\necho x >> {tmp_path}/calls\ncase "$2" in\n{cases}esac\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return module


def test_errors_are_counted_placed_and_not_looked_for_twice(
    script: ModuleType, tmp_path: Path, capsys
) -> None:
    out, calls = tmp_path / "lines.jsonl", tmp_path / "calls"
    job = ["--files", "lean", "--out", str(out)]
    assert script.main(["memcheck", *job]) == 0
    assert script.main(["memcheck", "racecheck", "synccheck", *job]) == 1
    lines = {line["tool"]: line for line in map(json.loads, out.read_text().splitlines())}
    assert lines["memcheck"]["errors"] == 0 and lines["memcheck"]["tests"] == 3
    assert lines["racecheck"]["errors"] == 1900
    assert lines["racecheck"]["places"] == {"product_kernel beside.py:212": 1}
    assert lines["synccheck"]["error"] == "no device"
    assert capsys.readouterr().out.splitlines()[-1] == "1 clean, 1 with errors, 1 not run: synccheck lean"
    assert len(calls.read_text().splitlines()) == 3


def test_without_the_tool_it_is_one_line(script: ModuleType, monkeypatch, capsys) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert script.main([]) == 2
    assert capsys.readouterr().err == "error: there is no compute-sanitizer here: install CUDA's toolkit\n"
