"""Files as a crash, a full disk or somebody else may leave them: what is written is there whole or not at all.

In: a path and what it shall hold, or a folder that is about to be read. Out: the file, put in place of whatever was
there and written through no link; or one line that names what no reader should open. Next: locking.py, records.py.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from pathlib import Path


def read_bytes(path: Path) -> bytes:
    """A file's content. Raises ValueError for what is no file: a FIFO would be waited for, a device never ends."""
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise ValueError(f"{path} is not a regular file: delete it or move it away")
    with open(descriptor, "rb") as stream:
        return stream.read()


def printable(text: str) -> str:
    """What a file holds as a message may say it: a line break or a terminal's escape is told by its name."""
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


def put(path: Path, content: bytes | str) -> None:
    """Put a whole file in place, and make its folder. Raises OSError, one line, and leaves the old one, if the disk
    does not take it.
    """
    # two processes may write the same folder
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(content.encode() if isinstance(content, str) else content)
        partial.replace(path)
    except OSError as exc:
        with suppress(OSError):
            partial.unlink()
        raise disk_error(path, exc) from exc


def disk_error(path: Path, exc: OSError) -> OSError:
    """The same error, as one line that says what to do."""
    reason = os.strerror(exc.errno) if exc.errno else str(exc)
    error = OSError(
        f"cannot write {path}: {reason}; make room or choose another folder (runs_dir, --out), then run again "
        "(finished records are untouched)"
    )
    error.errno = exc.errno
    return error


def refuse_irregular(folder: Path, *, links: bool = True) -> None:
    """Raise ValueError, one line, for anything below `folder` that is neither a file nor a folder: a FIFO is waited for
    without end. Without `links` also for a link: what is written into a folder goes nowhere else.
    """
    for path in sorted(folder.rglob("*")):
        special = path.exists() and not (path.is_file() or path.is_dir())
        if special or (path.is_symlink() and not links):
            what = "not a regular file" if special else "a link, through which nothing is written"
            raise ValueError(f"{path} is {what}: delete it or move it away")
