"""AdaFuse, replicated: what a dynamic LoRA adapter costs at inference, and what it buys.

In your own code start with docs/api.md: load, attach, fit, measure. To read on, start with config.py; every file names
the next one. The command line is scripts/run.py.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from adafuse.api import Adapted, attach, fit, from_loras, load, measure

__version__ = "0.1.0"
__all__ = ["Adapted", "attach", "fit", "from_loras", "load", "measure"]


def __getattr__(name: str) -> Any:
    """What needs torch is imported by who asks for it: a configuration is composed in a second without."""
    if name in __all__:
        return getattr(importlib.import_module("adafuse.api"), name)
    raise AttributeError(f"module 'adafuse' has no attribute {name!r}")
