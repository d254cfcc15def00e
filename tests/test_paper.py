"""Profile paper from prepared folders to the paper's tables, on tiny stand-ins in the published formats."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from synthetic.configurations import ROOT, compose
from synthetic.mirror import mirror

TINY = (
    *("profile=paper", "runs_dir=runs", "seed=0", "model.dtype=float32", "experts.rank=2", "experts.count=4"),
    *("train.steps=2", "train.batch=2", "train.accumulation=1", "train.warmup_steps=0", "train.bf16=false"),
)
SHOTS = "suite.shots_by_task={arc_challenge:3,hellaswag:2,mmlu:1,winogrande:2}"
SHORT = ("replicate=0", "context=16", "latency.rounds=2", "latency.block_tokens=64", "latency.check_tokens=4")


def script(name: str, *arguments: str, folder: Path) -> str:
    command = [sys.executable, str(ROOT / "scripts" / name), *arguments]
    source = {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, env=os.environ | source, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_from_a_folder_of_repositories_to_the_papers_tables(tmp_path: Path) -> None:
    tasks = Path(str(find_spec("lm_eval").origin)).parent / "tasks/mmlu/default"
    subjects = [
        re.search(r'"dataset_name": "(\w+)"', file.read_text())[1] for file in tasks.glob("mmlu_*.yaml")
    ]
    origin = mirror(tmp_path / "mirror", subjects)
    script("prepare.py", "paper", "--from", str(origin), "--out", str(tmp_path), folder=tmp_path)
    for experiment, more in {
        "table2": ("method=base,adafuse", SHOTS),
        "table3": ("method=base,adafuse",),
        "table4": ("method=adafuse", "data.path=data/openbookqa"),
        "table1": ("arms.run=[base,mola_loop,adafuse_switch]", *SHORT),
    }.items():
        script("run.py", f"experiment={experiment}", *TINY, *more, folder=tmp_path)
    script("report.py", "--records", "runs/records", "--out", "runs/report", folder=tmp_path)
    table = {n: (tmp_path / f"runs/report/tables/table{n}.md").read_text() for n in (1, 2, 3, 4)}
    asked = "| arc_challenge | hellaswag | mmlu | truthfulqa_mc2 | winogrande | average |"
    ours = table[2].split("The paper's numbers")[0]
    assert asked in ours and "data pesc" in ours and "| adafuse | 8.06 k |" in ours
    ours = table[3].split("The paper's numbers")[0]
    assert all(f"| {domain} |" in ours for domain in ("scienceqa", "commonsense_qa", "openbookqa"))
    assert "mistral_7b" in table[4].split("The paper's numbers")[0] and "| MoLA |" in table[1]
    done = "\n".join(
        path.read_text() for path in (tmp_path / "runs/records/evaluate").glob("*-paper-*.jsonl")
    )
    assert '"suite_task": "mmlu", "metric": "acc"' in done and '"n": 114' in done, "two items of 57 subjects"
    assert done.index('"metric": "acc_norm"') < done.index('"metric": "acc"')


def test_each_part_is_taken_from_where_prepare_leaves_it() -> None:
    config = compose("profile=paper")
    assert (config.model.path, config.data.path) == ("models/llama2_7b", "data/pesc")
    assert config.suite.path == "data/evaluation"
    assert compose("profile=paper", "model=mistral_7b").model.path == "models/mistral_7b"
