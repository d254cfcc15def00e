"""The README's block and the committed tables come from the records, and the check says when they do not."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import synthetic
import synthetic_gpu
import synthetic_study
from adafuse.report.readme import BEGIN, END, same_file

CPU = {"name": "cpu", "cpu": "Test CPU", "cores": 2, "memory_gib": 8.0, "gpu": None, "driver": None}
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("report_script", ROOT / "scripts" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def report(script, project, monkeypatch, capsys):
    """Run the script in the project folder: exit code, stdout, lines of stderr."""
    monkeypatch.chdir(project)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*arguments: str) -> tuple[int, str, list[str]]:
        code = script.main(["--records", "results/reference", "--out", "results", *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err.strip().splitlines()

    return run


@pytest.fixture
def project(tmp_path):
    """A project folder with reference records of one machine and a README with markers."""
    for replicate in range(2):
        synthetic.write_latency(tmp_path / "results" / "reference" / "cpu", replicate)
    (tmp_path / "README.md").write_text(f"# Title\n\n{BEGIN}\n{END}\n\nEnd.\n")
    return tmp_path


def test_draw_then_check(project, report):
    code, out, errors = report("--readme", "README.md")
    assert (code, errors) == (0, [])
    assert "replicated" in out and "claims.md" in out
    text = (project / "README.md").read_text()
    assert text.startswith("# Title") and text.endswith("End.\n")
    assert "### Verdicts" in text and "![latency_paper](results/figures/latency_paper.svg)" in text
    assert "](results/tables/table5.md)" in text
    assert report("--readme", "README.md", "--check")[0] == 0
    # drawing twice changes nothing
    report("--readme", "README.md")
    assert (project / "README.md").read_text() == text


def test_the_block_shows_the_first_cell_and_says_where_the_others_are(project, report):
    changed = {"name": "long", "plain": {"context": 999}}
    synthetic.write_latency(project / "results" / "reference" / "cpu", 0, **changed)
    report("--readme", "README.md")
    text = (project / "README.md").read_text()
    assert "context 999" in (project / "results" / "tables" / "table1.md").read_text()
    assert "context 999 · arms" not in text
    named = re.findall(r"`([^`]+)`", " ".join(re.findall(r"^Records: .*", text, re.MULTILINE)))
    assert text.count("\nRecords: 1 = `") == 3 and all((project / name).is_file() for name in named)
    for name in ("claims", "table1", "table5", "table6"):
        assert f"1 more cell: [{name}](results/tables/{name}.md)." in text


def test_a_cpus_word_on_accuracy_is_not_hidden_behind_a_gpus(project, report):
    """Another backbone's answer is an answer; another machine's time is none."""
    folder = project / "results" / "reference"
    methods = {"lora": 0.7, "adafuse": 0.6}
    synthetic_study.write_study(folder / "gpu", methods)
    own = {"machine": CPU, "changes": {"model.name": "other"}}
    synthetic_study.write_study(folder / "cpu", methods, **own)
    report("--readme", "README.md")
    verdicts = (project / "README.md").read_text().split("### Verdicts")[1].split("### Table 1")[0]
    assert "**NVIDIA H200 · tiny" in verdicts and "**CPU · other" in verdicts


def test_goals_stand_in_the_block_only_with_a_gpu(project, report):
    report("--readme", "README.md")
    without = (project / "README.md").read_text()
    assert "### Our own goals" not in without and "[goals](results/tables/goals.md)" in without
    synthetic_gpu.write_gpu_latency(project / "results" / "reference" / "gpu", "graph", processes=1)
    report("--readme", "README.md")
    text = (project / "README.md").read_text()
    assert text.index("### Table 6") < text.index("### Our own goals") < text.index("### Figures")
    assert "AdaFuse (gather), rank 16, batch 1" in text and "![latency_graph]" in text
    assert report("--readme", "README.md", "--check")[0] == 0


def test_check_names_what_differs(project, report):
    report("--readme", "README.md")
    for name, old, new in (
        ("README.md", "MoLA", "MoLa"),
        ("results/tables/table1.csv", "MoLA", "MoLa"),
        ("results/figures/latency_paper.svg", "#0072b2", "#0072b3"),
    ):
        path = project / name
        text = path.read_text()
        path.write_text(text.replace(old, new, 1))
        assert path.read_text() != text
        code, _, errors = report("--readme", "README.md", "--check")
        assert code == 1 and len(errors) == 1 and path.name in errors[0]
        path.write_text(text)


def test_check_sees_missing_files_but_not_png_bytes(project, report):
    report()
    picture = project / "results" / "figures" / "latency_paper.png"
    picture.write_bytes(b"another build of matplotlib")
    assert report("--check")[0] == 0
    picture.unlink()
    assert report("--check")[0] == 1


def test_a_last_digit_of_a_coordinate_is_not_a_difference(tmp_path):
    for name, text in (("a", "M 1.0001 2"), ("b", "M 1.0002 2"), ("c", "M 1.5 2")):
        (tmp_path / f"{name}.svg").write_text(text)
    assert same_file(tmp_path / "a.svg", tmp_path / "b.svg")
    assert not same_file(tmp_path / "a.svg", tmp_path / "c.svg")


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda p: (p / "README.md").write_text("no markers"), "results:begin"),
        (lambda p: (p / "README.md").unlink(), "README.md"),
        (lambda p: next((p / "results" / "reference").rglob("*r0.jsonl")).write_text("{}"), "truncated"),
        (lambda p: [f.unlink() for f in (p / "results" / "reference").rglob("*.jsonl")], "make reproduce"),
    ],
    ids=["no markers", "no README", "truncated record", "no records"],
)
def test_bad_input_is_one_line(project, report, break_it, words):
    break_it(project)
    code, _, errors = report("--readme", "README.md")
    assert code == 1 and len(errors) == 1 and words in errors[0]


def test_records_of_uncommitted_sources_are_not_published(project, report):
    synthetic.write_latency(project / "results" / "reference" / "cpu", 2, dirty=True)
    code, _, errors = report("--readme", "README.md")
    assert code == 1 and "uncommitted" in errors[0]
    assert report()[0] == 0


def test_the_script_runs_by_itself(tmp_path):
    command = [
        sys.executable,
        str(ROOT / "scripts" / "report.py"),
        "--records",
        str(tmp_path),
        "--out",
        str(tmp_path),
    ]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "no records found" in done.stderr and "Traceback" not in done.stderr
