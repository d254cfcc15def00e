"""The isolated launcher: a process of its own for each job, one after the other, whatever the others do."""

import itertools
import json
import sys
from pathlib import Path

import pytest
import yaml
from hydra.core.utils import JobStatus

from hydra_plugins.isolated_launcher import IsolatedLauncher
from test_run import LAYER, finished, run

SCRIPT = """
import json, os, sys, time
start = time.time()
time.sleep(0.05)
line = {"pid": os.getpid(), "start": start, "end": time.time(), "argv": sys.argv[1:],
        "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}
with open(os.environ["SAID"], "a") as said:
    said.write(json.dumps(line) + "\\n")
sys.exit(3 if "seed=1" in sys.argv else 0)
"""


def test_jobs_run_one_by_one_in_fresh_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py"), "ignored=1"])
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    jobs = [["experiment=table1", f"seed={seed}"] for seed in range(3)]
    results = IsolatedLauncher().launch(jobs, initial_job_idx=0)
    said = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert [line["argv"] for line in said] == [[*job, "hydra.mode=RUN"] for job in jobs]
    assert len({line["pid"] for line in said}) == 3
    assert all(before["end"] <= after["start"] for before, after in itertools.pairwise(said))
    assert [r.status for r in results] == [JobStatus.COMPLETED, JobStatus.FAILED, JobStatus.COMPLETED]
    with pytest.raises(SystemExit) as raised:
        _ = results[1].return_value
    assert raised.value.code == 1


def test_where_nothing_is_timed_jobs_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.replace("time.sleep(0.05)", "time.sleep(1.0)"))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    IsolatedLauncher(gpus=1, jobs_per_gpu=3).launch([[f"seed={seed}"] for seed in range(3)], 0)
    said = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert [line["gpu"] for line in said] == ["3"] * 3
    assert max(line["start"] for line in said) < min(line["end"] for line in said)


def test_with_several_gpus_no_two_jobs_share_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "script.py").write_text(SCRIPT.replace("time.sleep(0.05)", "time.sleep(0.4)"))
    monkeypatch.setattr(sys, "argv", [str(tmp_path / "script.py")])
    monkeypatch.setenv("SAID", str(tmp_path / "said"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    jobs = [[f"seed={seed}"] for seed in range(5)]
    results = IsolatedLauncher(gpus=2).launch(jobs, initial_job_idx=0)
    said = [json.loads(line) for line in (tmp_path / "said").read_text().splitlines()]
    assert {line["gpu"] for line in said} == {"4", "7"}
    for gpu in ("4", "7"):
        own = sorted((line for line in said if line["gpu"] == gpu), key=lambda line: line["start"])
        assert all(before["end"] <= after["start"] for before, after in itertools.pairwise(own))
    first, second = sorted(said, key=lambda line: line["start"])[:2]
    assert second["start"] < first["end"], "two jobs at a time"
    # in the order of the jobs, whichever ended first
    assert [r.status for r in results] == [
        JobStatus.FAILED if seed == 1 else JobStatus.COMPLETED for seed in range(5)
    ]
    with pytest.raises(ValueError, match="hydra.launcher.gpus=3, but CUDA_VISIBLE_DEVICES=4,7"):
        IsolatedLauncher(gpus=3).launch(jobs, initial_job_idx=0)


def test_a_failing_job_does_not_stop_the_others_and_the_status_tells(tmp_path: Path) -> None:
    paths = [finished(tmp_path, *LAYER, f"replicate={number}") for number in range(3)]
    sweep = (f"runs_dir={tmp_path}", *LAYER, "hydra/launcher=isolated", "replicate=0,1,2", "-m")
    done = run(*sweep)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"done already: {path}\n" for path in paths)
    paths[1].write_text("spoilt")
    done = run(*sweep)
    assert done.returncode == 1
    assert done.stdout == "".join(f"done already: {paths[number]}\n" for number in (0, 2))
    assert (
        done.stderr.count("error: ") == 1 and str(paths[1]) in done.stderr and "Traceback" not in done.stderr
    )


def test_an_experiment_brings_its_own_sweep_and_launcher(tmp_path: Path) -> None:
    paths = [
        finished(tmp_path, "experiment=figure1", "device=cpu", f"replicate={number}") for number in range(3)
    ]
    done = run(f"runs_dir={tmp_path}", "experiment=figure1", "device=cpu")
    assert done.stdout == "".join(f"done already: {path}\n" for path in paths)
    narrowed = run(f"runs_dir={tmp_path}", "experiment=figure1", "device=cpu", "replicate=2")
    assert narrowed.stdout == f"done already: {paths[2]}\n"


def test_slurm_runs_one_job_at_a_time() -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs pip install '.[slurm]'")
    done = run("hydra/launcher=slurm", "--cfg", "hydra", "--package", "hydra.launcher")
    assert done.returncode == 0, done.stderr
    launcher = yaml.safe_load(done.stdout)
    assert launcher["array_parallelism"] == 1 and launcher["_target_"].endswith("SlurmLauncher")
