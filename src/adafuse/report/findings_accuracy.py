"""What the records say of trained adapters beside the table `accuracy`, in sentences: every number is looked up, and a
sentence without its records is left out.

In: why studies and strategies. Out: lines of Markdown under those about speed. Next: findings_why.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from adafuse.report.findings_why import bypass, gate_input, place
from adafuse.report.generation import LONG, NEVER, SWITCH, Generated
from adafuse.report.knobs import BYPASS, GATE_INPUT
from adafuse.report.trained import Trained

MERGING = ("rebase", SWITCH, f"{SWITCH}, {NEVER}")


def sentences(found: Trained) -> list[str]:
    """A bullet for each question that the records answer; none where there is no such record."""
    lines = [
        *(line for why in found.whys if why.knob.name == GATE_INPUT for line in gate_input(why, found.fits)),
        *(bypass(why, found.fits) for why in found.whys if why.knob.name == BYPASS),
        *(_generation(group) for group in found.generated),
    ]
    return [f"- {line}" for line in lines if line]


def _generation(group: Generated) -> str | None:
    """Whether rounding in merged weights shows in answers."""
    said = list(_by_dtype(group))
    if not said:
        return None
    long = f" (in brackets {LONG} alone, whose answers are long)" if LONG in group.tasks else ""
    return (
        f"**Drift in answers** ({place(group.cell)}, {group.method}): against unmerged experts{long}, "
        f"{'; '.join(said)}."
    )


def _by_dtype(group: Generated) -> Iterator[str]:
    for arm in group.arms:
        strategy, dtype = arm
        found = group.gap(arm, group.tasks)
        if strategy not in MERGING or not found:
            continue
        alone = group.gap(arm, [LONG])
        long = f" ({alone.text})" if alone else ""
        yield f"{strategy} in {dtype} {found.text}{long}"
