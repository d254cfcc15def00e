"""What the rows that the paper lacks say, in sentences: which part of AdaFuse brings its gain, and how far it carries.

In: latency cells of a GPU. Out: lines of Markdown. Next: findings.py.
"""

from __future__ import annotations

from collections.abc import Mapping

from adafuse.report.cells import Cell
from adafuse.report.text import process_text
from adafuse.report.timing import again, results

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


def eager(cell: Cell, place: str) -> str | None:
    """One gate, under one strategy after another."""
    said = _listed(cell, EAGER)
    return said and (
        f"**What brings the gain** (eager, batch 1; {place}), in units of the backbone's token: {said}{_noise(cell)}."
    )


def peft(cell: Cell, place: str) -> str | None:
    """PEFT as its users run it."""
    said = _listed(cell, PEFT)
    rank = cell.config.get("methods", {}).get("lora", {}).get("rank")
    whole = f"; the LoRA of rank {rank}, as all experts together" if rank else ""
    return (
        said
        and f"**PEFT** (eager, batch 1; {place}{whole}), in units of the backbone's token: {said}{_noise(cell)}."
    )


def captured(cell: Cell, place: str) -> str | None:
    """The loops, once nothing waits for the host."""
    said = _listed(cell, CAPTURED)
    return said and (
        f"**Loops without launches** (one CUDA graph, batch 1; {place}), in units of the backbone's token: {said}."
    )


def _noise(cell: Cell) -> str:
    """What the A/A arm says: why a ratio whose interval lies above 1 may still not be resolved."""
    noise = again(cell)
    return f"; the backbone against itself, {process_text(noise)}" if noise else ""


def _listed(cell: Cell, wanted: Mapping[str, str]) -> str | None:
    """Each name with its ratio, marked where the A/A arm differs as much; None unless the cell has them all."""
    found = results(cell, list(wanted))
    if not all(arm in found and found[arm].ratio for arm in wanted):
        return None
    return ", ".join(
        f"{name} {process_text(found[arm].ratio, found[arm].resolved)}" for arm, name in wanted.items()
    )
