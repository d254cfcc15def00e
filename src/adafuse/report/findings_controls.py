"""What the rows that the paper lacks say, in sentences: which part of AdaFuse brings its gain, and how far it carries.

In: latency cells of a GPU. Out: lines of Markdown. Next: findings.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from adafuse.report.cells import Cell
from adafuse.report.scans import WORDS, Scan
from adafuse.report.text import process_text
from adafuse.report.timing import ArmResult, results

EAGER = {
    "adafuse_loop": "one gate for all layers and a loop over experts",
    "adafuse_gather": "gathered",
    "adafuse_dense": "all experts at once",
    "adafuse_switch": "merged by one launch",
}
PEFT = {
    "lora_peft": "an unmerged LoRA",
    "adafuse_peft_merge": "a selection merged and unmerged for every token",
}
CAPTURED = {
    "mola_masked_loop_graph": "MoLA's loop",
    "pesc_masked_loop_graph": "PESC's loop",
    "adafuse_masked_loop_graph": "the loop behind one gate",
    "adafuse_layerwise_simple_merge_graph": "merging layer by layer",
}
SCANNED = {
    "adafuse_gather_graph": "gathered experts",
    "adafuse_layerwise_gather_graph": "the same with a gate per layer",
    "adafuse_switch_graph": "the paper's switch",
}


def eager(cell: Cell, place: str) -> str | None:
    """One gate, under one strategy after another."""
    said = _listed(cell, EAGER)
    return (
        said
        and f"**What brings the gain** (eager, batch 1; {place}), in units of the backbone's token: {said}."
    )


def peft(cell: Cell, place: str) -> str | None:
    """PEFT as its users run it."""
    said = _listed(cell, PEFT)
    return said and f"**PEFT** (eager, batch 1; {place}), in units of the backbone's token: {said}."


def captured(cell: Cell, place: str) -> str | None:
    """The loops, once nothing waits for the host."""
    said = _listed(cell, CAPTURED)
    return said and (
        f"**Loops without launches** (one CUDA graph, batch 1; {place}), in units of the backbone's token: {said}."
    )


def scanned(scan: Scan, place: str) -> str | None:
    """How each ratio moves with what was varied; the intervals stand in table attribution."""
    rows = [results(cell, list(SCANNED)) for cell in scan.cells]
    said = []
    for arm, name in SCANNED.items():
        ratios = [found for row in rows if (found := row[arm].ratio)]
        if len(ratios) == len(rows):
            said.append(f"{name} {', '.join(f'{found.ratio:.2f}' for found in ratios)}")
    if not said:
        return None
    named = [str(value).replace("\n", " ") for value in scan.values]
    values, single = ", ".join(named), _single(named, rows)
    some = f", one process at {', '.join(single)}" if single else ""
    once = ", one process a point" if len(single) == len(named) else some
    return (
        f"**Over {scan.what.replace('_', ' ')}** (one CUDA graph; {place}{once}; intervals in table attribution), "
        f"{WORDS[scan.what]} {values}: {'; '.join(said)} times the backbone."
    )


def _single(named: list[str], rows: list[dict[str, ArmResult]]) -> list[str]:
    """The points of a scan behind which one process stands."""
    counts = [{own.ratio.n_processes for own in row.values() if own.ratio} for row in rows]
    return [name for name, own in zip(named, counts, strict=True) if own == {1}]


def _listed(cell: Cell, wanted: Mapping[str, str]) -> str | None:
    """Each name with its ratio, marked where the A/A arm differs as much; None unless the cell has them all."""
    found = results(cell, list(wanted))
    if not all(arm in found and found[arm].ratio for arm in wanted):
        return None
    return ", ".join(
        f"{name} {process_text(found[arm].ratio, found[arm].resolved)}" for arm, name in wanted.items()
    )
