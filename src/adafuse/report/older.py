"""What records that are older than a setting were made with, so that they are pooled with newer ones.

In: a record's configuration and the name of an entry. Out: the entry as it would stand there today. Next: cells.py.
"""

from __future__ import annotations

from typing import Any

BEFORE: dict[str, Any] = {
    "evaluate_strategy": "dense",
    "evaluate_dtype": "float32",
    "evaluate_restore": True,
    "budget": "published",
}
BEFORE_IN: dict[str, dict[str, Any]] = {"data": {"level": 1}}


def entry(config: dict[str, Any], name: str) -> Any:
    """One entry of a configuration, with what it lacks."""
    value = config.get(name, BEFORE.get(name))
    return BEFORE_IN.get(name, {}) | value if isinstance(value, dict) else value
