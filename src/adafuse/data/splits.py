"""Which split a piece of content belongs to: decided by the content itself, so it can never be in two.

In: a key that stands for the content. Out: train, validation or test. Next: standard_library.py, families.py.
"""

from __future__ import annotations

import hashlib

SPLITS = ("train", "validation", "test")


def split_of(key: str) -> str:
    """The one split that content with this key belongs to: 70 % train, 15 % validation, 15 % test."""
    bucket = int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) % 20
    return "train" if bucket < 14 else "validation" if bucket < 17 else "test"
