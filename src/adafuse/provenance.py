"""Which code made a record: the commit, and whether the sources differ from it.

In: the stamp that `make stamp` left among the files, for copies of them without their clone or with an old one: a
commit and a checksum of its sources, which are summed up again and compared; where there is none, or it is of other
sources, the clone. Out: commit and dirty flag for the `run` line. Next: machine.py.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path

# What can change a number; results and prose may differ from the commit.
SOURCES = ("src", "conf", "scripts", "pyproject.toml", "constraints.txt")
ROOT = Path(__file__).resolve().parents[2]
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
