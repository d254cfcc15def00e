"""A disk that is full at any write, that may not be written or read, and a clock that is set back."""

import errno
import os
import random
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from synthetic import whole
from synthetic.hostile import SOAK

pytestmark = pytest.mark.slow
DRAW = random.Random(None if SOAK else 0)
# bytes: beside everything, a header, a line, a checkpoint's parts, a figure
LIMITS = (0, 200, 1000, 4000, 16_000, 60_000, 250_000)


def said(kind: str, met: int, tried: int) -> None:
    print(f"crash: {met} of {tried} times {kind} met a study at work: none lost anything")


def test_a_disk_that_is_full_at_any_change(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    numbers = DRAW.sample(range(1, 150), 60 if SOAK else 2)
    codes = [DRAW.choice((errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO)) for _ in numbers]
    faults = [whole.Changes(*both) for both in zip(numbers, codes, strict=True)]
    said("a refused change", whole.survives(tmp_path, faults, whole.refused, undisturbed), len(faults))


def test_files_that_cannot_grow(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """As behind a quota: what Python, Rust and C++ write is refused alike, in the middle of a file."""
    sizes = [*LIMITS, *(DRAW.randrange(100_000) for _ in range(20))] if SOAK else [4000]
    faults = [whole.Limit(size) for size in sizes]
    said("a file that cannot grow", whole.survives(tmp_path, faults, whole.refused, undisturbed), len(faults))


@pytest.mark.skipif(not SOAK, reason="takes a minute: make soak")
def test_a_small_disk(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    """A real one: what is left of it goes while the study runs."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "none", str(tmp_path)]
    if subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("mounting a small disk needs root")
    try:
        sizes = sorted(DRAW.randrange(100, 1200) for _ in range(20))
        for size in sizes:
            subprocess.run(["mount", "-o", f"remount,size={size}k", str(tmp_path)], check=True)
            there = whole.finished(tmp_path / "study") if (tmp_path / "study").exists() else {}
            (tmp_path / "study").mkdir(exist_ok=True)
            whole.refused(tmp_path / "study", None)
            assert there.items() <= whole.finished(tmp_path / "study").items()
        subprocess.run(["mount", "-o", "remount,size=64m", str(tmp_path)], check=True)
        assert whole.whole(tmp_path / "study")[0] == 0
        assert whole.told(tmp_path / "study") == undisturbed
        said("a small disk", len(sizes), len(sizes))
    finally:
        subprocess.run(["umount", str(tmp_path)], check=True)


def test_what_may_not_be_written_or_read(undisturbed: dict[str, Any], study: Path, tmp_path: Path) -> None:
    """Folders and files of a finished study; what is finished is not lost."""
    places = sorted(path for path in (study / "runs").rglob("*"))
    chosen = DRAW.sample(places, 15) if SOAK else [study / "runs/records", study / "runs"]
    for number, place in enumerate(chosen):
        own = tmp_path / "study"
        shutil.copytree(study, own)
        path = own / place.relative_to(study)
        if number % 2:
            # what stands on the others is done again
            shutil.rmtree(own / "runs/records/latency")
        for mode in (0o000, 0o555 if path.is_dir() else 0o444):
            if path.exists():
                path.chmod(mode)
                whole.refused(own, whole.without_rights)
                path.chmod(0o755 if path.is_dir() else 0o644)
        status, shown = whole.whole(own)
        if number % 2 == 0:
            assert status == 0, (place, shown)
            assert whole.told(own) == undisturbed, place
        shutil.rmtree(own)
    said("a folder or a file without permission", len(chosen), len(chosen))


def test_a_clock_that_is_set_back(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    for number in range(5 if SOAK else 1):
        folder = tmp_path / str(number)
        whole.whole(folder, whole.Changes(DRAW.randrange(20, 100)))
        # what was written by a clock that went an hour before
        for path in folder.rglob("*"):
            os.utime(path, (path.stat().st_mtime + 3600,) * 2)
        status, shown = whole.whole(folder, whole.Clock(number))
        assert status == 0, shown
        assert whole.told(folder) == undisturbed
