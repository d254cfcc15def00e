"""Processes that help another one go when it goes: in a worker, called first. Next: report/, isolated_launcher.py."""

from __future__ import annotations

import ctypes
import os
import signal
import sys

# of <sys/prctl.h>: the signal that a process gets when its parent dies
PR_SET_PDEATHSIG = 1


def end_with(parent: int, sent: signal.Signals) -> None:
    """Let this process get a signal when its parent dies, however that was ended. On Linux alone."""
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, sent)
    if os.getppid() != parent:
        # it was gone before it could be asked for
        raise SystemExit(128 + sent)
