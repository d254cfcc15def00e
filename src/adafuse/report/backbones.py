"""The backbones that were pre-trained here: how large they are, on what, how good, and by which checksum to know them.

In: pretrain records. Out: the sheet `backbones`. Next: losses.py, which draws how they learnt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from functools import partial
from typing import Any

from adafuse.records import Record
from adafuse.report.cells import cells, first_error, model_name, short_name
from adafuse.report.sheet import Columns, Row, Section, Sheet, nothing
from adafuse.report.text import GAP, count_text, digits

ABOUT = (
    "The backbones under the trained adapters. Tokens: steps times batch times length; library text comes round again "
    "when it is through. Held-out loss: nats a token on content of which training saw nothing; library text is that of "
    "the machine's own Python. Seconds: of the process that ended the training; where it was resumed, of the steps "
    "after that alone. sha256: of the saved weights; an evaluation names those on which it stands. The loss by step: "
    "figures loss*."
)
DIGITS_OF_HASH = 12


def backbone_table(records: Iterable[Record]) -> Sheet:
    """A row for each record, GPUs first."""
    found = [record for cell in cells(_pretrained(records), "pretrain") for record in cell.records]
    reason = "no backbone was pre-trained: task=pretrain"
    return Sheet(
        "backbones", "Backbones pre-trained here", ABOUT, [_section(found) if found else nothing(reason)]
    )


def _pretrained(records: Iterable[Record]) -> list[Record]:
    return [record for record in records if record.run.get("task") == "pretrain"]


def tokens_seen(config: dict[str, Any]) -> int | None:
    """How many tokens were learnt from, where the configuration says it."""
    knobs = config.get("pretrain", {})
    names = ("steps", "batch", "accumulation", "max_length")
    if any(name not in knobs for name in names):
        return None
    return math.prod(int(knobs[name]) for name in names)


def _section(records: list[Record]) -> Section:
    rows = [_row(record) for record in records]
    columns: Columns = {
        "backbone": lambda row: row["backbone"],
        "parameters": lambda row: count_text(row["parameters"]),
        "steps": lambda row: GAP if row["steps"] is None else f"{row['steps']:,}",
        "tokens": lambda row: count_text(row["tokens"]),
    }
    for name in dict.fromkeys(line["suite_task"] for record in records for line in _losses(record)):
        columns[f"held-out loss, {name}"] = partial(_loss_text, name=name)
    columns |= {
        "seconds": lambda row: digits(row["seconds"]),
        "resumed from step": lambda row: (
            GAP if row["resumed_from_step"] is None else f"{row['resumed_from_step']:,}"
        ),
        "sha256": lambda row: (row["sha256"] or GAP)[:DIGITS_OF_HASH],
        "machine": lambda row: row["machine"],
        "commit": lambda row: row["commit"],
        "note": lambda row: row["reason"] or "",
    }
    if not any(row["reason"] for row in rows):
        del columns["note"]
    return Section("All backbones", "", rows, columns)


def _row(record: Record) -> Row:
    config = record.run["config"]
    row: Row = {"backbone": model_name(config), "machine": _machine(record)}
    row["commit"] = str(record.run.get("commit") or "unknown")[:DIGITS_OF_HASH]
    row |= {"steps": config.get("pretrain", {}).get("steps"), "tokens": tokens_seen(config)}
    row |= {f"loss_{line['suite_task']}": line["value"] for line in _losses(record)}
    for kind, name, key in (
        ("parameters", "trainable", "parameters"),
        ("end", "seconds", "seconds"),
        ("artifact", "resumed_from_step", "resumed_from_step"),
        ("artifact", "sha256", "sha256"),
    ):
        lines = record.of(kind)
        row[key] = lines[-1].get(name) if lines else None
    unfinished = "unfinished record: run the same command again" if record.status == "unfinished" else None
    return row | {"reason": unfinished or first_error([record]), "records": [short_name(record)]}


def _losses(record: Record) -> list[dict[str, Any]]:
    return [line for line in record.of("metric") if line["metric"] == "loss"]


def _loss_text(row: Row, name: str) -> str:
    return digits(row.get(f"loss_{name}"))


def _machine(record: Record) -> str:
    machine = record.run["machine"]
    return str(machine.get("gpu") or f"CPU, {machine.get('cpu')}, {machine.get('cores')} cores")
