"""Where this clone lies, and texts that do not say so: what is recorded or sent names no folder of a machine.

In: a text. Out: the same with shorter paths. Next: records.py, which writes down errors; tracking.py.
"""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# an absolute path in prose or in a traceback
PATH = re.compile(r"(?<![\w.:/~-])/[^\s\"'\\,;:()\[\]{}<>=]+")


def without_paths(text: str) -> str:
    """`text` with paths of this machine as they are from the clone or from ~, and others cut to their last name."""
    return PATH.sub(_from_here, text)


def _from_here(found: re.Match[str]) -> str:
    path = Path(found[0])
    if not Path(*path.parts[:2]).exists():
        return found[0]
    if path.is_relative_to(ROOT):
        return path.relative_to(ROOT).as_posix()
    return f"~/{path.relative_to(Path.home())}" if path.is_relative_to(Path.home()) else f".../{path.name}"
