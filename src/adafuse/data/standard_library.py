"""Real text that every machine has: the sources of the running Python's own standard library.

In: a split. Out: its text, and passages with the line that follows. Each file, and each passage, is in one split only.
Next: families.py (the family `cloze`) and data.py (the pre-training text).
"""

from __future__ import annotations

import hashlib
import re
import sysconfig
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from adafuse.data.splits import SPLITS, split_of

BEFORE_BYTES, FOLLOWING_BYTES = 28, 8
# enough to show how lines are cut
SAMPLED_LINES = 300
# written at build time or by a distribution: they hold paths of the machine
NOT_LIBRARY = ("_sysconfigdata", "sitecustomize", "usercustomize")


@dataclass(frozen=True)
class Passage:
    """`before` stops within a word, and `following` goes on from there."""

    before: str
    following: str


@cache
def text(split: str) -> str:
    """All files of a split one after the other, ASCII only. Raises ValueError without sources."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(p for p in folder.glob("*.py") if not p.name.startswith(NOT_LIBRARY))
    if len(files) < 50:
        raise ValueError(
            f"no standard-library sources in {folder}: use a Python that was installed with them"
        )
    chosen = [p for p in files if split_of(f"file {p.name}") == split]
    return "".join(p.read_bytes().decode("ascii", "ignore") for p in chosen)


@cache
def passages(split: str) -> list[Passage]:
    """Passages of a split whose last line and whose `before` occur in no other split (licences and idioms repeat)."""
    others = [other for other in SPLITS if other != split]
    lines = {line for other in others for line in text(other).splitlines()}
    befores = {passage.before for other in others for _, passage in _passages(other)}
    return [p for line, p in _passages(split) if line not in lines and p.before not in befores]


@cache
def fingerprint() -> str:
    """A hash of all text by split, and of how lines are cut: another library, or another cut, has another one."""
    digest = hashlib.sha256()
    for split in SPLITS:
        digest.update(f"{split} {len(text(split))}\n{text(split)}".encode())
        for line, passage in _cut_lines(text(split).splitlines()[:SAMPLED_LINES]):
            digest.update(f"{line}\n{passage.before}\n{passage.following}\n".encode())
    return digest.hexdigest()


@cache
def _passages(split: str) -> list[tuple[str, Passage]]:
    return _cut_lines(text(split).splitlines())


def _cut_lines(lines: list[str]) -> list[tuple[str, Passage]]:
    cut = ((lines[i], _passage("\n".join(lines[i - 2 : i]), lines[i])) for i in range(2, len(lines)))
    return [(line, passage) for line, passage in cut if passage is not None]


def _passage(before: str, line: str) -> Passage | None:
    """Cut `line` in the middle of its longest word; None if there is no room."""
    words = re.finditer(r"[A-Za-z]{6,}", line)
    word = max(words, key=lambda match: len(match[0]), default=None)
    if word is None:
        return None
    cut = (word.start() + word.end()) // 2
    following = line[cut : cut + FOLLOWING_BYTES]
    # equal lengths, so that none is likelier by being shorter
    if len(following.rstrip()) < FOLLOWING_BYTES:
        return None
    return Passage(f"{before}\n{line[:cut]}"[-BEFORE_BYTES:], following)
