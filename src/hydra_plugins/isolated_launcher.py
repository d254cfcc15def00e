"""A Hydra launcher that gives each job a process of its own, one after the other.

In: the overrides of every job of a sweep. Out: one result per job, with the exit status of its process. Hydra's own
launchers either run all jobs in one process or several jobs at once, and both disturb timing. A job that fails does not
stop the others. Chosen by conf/hydra/launcher/isolated.yaml; Hydra finds launchers only in `hydra_plugins`.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence

from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig


class IsolatedLauncher(Launcher):
    """Runs the same script once per job, with the job's overrides."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Nothing is kept: the child composes its own configuration."""

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> list[JobReturn]:
        return [_run(list(overrides)) for overrides in job_overrides]


def _run(overrides: list[str]) -> JobReturn:
    command = [sys.executable, sys.argv[0], *overrides, "hydra.mode=RUN"]
    status = subprocess.run(command, check=False).returncode
    result = JobReturn(overrides=overrides, status=JobStatus.FAILED if status else JobStatus.COMPLETED)
    # Hydra raises this one after the last job; a process that a signal ended has a negative status
    result.return_value = SystemExit(1) if status else 0
    return result
