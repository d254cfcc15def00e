"""Work in a second process: half of measuring and half of drawing, which take most of the report's time.

In: something to call. Out: a function that waits for what it returns. Next: __init__.py and figures.py, which use it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any, TypeVar

T = TypeVar("T")
_work: list[Callable[[], Any]] = []


def beside(work: Callable[[], T]) -> Callable[[], T]:
    """Start `work` in a forked process, to which nothing has to be sent; what it returns or raises comes by pickle.

    Where a fork may hang, which is everywhere but on Linux, the work is done once its result is asked for.
    """
    if sys.platform != "linux":
        return work
    _work[:] = [work]
    pool = ProcessPoolExecutor(1, get_context("fork"))
    done = pool.submit(_inherited)
    pool.shutdown(wait=False)
    return done.result


def _inherited() -> Any:
    return _work[0]()
