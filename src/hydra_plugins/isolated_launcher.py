"""A Hydra launcher that gives each job a process of its own, and jobs that time something the machine to themselves.

In: the overrides of every job of a sweep. Out: one result per job, with the exit status of its process. Hydra's own
launchers run all jobs in one process, or several at once whatever they do, and both disturb timing. Here jobs that
measure follow one another (or run one to each of `gpus` GPUs); where nothing is timed, `jobs_per_gpu` of them share a
device, which small fits by themselves would leave mostly idle. A job that fails does not stop the others, and none
outlives its parent. Chosen by conf/hydra/launcher/isolated.yaml; Hydra finds launchers only in `hydra_plugins`.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
import time
from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from adafuse.config import Task

VISIBLE = "CUDA_VISIBLE_DEVICES"
# what these leave does not depend on what else the machine does meanwhile
UNTIMED = [task.name for task in (Task.pretrain, Task.train, Task.evaluate)]
POLL_S = 0.1
# the override by which a child runs one job, whatever sweep its experiment has
CHILD = "hydra.mode=RUN"

Environment = dict[str, str]
# of all jobs that ended, for the exit status of the sweep (scripts/run.py)
statuses: list[int] = []


class IsolatedLauncher(Launcher):
    """Runs the same script once per job, with the job's overrides."""

    def __init__(self, gpus: int = 1, jobs_per_gpu: int = 1) -> None:
        self.gpus, self.jobs_per_gpu = gpus, jobs_per_gpu
        self.task = ""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the task of jobs that name none; all else the child composes for itself."""
        self.task = config.task.name

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        devices = _devices(self.gpus)
        results: list[JobReturn] = []
        for untimed, jobs in itertools.groupby(map(list, job_overrides), self._is_untimed):
            names = devices * (self.jobs_per_gpu if untimed else 1)
            results += _run(list(jobs), [{VISIBLE: name} for name in names] if len(names) > 1 else [{}])
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


def _run(jobs: list[list[str]], environments: list[Environment]) -> list[JobReturn]:
    """The jobs in order, as many at a time as there are environments; an interrupt ends those that run."""
    free, running = list(environments), dict[int, tuple[subprocess.Popen[bytes], Environment]]()
    results = [JobReturn(overrides=overrides) for overrides in jobs]
    numbers = iter(range(len(jobs)))
    try:
        while True:
            while free and (number := next(numbers, None)) is not None:
                environment = free.pop(0)
                running[number] = (_start(jobs[number], environment), environment)
            if not running:
                return results
            time.sleep(POLL_S)
            for number, (child, environment) in list(running.items()):
                if child.poll() is not None:
                    _finish(results[number], child.returncode)
                    free.append(environment)
                    del running[number]
    finally:
        for child, _ in running.values():
            child.kill()
            child.wait()


def _start(overrides: list[str], environment: Environment) -> subprocess.Popen[bytes]:
    command = [sys.executable, sys.argv[0], *overrides, CHILD]
    return subprocess.Popen(command, env=os.environ | environment)


def _finish(result: JobReturn, status: int) -> None:
    """A process that a signal ended has a negative status. To Hydra every job is one that ended: for one that failed it
    would raise an exception before callbacks learn that the sweep is over.
    """
    result.status, result.return_value = JobStatus.COMPLETED, status
    statuses.append(status)
