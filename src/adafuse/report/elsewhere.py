"""Which evaluations a table of their own tells, so that Tables 2 to 4 and the claims leave them out.

In: evaluate records and the studies that hold them. Out: paths. Next: accuracy.py.

A record is told elsewhere if its data were made for a question of table why or generation; if it differs in one knob
from what most records share, or stands in such a study with another setting than its method's file; or if only AdaFuse
and its twin were trained on its data and all of it stands in tables why and generation.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from adafuse.records import Record
from adafuse.report.accuracy import as_trained, trained
from adafuse.report.cells import Cell, base_key, cells, method_name
from adafuse.report.variants import ADAFUSE, TWIN, as_its_file
from adafuse.report.why_studies import Why

# data of conf/data that are no mixture of all families
QUESTIONS = ("same_tokens", "long_answers")


def told_elsewhere(records: list[Record], whys: list[Why], generated: Iterable[Record]) -> set[Path]:
    """The paths of the records that are no part of Tables 2 to 4."""
    told = {record.path for record in varied(whys)}
    told |= {r.path for r in records if r.run["config"].get("data", {}).get("name") in QUESTIONS}
    shown = {record.path for why in whys for record in why.records} | {r.path for r in generated}
    for cell in cells(as_trained(records), "evaluate"):
        own = trained(cell.records)
        if {method_name(record) for record in own} <= {ADAFUSE, TWIN} and {r.path for r in own} <= shown:
            told |= {record.path for record in own}
    return told


def varied(whys: Iterable[Why]) -> list[Record]:
    """The records of these studies that are no default: in another cell, or with a setting of their own."""
    return [record for why in whys for record in _away(why)]


def _away(why: Why) -> list[Record]:
    home = base_key(why.cell)
    return [r for r in why.records if base_key(Cell((r,))) != home or not as_its_file(r)]
