"""Where numbers were made: which code, which libraries and which machine.

In: the clone, or the stamp that `make stamp` left among the files, for copies of them without their clone or with an
old one: a commit and a checksum of its sources, which are summed up again and compared; where there is none, or it is
of other sources, the clone. The driver, the processor. Out: commit and dirty flag, versions and machine for the `run`
line. Next: records.py.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import subprocess
import sys
from contextlib import suppress
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from adafuse.paths import ROOT

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
# What can change a number; results and prose may differ from the commit.
SOURCES = ("src", "conf", "scripts", "pyproject.toml", "constraints.txt")
STAMP = ".commit.json"
# what tools and the user leave between the sources, ignored by git
IGNORED = ("__pycache__", "local")


def git_state() -> tuple[str | None, bool | None]:
    """Commit and whether the sources differ from it; (None, None) where neither a stamp nor a clone tells."""
    stamped = _stamped()
    commit = _git("rev-parse", "HEAD")
    if commit is None or stamped[1] is False:
        return stamped
    changed = _git("status", "--porcelain", "--", *[name for name in SOURCES if (ROOT / name).exists()])
    return commit, changed != ""


def sources_digest() -> str:
    """SHA-256 over the paths and contents of all sources."""
    digest = hashlib.sha256()
    for path in sorted(file for name in SOURCES for file in _files(ROOT / name)):
        name, content = path.relative_to(ROOT).as_posix(), path.read_bytes()
        digest.update(f"{name} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def stamp() -> Path:
    """Write the stamp of a clean clone. Raises ValueError if it is not clean, or no clone."""
    commit = _git("rev-parse", "HEAD")
    path = ROOT / STAMP
    path.unlink(missing_ok=True)
    if commit is None or git_state()[1]:
        raise ValueError("a stamp names a commit, and the sources differ from it: commit them first")
    path.write_text(json.dumps({"commit": commit, "sources_sha256": sources_digest()}) + "\n")
    return path


def versions() -> dict[str, str]:
    """Python and the libraries that can change a number; a missing one is left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            found[package] = metadata.version(package)
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


def gpu_id(name: str, uuid: str) -> str | None:
    """Which card this is without saying whose: 12 hex digits of the SHA-256 of its UUID as the driver writes it.

    None for a slice of a card (MIG): it may have a UUID of its own, which does not tell the card.
    """
    return None if "MIG" in name.split() else hashlib.sha256(f"GPU-{uuid}".encode()).hexdigest()[:12]


def _gpu() -> dict[str, Any] | None:
    import torch

    if not torch.cuda.is_available():
        return None
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    name, uuid = properties.name, str(properties.uuid)
    driver, limit_w = _driver(uuid)
    return {"gpu": name, "gpu_id": gpu_id(name, uuid), "driver": driver, "power_limit_w": limit_w}


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


def _stamped() -> tuple[str | None, bool | None]:
    try:
        stamped = json.loads((ROOT / STAMP).read_text())
        return stamped["commit"], stamped["sources_sha256"] != sources_digest()
    except (OSError, ValueError, KeyError):
        return None, None


def _files(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path] if path.is_file() else []
    found = (file for file in path.rglob("*") if file.is_file())
    return [
        file
        for file in found
        if not any(part in IGNORED or part.endswith(".egg-info") for part in file.relative_to(ROOT).parts)
    ]


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


if __name__ == "__main__":
    try:
        print(f"stamped: {stamp()}")
    except ValueError as error:
        sys.exit(f"error: {error}")
