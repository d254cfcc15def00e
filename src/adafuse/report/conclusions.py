"""The few sentences that answer the reader who must decide: what holds of the paper's claim, and what to deploy.

In: latency cells and what the trained adapters say. Out: a few lines of Markdown; each sentence is said only where
the records carry it, and turns with them. Next: readme.py, which puts it above the findings that it sums up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from adafuse.report import conclusions_speed
from adafuse.report.accuracy import Study, average, difference, enough, extremes, paired, without_one
from adafuse.report.cells import Cell, model_name
from adafuse.report.findings import GATHERED, SWITCHED
from adafuse.report.findings_why import spared
from adafuse.report.generation import NEVER, SWITCH, Generated
from adafuse.report.knobs import BYPASS, GATE_INPUT
from adafuse.report.on_par import (
    BETTER,
    NOT_DECIDED,
    NOT_WORSE,
    ON_PAR,
    WORSE,
    equivalent,
    verdict_word,
)
from adafuse.report.scans import scans
from adafuse.report.text import points_text, ratio_text
from adafuse.report.timing import results
from adafuse.report.trained import Trained
from adafuse.report.variants import ADAFUSE, LORA, OPPONENTS, TWIN
from adafuse.report.verdicts import MARGIN, Claim
from adafuse.report.why_studies import Why
from adafuse.stats import SIZE

# of a token's time: what nobody would build a router for
LITTLE = 0.05
# less certain is no other answer: what is not decided turns nothing, and is not turned
SIGN = {BETTER: 1, ON_PAR: 0, NOT_WORSE: 0, WORSE: -1}
# the order in which they are told
VERDICTS = (BETTER, ON_PAR, NOT_WORSE, NOT_DECIDED, WORSE)


def paragraphs(latency: Sequence[Cell], claims: Sequence[Claim], trained: Trained) -> str:
    """Speed where the paper measured, speed without launches, accuracy, rounding; empty without such records."""
    said = [
        *conclusions_speed.sentences(latency, claims),
        *_accuracy(trained.studies),
        _context_only([why for why in trained.whys if why.knob.name == GATE_INPUT]),
        _spare(latency, trained),
        _first(trained.generated, _rounding),
    ]
    return "\n\n".join(sentence for sentence in said if sentence)


def _first(found: Sequence[Any], say: Callable[[Any], str | None]) -> str | None:
    """Of several cells the first that has something to say: a GPU's before a CPU's."""
    return next((sentence for one in found if (sentence := say(one))), None)


def _accuracy(studies: Sequence[Study]) -> list[str]:
    """One gate for all layers against a gate per layer and against one LoRA; all studies: backbones may disagree."""
    counted = [study for study in studies if study.same_as is None]
    said = [part for other in (TWIN, LORA) if (part := _by_verdict(counted, other))]
    if not said:
        return []
    question = "Does one decision for all layers cost accuracy, the experts being the same?"
    return [f"{question} {' '.join(said)}{_furthest(counted)}"]


def _by_verdict(studies: Sequence[Study], other: str) -> str | None:
    """Where AdaFuse is on par, worse and so on, with the differences in points."""
    found: dict[str, list[str]] = {}
    for study in studies:
        own = enough(difference(study, ADAFUSE, other))
        if own:
            word = verdict_word(own)
            of_study = f"{_studied(study)} {100 * own.value:+.1f}{_carried(study, other, word)}"
            found.setdefault(word, []).append(of_study)
    parts = [f"{word} ({', '.join(found[word])})" for word in VERDICTS if word in found]
    return f"Against {OPPONENTS[other]}, in points: {'; '.join(parts)}." if parts else None


def _carried(study: Study, other: str, word: str) -> str:
    """Whether the verdict hangs on one task: the lowest and the highest mean without one that turns it."""
    rest = [
        (task, own)
        for task, own in without_one(study, ADAFUSE, other)
        if {word, verdict_word(own)} <= set(SIGN) and SIGN[verdict_word(own)] != SIGN[word]
    ]
    ends = dict.fromkeys([rest[0], rest[-1]]) if rest else ()
    said = [f"{100 * own.value:+.1f} and {verdict_word(own)} without {task}" for task, own in ends]
    return f", but {', '.join(said)}" if said else ""


def _furthest(studies: Sequence[Study]) -> str:
    """What the means over tasks hide."""
    ends = [
        (found, f"{task}, {_studied(study)}")
        for study in studies
        for task, found in extremes(study, ADAFUSE, LORA) or []
        if enough(found)
    ]
    if not ends:
        return ""
    least, most = (end(ends, key=lambda pair: pair[0].value) for end in (min, max))
    low, high = (f"{100 * found.value:+.0f} ({where})" for found, where in (least, most))
    return f" By task its difference to plain LoRA runs from {low} to {high} points."


def _studied(study: Study) -> str:
    data = "mixture" if study.table == "table2" else "single families"
    return f"{data} on {model_name(study.cell.config)}"


def _context_only(whys: Sequence[Why]) -> str | None:
    """What one gate costs where only the context tells tasks apart, and the nearest that any setting of it comes."""
    said = _first(whys, _same_tokens)
    gaps = [
        (gap, f"{value}, {name}, backbone {model_name(why.cell.config)}")
        for why in whys
        for name, points in why.lines.items()
        if name.split(" ")[0] == ADAFUSE and TWIN in why.levels
        for value, seeds in points.items()
        if (gap := enough(paired(seeds, why.levels[TWIN], why.tasks)))
    ]
    if said is None or len(gaps) < 2:
        return said
    gap, where = max(gaps, key=lambda pair: pair[0].value)
    return (
        f"{said} Of all places and settings tried the nearest to it, chosen by its result, is at {points_text(gap)} "
        f"({where})."
    )


def _same_tokens(why: Why) -> str | None:
    """The same where only the context tells the tasks apart, with the best of the places where one gate can look."""
    points = why.lines.get(ADAFUSE, {})
    means = {value: average(seeds, why.tasks) for value, seeds in points.items()}
    best = max(means, key=lambda value: means[value] or 0.0, default=None)
    if best is None or TWIN not in why.levels:
        return None
    gap = enough(paired(points[best], why.levels[TWIN], why.tasks))
    if gap is None or gap.high >= 0:
        return None
    gaps = {task: paired(points[best], why.levels[TWIN], [task]) for task in why.tasks}
    worst, low = min(((task, own) for task, own in gaps.items() if own), key=lambda pair: pair[1].value)
    return (
        "Where tasks share their tokens and only the context tells them apart, one decision for all layers falls "
        f"behind a gate per layer: {points_text(gap)} points, from the best place that it was given to look at "
        f"({best}, backbone {model_name(why.cell.config)}); most in {worst}, {points_text(low)}."
    )


def _spare(latency: Sequence[Cell], trained: Trained) -> str | None:
    """How many tokens accuracy can spare, and what leaving so many to the backbone saves."""
    scan = next((s for s in scans([c for c in latency if not c.is_cpu]) if s.what == "bypass_share"), None)
    studies = [why for why in trained.whys if why.knob.name == BYPASS]
    found = next(((why, own) for why in studies if (own := spared(why, trained.fits))), None)
    if scan is None or found is None:
        return None
    why, (share, _, _) = found
    none, left_at = scan.values[0], next((v for v in scan.values if v >= share), scan.values[-1])
    costs, saved = [], 0.0
    for arm, name in ((SWITCHED, "the paper's switch"), (GATHERED, "gathered experts")):
        with_none, left = (
            results(scan.cells[scan.values.index(v)], [arm])[arm].ratio for v in (none, left_at)
        )
        if with_none and left:
            costs.append(f"{name} {ratio_text(left)} instead of {ratio_text(with_none)}")
            saved = max(saved, 1 - left.ratio / with_none.ratio)
    what = "next to nothing" if saved < LITTLE else "time"
    if not costs:
        return None
    return (
        f"Of the tokens {100 * share:.0f} % can be left to the backbone alone with a fall of {MARGIN:g} points ruled "
        f"out (backbone {model_name(why.cell.config)}). That saves {what}: with "
        f"{100 * left_at:.0f} % left so, times the backbone, {' and '.join(costs)}."
    )


def _rounding(group: Generated) -> str | None:
    """What merging in place leaves in the weights, as answers have it."""
    arm = f"{SWITCH}, {NEVER}", "bfloat16"
    if arm not in group.arms:
        return None
    found = enough(paired(group.arms[arm], group.to_dense(arm), group.tasks))
    tested = equivalent(found) if found else None
    if found is None or tested is None:
        return None
    shows = "does not show" if tested.p < SIZE else "may show"
    return (
        f"What merging in place leaves in bfloat16 weights {shows} in answers (backbone "
        f"{model_name(group.cell.config)}): {points_text(found)} points."
    )
