"""The paper's numbers: results/paper_tables.yaml, read once, with the notes that go under each table.

In: the YAML file. Out: a dictionary as in the file, and text. Next: tables.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

PAPER_FILE = Path(__file__).resolve().parents[3] / "results" / "paper_tables.yaml"


def load_paper(path: Path = PAPER_FILE) -> dict[str, Any]:
    """Everything the paper prints. Raises ValueError with one line if the file is not there."""
    try:
        return dict(yaml.safe_load(path.read_text()))
    except OSError:
        raise ValueError(f"no file {path}: restore it with git checkout results/paper_tables.yaml") from None


def by_arm(table: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """The rows of a latency table by arm."""
    return {row["arm"]: row for row in table["rows"]}


def notes(table: dict[str, Any], paper: dict[str, Any]) -> list[str]:
    """What a reader must know about the printed numbers, from the file's own remarks."""
    found = []
    if "ms_per_token" in table["columns"]:
        found.append(f"The paper's milliseconds are not comparable: {paper['absolute_ms']['why']}.")
    labels = {row.get("arm", row.get("method")): row["label"] for row in table["rows"]}
    for entry in table.get("exceptions", []):
        label = labels[entry.get("arm", entry.get("method"))]
        found.append(f"Paper, {label}: {entry['why']}.")
    return found
