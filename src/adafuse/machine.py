"""The header of a record: which code, which libraries and which machine made the numbers below it.

In: the checked configuration, the task and the command line. Out: the fields of the `run` line. Next:
records.py.
"""

from __future__ import annotations

import datetime
import os
import platform
import re
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from adafuse.cell_names import cell_id
from adafuse.config import Config, Task
from adafuse.identity import as_plain, content_hash, identity
from adafuse.provenance import git_state

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "peft",
    "lm-eval",
    "hydra-core",
    "numpy",
    "scipy",
    "accelerate",
)


def run_fields(config: Config, task: Task, command: str, experiment: str | None = None) -> dict[str, Any]:
    """All fields of the `run` line except the schema: cell, configuration, code, versions, machine."""
    commit, dirty = git_state()
    return {
        "task": task.name,
        "cell_id": cell_id(config, task),
        "config_hash": content_hash(identity(config, task)),
        "experiment": experiment,
        "profile": config.profile,
        "commit": commit,
        "dirty": dirty,
        "seed": config.seed,
        "replicate": config.replicate,
        "versions": versions(),
        "machine": machine(config.device),
        "command": command,
        "started_utc": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "config": as_plain(config),
    }


def versions() -> dict[str, str]:
    """Python and the libraries that can change a number; a missing one is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def machine(device: str = "auto") -> dict[str, Any]:
    """Processor, memory and, if `device` lets us use one, the accelerator; `name` is the folder under
    results/reference.
    """
    gpu = None if device == "cpu" else _gpu()
    return {
        "name": folder_name(gpu["gpu"]) if gpu else "cpu",
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "os": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
        **(gpu or {"gpu": None, "driver": None, "power_limit_w": None}),
    }


def folder_name(gpu: str) -> str:
    """A short name for a GPU: "NVIDIA H200" becomes h200."""
    words = re.findall(r"[a-z0-9]+", gpu.lower())
    return "-".join(word for word in words if word not in ("nvidia", "geforce", "tesla")) or "gpu"


@cache
def nvml_handle(uuid: str) -> tuple[Any, Any] | None:
    """The driver's library (pynvml), initialised, and its handle of the GPU with this UUID as torch prints it.

    By UUID, because CUDA's numbers are not the driver's where CUDA_VISIBLE_DEVICES hides or reorders GPUs. None without
    the library or the GPU.
    """
    try:
        import pynvml
    except ImportError:
        return None
    try:
        pynvml.nvmlInit()
        return pynvml, pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{uuid}")
    except pynvml.NVMLError:
        return None


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    driver, limit_w = _driver(str(properties.uuid))
    return {"gpu": properties.name, "driver": driver, "power_limit_w": limit_w}


def _driver(uuid: str) -> tuple[str | None, float | None]:
    """Driver version and power limit in watts; None where the driver does not tell (as inside some containers)."""
    found = nvml_handle(uuid)
    if found is None:
        return None, None
    nvml, gpu = found
    try:
        return nvml.nvmlSystemGetDriverVersion(), nvml.nvmlDeviceGetPowerManagementLimit(gpu) / 1000
    except nvml.NVMLError:
        return None, None


def _cpu_model() -> str:
    """The processor's own name; ARM kernels give none, so the architecture stands in."""
    try:
        found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        found = None
    return found.group(1).strip() if found else platform.machine()
