"""What the records say about accuracy, in sentences: every number is looked up, and a sentence without its records is
left out.

In: studies, why studies, strategies and routers. Out: lines of Markdown under those about speed. Next: readme.py.
"""

from __future__ import annotations

from collections.abc import Iterator

from adafuse.report.accuracy import Seeds, Study, average, budget_text, difference, extremes, paired
from adafuse.report.agreement import agreements
from adafuse.report.cells import Cell, model_name
from adafuse.report.fits import Fits
from adafuse.report.generation import NEVER, SWITCH, Generated, identical_share
from adafuse.report.knobs import BYPASS, GATE_INPUT
from adafuse.report.on_par import ON_PAR, equivalent, is_not_worse, margin_text, p_text, verdict_word
from adafuse.report.text import points_text
from adafuse.report.trained import Trained
from adafuse.report.variants import ADAFUSE, LORA, TWIN
from adafuse.report.verdicts import MARGIN, MIN_SEEDS
from adafuse.report.why import bypassed_share, value_text
from adafuse.report.why_studies import Why
from adafuse.stats import Difference

COMPARED = {LORA: "plain LoRA", "mola": "MoLA", TWIN: "a gate per layer with the same experts"}
ROUTED = ("mola", "moral", "pesc", "mixlora", ADAFUSE, TWIN)
MERGING = ("rebase", SWITCH, f"{SWITCH}, {NEVER}")


def sentences(found: Trained) -> list[str]:
    """A bullet for each question that the records answer; none where there is no such record."""
    lines = [
        *(_on_par(study) for study in found.studies),
        *(_routed(study) for study in found.studies),
        *(_gate_input(why) for why in found.whys if why.knob.name == GATE_INPUT),
        *(_agreement(cell) for cell in found.routing),
        *(_gate_per_layer(why) for why in found.whys),
        *(_bypass(why, found.fits) for why in found.whys if why.knob.name == BYPASS),
        *(_generation(group) for group in found.generated),
    ]
    return [f"- {line}" for line in lines if line]


def _on_par(study: Study) -> str | None:
    """AdaFuse against what it is compared with, by the rule of the claims."""
    said = []
    for other, words in COMPARED.items():
        found = difference(study, ADAFUSE, other)
        if found and found.n_seeds >= MIN_SEEDS:
            said.append(f"{points_text(found)} points to {words}, {_verdict(found)}")
    if not said:
        return None
    tasks = f"{len(study.tasks)} task{'' if len(study.tasks) == 1 else 's'}"
    same = f", the weights of {study.same_as} again" if study.same_as else ""
    return (
        f"**Accuracy** ({_place(study.cell)}{same}, {budget_text(study.cell)}, mean of {tasks}): "
        f"AdaFuse's difference is {'; '.join(said)}. On par means within ± {MARGIN:g} points at 5 %."
        f"{_later_seeds(study)}{_families(study)}"
    )


def _later_seeds(study: Study) -> str:
    """Where more seeds were run than the least that may decide: what those beyond them say alone, which no earlier
    look at the others can have led to.
    """
    later = {name: dict(sorted(seeds.items())[MIN_SEEDS:]) for name, seeds in study.variants.items()}
    found = {name: paired(later.get(ADAFUSE, {}), later.get(name, {}), study.tasks) for name in COMPARED}
    known = [
        f"{points_text(own)} to {COMPARED[name]}, {verdict_word(own)}"
        for name, own in found.items()
        if own and own.n_seeds >= MIN_SEEDS
    ]
    return f" The seeds after the first {MIN_SEEDS} alone: {'; '.join(known)}." if known else ""


def _families(study: Study) -> str:
    """What the mean over tasks hides: the two ends, by task."""
    ends = extremes(study, ADAFUSE, LORA)
    if not ends:
        return ""
    (least, low), (most, high) = ends
    return f" By task, to plain LoRA, from {points_text(low)} ({least}) to {points_text(high)} ({most})."


def _routed(study: Study) -> str | None:
    """Whether routing pays at all: every routed method against one LoRA of as many parameters."""
    found = {name: difference(study, name, LORA) for name in ROUTED}
    known = {name: own for name, own in found.items() if own and own.n_seeds >= MIN_SEEDS}
    if len(known) < len(ROUTED):
        return None
    said = ", ".join(f"{name} {points_text(own)}" for name, own in known.items())
    return (
        f"**Does routing pay?** ({_place(study.cell)}), points to plain LoRA of as many parameters: {said}."
    )


def _gate_per_layer(why: Why) -> str | None:
    """How far AdaFuse's distance to its twin hangs on a setting that both have."""
    one, many = why.lines.get(ADAFUSE, {}), why.lines.get(TWIN, {})
    found = {v: paired(one[v], many[v], why.tasks) for v in why.values if v in one and v in many}
    known = {v: own for v, own in found.items() if own and own.n_seeds >= MIN_SEEDS}
    if len(known) < 2:
        return None
    said = ", ".join(f"{value_text(why, v)}: {points_text(own)}" for v, own in known.items())
    return f"**Over the {why.knob.words}** ({_place(why.cell)}), AdaFuse minus a gate per layer, points at {said}."


def _verdict(found: Difference) -> str:
    tested = equivalent(found)
    assert tested is not None
    word = verdict_word(found)
    # where another rule gave the verdict, the p of equivalence would be read as its reason
    test = f"equivalence: {p_text(tested)}, " if word == ON_PAR else ""
    return f"{word} ({test}{found.n_seeds} seeds)"


def _gate_input(why: Why) -> str | None:
    """Where the gate had better look."""
    points = why.lines.get(ADAFUSE, {})
    means = {v: average(points[v], why.tasks) for v in why.values if v in points}
    known = {value: mean for value, mean in means.items() if mean is not None}
    if len(known) < 2:
        return None
    best = max(known, key=lambda value: known[value])
    said = ", ".join(f"{value} {100 * mean:.1f} %" for value, mean in known.items())
    rest = max((value for value in known if value != best), key=lambda value: known[value])
    gain = paired(points[best], points[rest], why.tasks)
    ahead = f"; {best} is {points_text(gain)} points ahead of {rest} ({gain.method})" if gain else ""
    beside = ", ".join(_level(name, seeds, points[best], why.tasks) for name, seeds in why.levels.items())
    return f"**Where the gate looks** ({_place(why.cell)}): {said}{ahead}{'; beside it ' if beside else ''}{beside}."


def _level(name: str, seeds: Seeds, best: Seeds, tasks: list[str]) -> str:
    """What a method without the knob reaches, and for those that AdaFuse is compared with by how much it beats them."""
    mean = average(seeds, tasks)
    gap = paired(best, seeds, tasks) if name in COMPARED else None
    reached = "–" if mean is None else f"{100 * mean:.1f} %"
    return f"{name} {reached}" + (f" (the best of them minus it: {points_text(gap)} points)" if gap else "")


def _agreement(cell: Cell) -> str | None:
    """Whether layers agree, as one gate for all of them supposes."""
    one = next((found for found in agreements(cell) if found.method == TWIN), None)
    if one is None:
        return None
    within = "" if one.within_blocks is None else f", of one block {one.within_blocks:.2f}"
    return (
        f"**Do layers agree?** ({_place(cell)}): with a gate per layer the choices of two layers tell {one.mean:.2f} "
        f"of each other{within} (normalised mutual information; 0: nothing, 1: all)."
    )


def _bypass(why: Why, known: Fits) -> str | None:
    """How many tokens may go without any adapter before that costs more than the margin."""
    points = why.lines.get(ADAFUSE, {})
    shares = {}
    for value, seeds in points.items():
        share = bypassed_share(seeds, known) if value is not None else None
        cost = paired(seeds, points[None], why.tasks) if None in points else None
        if share is not None and cost:
            shares[share] = (value, cost)
    if not shares:
        return None
    kept = [
        share for share in sorted(shares) if all(is_not_worse(shares[s][1]) for s in shares if s <= share)
    ]
    if not kept:
        least = min(shares)
        value, cost = shares[least]
        penalty = value_text(why, value)
        said = f"already {_share(least)} of the tokens (penalty {penalty}) cost {points_text(cost)} points"
    else:
        value, cost = shares[kept[-1]]
        said = (
            f"{_share(kept[-1])} of the tokens can be left to the backbone alone (penalty {value_text(why, value)}) "
            f"before accuracy may have fallen by {MARGIN:g} points: {margin_text(cost)}"
        )
    return f"**Bypass** ({_place(why.cell)}): {said}; measured up to {_share(max(shares))}."


def _generation(group: Generated) -> str | None:
    """Whether rounding in merged weights shows in answers."""
    said = list(_by_dtype(group))
    if not said:
        return None
    return f"**Drift in answers** ({_place(group.cell)}, {group.method}): against unmerged experts, {'; '.join(said)}."


def _by_dtype(group: Generated) -> Iterator[str]:
    for strategy, dtype in group.arms:
        dense = group.to_dense((strategy, dtype))
        found = paired(group.arms[strategy, dtype], dense, group.tasks)
        if strategy not in MERGING or not found:
            continue
        same = identical_share(group.arms[strategy, dtype], dense, group.tasks) or 0.0
        yield f"{strategy} in {dtype} {points_text(found)} points, {100 * same:.1f} % of the results the same"


def _place(cell: Cell) -> str:
    where = "CPU" if cell.is_cpu else str(cell.machine["gpu"])
    data = cell.config["data"]
    return f"{where}, {model_name(cell.config)}, data {data['name']}"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"
