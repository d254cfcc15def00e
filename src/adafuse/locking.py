"""One writer per cell: an exclusive lock on the unfinished file, held by the operating system.

In: the path of a `.partial` file. Out: a descriptor that this process alone may write, or one line that says
who is in the way. The lock goes with its process, so a killed run blocks nobody. Next: machine.py.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

from adafuse.files import disk_error


class Busy(ValueError):
    """Another process writes this cell."""


def lock(partial: Path) -> int:
    """Open `partial` for this process alone and empty it; what a killed process left there is replaced.

    Raises Busy if another process holds it, ValueError if something else than a file is there (what a link leads to is
    nobody's record), OSError if the file cannot be made.
    """
    if partial.is_symlink() or (partial.exists() and not partial.is_file()):
        raise ValueError(
            f"{partial} is a link or no regular file, and no record is written through it: delete it"
        )
    try:
        partial.parent.mkdir(parents=True, exist_ok=True)
        while True:
            descriptor = os.open(partial, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(descriptor)
                cell = partial.with_suffix("")
                raise Busy(
                    f"cell {cell} is being written by another process; wait for it or stop it"
                ) from None
            # The other process may just have renamed the file that we opened: then it is a finished record.
            if _is_at(descriptor, partial):
                os.ftruncate(descriptor, 0)
                return descriptor
            os.close(descriptor)
    except OSError as exc:
        raise disk_error(partial, exc) from exc


def wait_for_writer(partial: Path) -> None:
    """Return when no process holds `partial`."""
    try:
        descriptor = os.open(partial, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return
    fcntl.flock(descriptor, fcntl.LOCK_EX)
    unlock(descriptor)


def unlock(descriptor: int) -> None:
    """Let go of the file. By hand, because a forked data loader may still hold a copy of the descriptor."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
