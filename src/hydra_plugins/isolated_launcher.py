"""A Hydra launcher that gives each job a process of its own, one after the other, or one to each of several GPUs.

In: the overrides of every job of a sweep. Out: one result per job, with the exit status of its process. Hydra's own
launchers either run all jobs in one process or several jobs at once on one device, and both disturb timing; where
nothing is timed, `jobs_per_gpu` lets small fits share a device, which launches alone would leave mostly idle. A job
that fails does not stop the others. Chosen by conf/hydra/launcher/isolated.yaml; Hydra finds launchers only in
`hydra_plugins`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import SimpleQueue

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

VISIBLE = "CUDA_VISIBLE_DEVICES"


class IsolatedLauncher(Launcher):
    """Runs the same script once per job, with the job's overrides: `gpus` times `jobs_per_gpu` jobs at a time."""

    def __init__(self, gpus: int = 1, jobs_per_gpu: int = 1) -> None:
        self.gpus, self.jobs_per_gpu = gpus, jobs_per_gpu

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Nothing is kept: the child composes its own configuration."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        jobs = [list(overrides) for overrides in job_overrides]
        if self.gpus * self.jobs_per_gpu < 2:
            return [_run(overrides) for overrides in jobs]
        free: SimpleQueue[str] = SimpleQueue()
        for name in _devices(self.gpus) * self.jobs_per_gpu:
            free.put(name)

        def on_free_device(overrides: list[str]) -> JobReturn:
            name = free.get()
            try:
                return _run(overrides, {VISIBLE: name})
            finally:
                free.put(name)

        with ThreadPoolExecutor(self.gpus * self.jobs_per_gpu) as pool:
            return list(pool.map(on_free_device, jobs))


def _devices(count: int) -> list[str]:
    """The first `count` GPUs that this process may use. Raises ValueError if it may not use so many."""
    named = os.environ.get(VISIBLE)
    allowed = named.split(",") if named is not None else [str(number) for number in range(count)]
    if count > len(allowed):
        raise ValueError(f"hydra.launcher.gpus={count}, but {VISIBLE}={named}: name as many there")
    return allowed[:count]


def _run(overrides: list[str], environment: dict[str, str] | None = None) -> JobReturn:
    command = [sys.executable, sys.argv[0], *overrides, "hydra.mode=RUN"]
    status = subprocess.run(command, check=False, env=os.environ | (environment or {})).returncode
    result = JobReturn(overrides=overrides, status=JobStatus.FAILED if status else JobStatus.COMPLETED)
    # Hydra raises this one after the last job; a process that a signal ended has a negative status
    result.return_value = SystemExit(1) if status else 0
    return result
