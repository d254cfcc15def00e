"""The few sentences that answer the reader who must decide: what holds of the paper's claim, and what to deploy.

In: latency cells and what the trained adapters say. Out: a few lines of Markdown; each sentence is said only where
the records carry it, and turns with them. Next: readme.py, which puts it above the findings that it sums up.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from adafuse.report.accuracy import Study, average, difference, extremes, paired
from adafuse.report.cells import Cell, model_name
from adafuse.report.claims_latency import ADAFUSE as SWITCH_ARM
from adafuse.report.claims_latency import OTHERS, PAPER_GAIN
from adafuse.report.findings import GATHERED, LAYERWISE, SWITCHED, fastest_other
from adafuse.report.generation import NEVER, SWITCH, Generated
from adafuse.report.knobs import GATE_INPUT
from adafuse.report.on_par import (
    BETTER,
    NOT_DECIDED,
    NOT_WORSE,
    ON_PAR,
    WORSE,
    equivalent,
    verdict_word,
)
from adafuse.report.text import points_text, ratio_text
from adafuse.report.timing import ratio, results
from adafuse.report.trained import Trained
from adafuse.report.variants import ADAFUSE, LORA, TWIN
from adafuse.report.verdicts import MIN_SEEDS
from adafuse.report.why_studies import Why
from adafuse.stats import SIZE, Difference, Interval

# what AdaFuse's accuracy is held against, and the order in which verdicts are told
OPPONENTS = {LORA: "plain LoRA", TWIN: "its twin with a gate per layer"}
VERDICTS = (BETTER, ON_PAR, NOT_WORSE, NOT_DECIDED, WORSE)


def paragraphs(latency: Sequence[Cell], trained: Trained) -> str:
    """Speed where the paper measured, speed without launches, accuracy, rounding; empty without such records."""
    timed = [cell for cell in latency if cell.rounds and not cell.is_cpu and cell.config["batch"] == 1]
    # the cell behind which most processes stand speaks for its kind
    timed.sort(key=lambda cell: -len(cell.records))
    said = [
        _first(timed, _launched),
        _first(_as_launched(timed), _captured),
        _accuracy(trained.studies),
        _first([why for why in trained.whys if why.knob.name == GATE_INPUT], _same_tokens),
        _first(trained.generated, _rounding),
    ]
    return "\n\n".join(sentence for sentence in said if sentence)


def _as_launched(timed: list[Cell]) -> list[Cell]:
    """Those with the experts of the launched cell first: the two sentences are to be read together."""
    launched = next((cell.config["experts"] for cell in timed if _launched(cell)), None)
    return sorted(timed, key=lambda cell: cell.config["experts"] != launched)


def _first(found: Sequence[Any], say: Callable[[Any], str | None]) -> str | None:
    """Of several cells the first that has something to say: a GPU's before a CPU's."""
    return next((sentence for one in found if (sentence := say(one))), None)


def _launched(cell: Cell) -> str | None:
    """The claim, where it was made: launched eagerly, one process to the next."""
    if not {SWITCH_ARM, *OTHERS} <= set(cell.config["arms"]["run"]):
        return None
    found = results(cell, [SWITCH_ARM, *OTHERS])
    fastest = fastest_other(found)
    own, gain = found[SWITCH_ARM].ratio, ratio(cell, fastest, SWITCH_ARM) if fastest else None
    if own is None or gain is None or fastest is None:
        return None
    holds = "holds" if gain.ratio >= PAPER_GAIN else "does not hold"
    return (
        f"Launched eagerly on an {cell.machine['gpu']}, the paper's claim of speed {holds}: AdaFuse's token costs "
        f"{ratio_text(own)} times the backbone's and is {ratio_text(gain)} times faster than the fastest other dynamic "
        f"adapter's, {found[fastest].label}."
    )


def _captured(cell: Cell) -> str | None:
    """What is left of it where launches cost nothing, and what to deploy then."""
    if not {GATHERED, LAYERWISE, SWITCHED} <= set(cell.config["arms"]["run"]):
        return None
    found = results(cell, [GATHERED, LAYERWISE, SWITCHED])
    one, many, merged = (
        found[arm].ratio if arm in found else None for arm in (GATHERED, LAYERWISE, SWITCHED)
    )
    if one is None or many is None or merged is None:
        return None
    dearer = merged.low > max(one.high, many.high)
    said = (
        f"In one captured graph, where launches cost nothing, merging into the weights costs {ratio_text(merged)}, "
        f"experts gathered for each token {ratio_text(one)}, and the same behind a gate per layer {ratio_text(many)}"
    )
    if not dearer:
        return f"{said}."
    return f"{said}: the gain was in launches saved, not in merging{_and_one_gate(cell, one, many)}."


def _and_one_gate(cell: Cell, one: Interval, many: Interval) -> str:
    """Whether the shared gate itself buys speed: only if the two intervals are apart."""
    apart = one.high < many.low
    return "" if apart else ", nor in the shared gate; gathered experts in a graph are what to deploy"


def _accuracy(studies: Sequence[Study]) -> str | None:
    """One gate for all layers against one LoRA and against a gate per layer; all studies: backbones may disagree."""
    counted = [study for study in studies if study.same_as is None]
    said = [part for other, words in OPPONENTS.items() if (part := _by_verdict(counted, other, words))]
    return f"AdaFuse's accuracy, in points: {'; '.join(said)}.{_furthest(counted)}" if said else None


def _by_verdict(studies: Sequence[Study], other: str, words: str) -> str | None:
    """Where AdaFuse is on par, worse and so on, with the differences in points."""
    found: dict[str, list[str]] = {}
    for study in studies:
        own = _enough(difference(study, ADAFUSE, other))
        if own:
            found.setdefault(verdict_word(own), []).append(f"{_studied(study)} {100 * own.value:+.1f}")
    parts = [f"{word} ({', '.join(found[word])})" for word in VERDICTS if word in found]
    return f"against {words}, {', '.join(parts)}" if parts else None


def _furthest(studies: Sequence[Study]) -> str:
    """What the means over tasks hide."""
    ends = [
        (found, f"{task}, {_studied(study)}")
        for study in studies
        for task, found in extremes(study, ADAFUSE, LORA) or []
        if _enough(found)
    ]
    if not ends:
        return ""
    least, most = (end(ends, key=lambda pair: pair[0].value) for end in (min, max))
    low, high = (f"{100 * found.value:+.0f} ({where})" for found, where in (least, most))
    return f" By task its difference to plain LoRA runs from {low} to {high} points."


def _studied(study: Study) -> str:
    data = "mixture" if study.table == "table2" else "single families"
    return f"{data} on {model_name(study.cell.config)}"


def _same_tokens(why: Why) -> str | None:
    """The same where only the context tells the tasks apart, with the best of the places where one gate can look."""
    points = why.lines.get(ADAFUSE, {})
    means = {value: average(seeds, why.tasks) for value, seeds in points.items()}
    best = max(means, key=lambda value: means[value] or 0.0, default=None)
    if best is None or TWIN not in why.levels:
        return None
    gap = _enough(paired(points[best], why.levels[TWIN], why.tasks))
    if gap is None or gap.high >= 0:
        return None
    return (
        "Where tasks share their tokens and only the context tells them apart, one decision for all layers falls "
        f"behind: {points_text(gap)} points to a gate per layer, from the best place that it can look at ({best}, "
        f"backbone {model_name(why.cell.config)})."
    )


def _rounding(group: Generated) -> str | None:
    """What merging in place leaves in the weights, as answers have it."""
    arm = f"{SWITCH}, {NEVER}", "bfloat16"
    if arm not in group.arms:
        return None
    found = _enough(paired(group.arms[arm], group.to_dense(arm), group.tasks))
    tested = equivalent(found) if found else None
    if found is None or tested is None:
        return None
    shows = "does not show" if tested.p < SIZE else "may show"
    return (
        f"What merging in place leaves in bfloat16 weights {shows} in answers (backbone "
        f"{model_name(group.cell.config)}): {points_text(found)} points."
    )


def _enough(found: Difference | None) -> Difference | None:
    return found if found and found.n_seeds >= MIN_SEEDS else None
