"""A Hydra launcher that gives each job a process of its own, and jobs that time something the machine to themselves.

In: the overrides of every job of a sweep. Out: one result per job, with the exit status of its process. Hydra's own
launchers run all jobs in one process, or several at once whatever they do, and both disturb timing. Here jobs that
measure follow one another (or run one to each of `gpus` GPUs); where nothing is timed, `jobs_per_gpu` of them share a
device, which small fits by themselves would leave mostly idle. A job that fails does not stop the others, one that
stands still is ended (`idle_limit_s`), and none outlives its parent. Chosen by conf/hydra/launcher/isolated.yaml;
Hydra finds launchers only in `hydra_plugins`.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence

import psutil
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from adafuse.config import Task
from adafuse.distributed import PROCESSES
from adafuse.processes import end_with

VISIBLE = "CUDA_VISIBLE_DEVICES"
# what these leave does not depend on what else the machine does meanwhile
UNTIMED = [task.name for task in (Task.pretrain, Task.train, Task.evaluate)]
POLL_S = 0.1
# the override by which a child runs one job, whatever sweep its experiment has
CHILD = "hydra.mode=RUN"
LAUNCHER = "ADAFUSE_LAUNCHER_PID"

Environment = dict[str, str]
# of all jobs that ended, for the exit status of the sweep (scripts/run.py)
statuses: list[int] = []


class IsolatedLauncher(Launcher):
    """Runs the same script once per job, with the job's overrides."""

    def __init__(self, gpus: int = 1, jobs_per_gpu: int = 1, idle_limit_s: float = 900.0) -> None:
        self.gpus, self.jobs_per_gpu, self.idle_limit_s = gpus, jobs_per_gpu, idle_limit_s
        self.task = ""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the task of jobs that name none; all else the child composes for itself."""
        self.task = config.task.name

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        if PROCESSES > 1:
            raise ValueError(
                f"{PROCESSES} processes share one cell, and a sweep has several: start it without torchrun, or add "
                "hydra/launcher=basic"
            )
        devices = _devices(self.gpus)
        results: list[JobReturn] = []
        for untimed, jobs in itertools.groupby(map(list, job_overrides), self._is_untimed):
            names = devices * (self.jobs_per_gpu if untimed else 1)
            environments = [{VISIBLE: name} for name in names] if len(names) > 1 else [{}]
            results += _run(list(jobs), environments, self.idle_limit_s)
        return results

    def _is_untimed(self, overrides: list[str]) -> bool:
        named = [override.removeprefix("task=") for override in overrides if override.startswith("task=")]
        return [self.task, *named][-1] in UNTIMED


def _devices(count: int) -> list[str]:
    """The first `count` GPUs that this process may use. Raises ValueError if it may not use so many."""
    named = os.environ.get(VISIBLE)
    allowed = named.split(",") if named is not None else [str(number) for number in range(count)]
    if count > len(allowed):
        raise ValueError(f"hydra.launcher.gpus={count}, but {VISIBLE}={named}: name as many there")
    return allowed[:count]


class Child:
    """A job that runs: how much processor time it had used, and when it was last seen to use any.

    No dataclass: Hydra's scan for plugins runs this file under a name that is in no table of modules.
    """

    def __init__(self, process: subprocess.Popen[bytes], environment: Environment) -> None:
        self.process, self.environment = process, environment
        self.used_s, self.seen_s = 0.0, time.monotonic()

    def idle_s(self) -> float:
        """How long it and what it started have used no processor: a job that works, or waits for a GPU, uses some."""
        used, now = _used_s(self.process.pid), time.monotonic()
        if used != self.used_s:
            self.used_s, self.seen_s = used, now
        return now - self.seen_s


def end_with_parent() -> None:
    """Called by a job: it ends when its launcher does, however that was ended."""
    launcher = os.environ.get(LAUNCHER)
    if launcher is None:
        return
    end_with(int(launcher), signal.SIGTERM)


def _run(jobs: list[list[str]], environments: list[Environment], idle_limit_s: float) -> list[JobReturn]:
    """The jobs in order, as many at a time as there are environments; an interrupt ends those that run."""
    free, running = list(environments), dict[int, Child]()
    results = [JobReturn(overrides=overrides) for overrides in jobs]
    numbers = iter(range(len(jobs)))
    try:
        while True:
            while free and (number := next(numbers, None)) is not None:
                running[number] = _start(jobs[number], free.pop(0))
            if not running:
                return results
            time.sleep(POLL_S)
            for number, child in list(running.items()):
                if child.process.poll() is None and child.idle_s() > idle_limit_s:
                    _give_up(child, jobs[number], idle_limit_s)
                if child.process.poll() is not None:
                    _finish(results[number], child.process.returncode)
                    free.append(child.environment)
                    del running[number]
    finally:
        for child in running.values():
            child.process.kill()
            child.process.wait()


def _start(overrides: list[str], environment: Environment) -> Child:
    command = [sys.executable, sys.argv[0], *overrides, CHILD]
    own = os.environ | environment | {LAUNCHER: str(os.getpid())}
    return Child(subprocess.Popen(command, env=own), environment)


def _give_up(child: Child, overrides: list[str], idle_limit_s: float) -> None:
    print(
        f"error: stood still for {idle_limit_s:g} s, without any processor time, and was ended: start it again, or "
        f"give it longer by hydra.launcher.idle_limit_s (job: {' '.join(overrides)})",
        file=sys.stderr,
    )
    child.process.kill()
    child.process.wait()


def _used_s(pid: int) -> float:
    """Processor seconds of a process and all below it; 0 for one that has just ended."""
    try:
        process = psutil.Process(pid)
        times = [own.cpu_times() for own in (process, *process.children(recursive=True))]
    except psutil.Error:
        return 0.0
    return sum(own.user + own.system for own in times)


def _finish(result: JobReturn, status: int) -> None:
    """A process that a signal ended has a negative status. To Hydra every job is one that ended: for one that failed it
    would raise an exception before callbacks learn that the sweep is over.
    """
    result.status, result.return_value = JobStatus.COMPLETED, status
    statuses.append(status)
