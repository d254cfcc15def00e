"""The isolated launcher: a process of its own for each job, timed ones by themselves, whatever the others do."""

import itertools
import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import hydra
import psutil
import pytest
import yaml
from hydra.core.utils import JobStatus
from omegaconf import OmegaConf

from adafuse.config import Task
from hydra_plugins import isolated_launcher
from hydra_plugins.isolated_launcher import IsolatedLauncher
from synthetic.configurations import CONF, read_once
from synthetic.scripts import LAYER, call, finished

SCRIPT = """
import json, os, sys, time
start = time.time()
time.sleep({seconds})
line = {{"pid": os.getpid(), "start": start, "end": time.time(), "argv": sys.argv[1:],
         "gpu": os.environ.get("CUDA_VISIBLE_DEVICES")}}
with open(os.environ["SAID"], "a") as said:
    said.write(json.dumps(line) + "\\n")
sys.exit(3 if "seed=1" in sys.argv else 0)
"""
# what starts the launcher without Hydra, so that it can be interrupted
PARENT = """
import signal, sys
from omegaconf import OmegaConf
from adafuse.config import Task
from hydra_plugins.isolated_launcher import IsolatedLauncher
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
launcher = IsolatedLauncher(jobs_per_gpu=2)
launcher.setup(hydra_context=None, task_function=None, config=OmegaConf.create({"task": Task.train}))
sys.argv[0] = sys.argv[1]
launcher.launch([[f"seed={seed}"] for seed in range(2, 6)], 0)
"""


class Said:
    """What the children of a launch wrote down, in the order in which they started."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
        (folder / "script.py").write_text(SCRIPT.format(seconds=seconds))
        monkeypatch.setattr(sys, "argv", [str(folder / "script.py"), "ignored=1"])
        monkeypatch.setenv("SAID", str(folder / "said"))
        self.path = folder / "said"

    def lines(self) -> list[dict[str, Any]]:
        return sorted(map(json.loads, self.path.read_text().splitlines()), key=lambda line: line["start"])


def launcher(task: Task, **settings: float) -> IsolatedLauncher:
    made = IsolatedLauncher(**settings)
    config = OmegaConf.create({"task": task})
    made.setup(hydra_context=None, task_function=None, config=config)  # type: ignore[arg-type]
    return made


def follow_one_another(lines: list[dict[str, Any]]) -> bool:
    return all(before["end"] <= after["start"] for before, after in itertools.pairwise(lines))


def test_jobs_run_one_by_one_in_fresh_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said(tmp_path, monkeypatch, 0.05)
    jobs = [["experiment=table1", f"seed={seed}"] for seed in range(3)]
    results = launcher(Task.evaluate).launch(jobs, initial_job_idx=0)
    lines = said.lines()
    assert [line["argv"] for line in lines] == [[*job, "hydra.mode=RUN"] for job in jobs]
    assert len({line["pid"] for line in lines}) == 3
    assert follow_one_another(lines)
    # to Hydra all have ended: callbacks are still to be told
    assert [r.status for r in results] == [JobStatus.COMPLETED] * 3
    assert [r.return_value for r in results] == isolated_launcher.statuses[-3:] == [0, 3, 0]


def test_where_nothing_is_timed_jobs_share_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said(tmp_path, monkeypatch, 1.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3")
    launcher(Task.train, gpus=1, jobs_per_gpu=3).launch([[f"seed={seed}"] for seed in range(3)], 0)
    assert [line["gpu"] for line in said.lines()] == ["3"] * 3
    assert max(line["start"] for line in said.lines()) < min(line["end"] for line in said.lines())


def test_a_timed_job_has_the_device_to_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also in a sweep over tasks, which name themselves in their overrides: only train and evaluate go side by side."""
    said = Said(tmp_path, monkeypatch, 0.4)
    tasks = ["latency", "memory", "train", "evaluate", "trace", "layer", "kernel", "drift"]
    launcher(Task.train, jobs_per_gpu=2).launch([[f"task={task}"] for task in tasks], 0)
    by_task = {line["argv"][0].removeprefix("task="): line for line in said.lines()}
    assert list(by_task) == tasks or list(by_task) == [*tasks[:2], "evaluate", "train", *tasks[4:]]
    assert by_task["evaluate"]["start"] < by_task["train"]["end"]
    alone = [line for line in said.lines() if line["argv"][0] not in ("task=train", "task=evaluate")]
    assert follow_one_another(alone)
    for shared in (by_task["train"], by_task["evaluate"]):
        assert by_task["memory"]["end"] <= shared["start"] and shared["end"] <= by_task["trace"]["start"]


def test_with_several_gpus_no_two_jobs_share_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = Said(tmp_path, monkeypatch, 0.4)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    jobs = [[f"seed={seed}"] for seed in range(5)]
    results = launcher(Task.latency, gpus=2, jobs_per_gpu=3).launch(jobs, initial_job_idx=0)
    lines = said.lines()
    assert {line["gpu"] for line in lines} == {"4", "7"}
    assert all(follow_one_another([line for line in lines if line["gpu"] == gpu]) for gpu in ("4", "7"))
    assert lines[1]["start"] < lines[0]["end"], "two jobs at a time"
    # in the order of the jobs, whichever ended first
    assert [r.return_value for r in results] == [0, 3, 0, 0, 0]
    with pytest.raises(ValueError, match="hydra.launcher.gpus=3, but CUDA_VISIBLE_DEVICES=4,7"):
        launcher(Task.latency, gpus=3).launch(jobs, initial_job_idx=0)


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, -signal.SIGINT)])
def test_children_end_with_their_parent(sent: int, status: int, tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "child.py").write_text("import os, time; os.write(1, b'%d\\n' % os.getpid()); time.sleep(60)")
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "child.py")]
    parent = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        # tests that a shell started with & ignore interrupts, and what they start would too
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    children = [int(parent.stdout.readline()) for _ in range(2)]
    parent.send_signal(sent)
    assert parent.wait(20) == status
    assert parent.stdout.read() == "", "no other job was started"
    for child in children:
        with pytest.raises(ProcessLookupError):
            os.kill(child, 0)


def test_a_job_that_stands_still_is_ended_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd
) -> None:
    said = Said(tmp_path, monkeypatch, 0.05)
    stopped = "import os, signal, sys\nif 'seed=2' in sys.argv: os.kill(os.getpid(), signal.SIGSTOP)\n"
    script = tmp_path / "script.py"
    script.write_text(stopped + script.read_text())
    jobs = [["seed=2"], ["seed=3"]]
    results = launcher(Task.latency, idle_limit_s=1).launch(jobs, 0)
    assert [r.return_value for r in results] == [-signal.SIGKILL, 0]
    assert [line["argv"][0] for line in said.lines()] == ["seed=3"]
    assert re.search(r"stood still for 1 s.*idle_limit_s \(job: seed=2\)", capfd.readouterr().err)


def test_a_job_that_works_or_waits_for_its_own_children_is_not_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said = Said(tmp_path, monkeypatch, 0.05)
    works = "import time\nend = time.time() + 2\nwhile time.time() < end: pass\n"
    waits = f"import subprocess\nsubprocess.run([sys.executable, '-c', {works!r}])\n"
    script = tmp_path / "script.py"
    script.write_text(f"import sys\n{waits}{script.read_text()}")
    assert [r.return_value for r in launcher(Task.latency, idle_limit_s=1).launch([["seed=3"]], 0)] == [0]
    assert len(said.lines()) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="needs Linux")
def test_children_end_with_a_parent_that_was_killed(tmp_path: Path) -> None:
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "child.py").write_text(
        "import os, time\nfrom hydra_plugins.isolated_launcher import end_with_parent\nend_with_parent()\n"
        "os.write(1, b'%d\\n' % os.getpid())\ntime.sleep(60)"
    )
    command = [sys.executable, str(tmp_path / "parent.py"), str(tmp_path / "child.py")]
    parent = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    children = [psutil.Process(int(parent.stdout.readline())) for _ in range(2)]
    parent.kill()
    parent.wait()
    # as zombies until whoever adopted them has looked
    _, left = psutil.wait_procs(children, timeout=20)
    assert all(child.status() == psutil.STATUS_ZOMBIE for child in left)


def test_a_failing_job_does_not_stop_the_others_and_the_status_tells(tmp_path: Path, capfd) -> None:
    paths = [finished(tmp_path, *LAYER, f"replicate={number}") for number in range(2)]
    paths[0].write_text("spoilt")
    sweep = ("hydra/launcher=isolated", "replicate=0,1", "-m")
    done = call(capfd, f"runs_dir={tmp_path}", *LAYER, *sweep)
    assert done.returncode == 1
    assert done.stdout == f"done already: {paths[1]}\n"
    assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
    assert str(paths[0]) in done.stderr and "(job: " in done.stderr


def test_an_experiment_brings_its_own_sweep_and_launcher(tmp_path: Path, capfd) -> None:
    paths = [
        finished(tmp_path, "experiment=figure1", "device=cpu", f"replicate={number}") for number in range(3)
    ]
    done = call(capfd, f"runs_dir={tmp_path}", "experiment=figure1", "device=cpu")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "".join(f"done already: {path}\n" for path in paths)
    narrowed = call(capfd, f"runs_dir={tmp_path}", "experiment=figure1", "device=cpu", "replicate=2")
    assert narrowed.stdout == f"done already: {paths[2]}\n"


def test_a_cpu_has_one_thread_a_job_and_two_jobs_at_a_time_where_nothing_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def shown(*overrides: str) -> tuple[str, int | None, str | None]:
        with read_once(), hydra.initialize_config_dir(str(CONF), version_base="1.3"):
            node = hydra.compose("config", overrides=list(overrides), return_hydra_config=True).hydra
        kind = node.launcher._target_.split(".")[-1]
        return kind, node.launcher.get("jobs_per_gpu"), node.job.env_set.get("OMP_NUM_THREADS")

    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert shown("experiment=table2", "profile=cpu") == ("IsolatedLauncher", 2, "1")
    assert shown("experiment=table2", "profile=gpu") == ("BasicLauncher", None, None)
    assert shown("experiment=table1", "profile=gpu") == ("IsolatedLauncher", 1, None)
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert shown("experiment=table1", "profile=cpu") == ("IsolatedLauncher", 2, "3")


def test_slurm_runs_one_job_at_a_time(capfd) -> None:
    pytest.importorskip("hydra_plugins.hydra_submitit_launcher", reason="needs pip install '.[slurm]'")
    done = call(capfd, "hydra/launcher=slurm", "--cfg", "hydra", "--package", "hydra.launcher")
    assert done.returncode == 0, done.stderr
    launcher = yaml.safe_load(done.stdout)
    assert launcher["array_parallelism"] == 1 and launcher["_target_"].endswith("SlurmLauncher")
