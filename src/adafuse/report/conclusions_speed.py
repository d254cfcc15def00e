"""What holds of the paper's claim of speed, where launches cost time and where they do not.

In: latency cells and the claims on them. Out: a few sentences of Markdown, each only where the records carry it. Next:
conclusions.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from adafuse.report.cells import Cell, title
from adafuse.report.claims_latency import ADAFUSE, OTHERS, PAPER_GAIN, is_of_time
from adafuse.report.findings import GATHERED, LAYERWISE, SWITCHED, fastest_other
from adafuse.report.text import digits, ratio_text
from adafuse.report.timing import EAGER, RUNTIMES, ratio, results
from adafuse.report.variants import TWIN
from adafuse.report.verdicts import IN_PART, NOT_REPLICATED, REPLICATED, Claim, judge_ratio
from adafuse.stats import Interval

CAPTURED = [runtime for runtime in RUNTIMES if runtime != EAGER]


def sentences(latency: Sequence[Cell], claims: Sequence[Claim]) -> list[str]:
    """Speed where the paper measured, and without launches; of a GPU alone."""
    timed = [cell for cell in latency if cell.rounds and not cell.is_cpu]
    # the cell behind which most processes stand speaks for its kind
    alone = sorted([cell for cell in timed if cell.config["batch"] == 1], key=lambda cell: -len(cell.records))
    launched = _first(alone, lambda cell: _launched(cell, claims))
    experts = launched[0].config["experts"] if launched else None
    # the two sentences are to be read together: of the same experts
    alike = sorted(alone, key=lambda cell: cell.config["experts"] != experts)
    captured = _first(alike, _captured)
    found = [launched[1]] if launched else []
    if captured:
        found.append(" ".join([captured[1], *_shared_gate(timed), *_fastest(captured[0], alike)]))
    return found


def _first(cells: Sequence[Cell], say: Callable[[Cell], str | None]) -> tuple[Cell, str] | None:
    """The first cell that has something to say, and what."""
    return next(((cell, said) for cell in cells if (said := say(cell))), None)


def _launched(cell: Cell, claims: Sequence[Claim]) -> str | None:
    """The claim, where it was made: launched eagerly, one process to the next."""
    if not {ADAFUSE, *OTHERS} <= set(cell.config["arms"]["run"]):
        return None
    found = results(cell, [ADAFUSE, *OTHERS])
    fastest = fastest_other(found)
    own, gain = found[ADAFUSE].ratio, ratio(cell, fastest, ADAFUSE) if fastest else None
    if own is None or gain is None or fastest is None:
        return None
    verdict = judge_ratio(PAPER_GAIN, gain, "at_least")[0]
    told = "" if found[ADAFUSE].resolved else ", which the A/A arm does not tell from 1"
    return (
        f"Launched eagerly on an {cell.machine['gpu']}, the abstract's claim ({PAPER_GAIN:g} times faster than other "
        f"dynamic adapters) is {verdict}: AdaFuse's token is {ratio_text(gain)} times faster than the fastest "
        f"other's, {found[fastest].label}, and costs {ratio_text(own)} times the backbone's{told}."
        f"{_counted(cell, claims)}"
    )


def _counted(cell: Cell, claims: Sequence[Claim]) -> str:
    """How all printed times of that cell fare."""
    here = [claim for claim in claims if claim.cell == title(cell) and is_of_time(claim)]
    own = [claim.verdict for claim in here]
    parts = [
        f"{own.count(v)} {'is' if own.count(v) == 1 else 'are'} {v}"
        for v in dict.fromkeys((REPLICATED, IN_PART, NOT_REPLICATED, *own))
        if v in own
    ]
    numbers = {str(claim.ours) for claim in here}
    of_ours = f" (judged by {len(numbers)} of our numbers)" if len(numbers) < len(own) else ""
    return f" Of the paper's {len(own)} claims about time there{of_ours}, {', '.join(parts)}." if own else ""


def _captured(cell: Cell) -> str | None:
    """What is left of it where launches cost nothing."""
    if not {GATHERED, LAYERWISE, SWITCHED} <= set(cell.config["arms"]["run"]):
        return None
    one, many, merged = (found.ratio for found in results(cell, [GATHERED, LAYERWISE, SWITCHED]).values())
    if one is None or many is None or merged is None:
        return None
    dearer = merged.low > max(one.high, many.high)
    return (
        "In one captured graph, where launches cost nothing, merging into the weights costs "
        f"{ratio_text(merged)} times the backbone's token, experts gathered for each token {ratio_text(one)}, and the "
        f"same behind a gate per layer {ratio_text(many)}"
        f"{': the gain was in launches saved, not in merging' if dearer else ''}."
    )


def _shared_gate(timed: Sequence[Cell]) -> Iterator[str]:
    """What the shared gate itself saves, paired within each captured cell: its intervals are far narrower than those to
    the backbone.
    """
    gaps = [gap for cell in timed for runtime in CAPTURED if (gap := _gate_gap(cell, runtime))]
    if not gaps:
        return
    above, below = sum(gap.low > 1 for gap in gaps), sum(gap.high < 1 for gap in gaps)
    ratios = sorted(gap.ratio for gap in gaps)
    middle = ratios[len(ratios) // 2]
    yield (
        f"A gate per layer costs {middle:.3f} times what one gate does, both gathered (the median of {len(gaps)} "
        f"captured cells, from {ratios[0]:.3f} to {ratios[-1]:.3f}; the interval lies above 1 in {above}, "
        f"below in {below})."
    )


def _gate_gap(cell: Cell, runtime: str) -> Interval | None:
    arms = [arm.removesuffix("graph") + runtime for arm in (LAYERWISE, GATHERED)]
    return ratio(cell, arms[0], arms[1]) if set(arms) <= set(cell.config["arms"]["run"]) else None


def _fastest(spoken: Cell, cells: Sequence[Cell]) -> Iterator[str]:
    """What to deploy: the fastest of AdaFuse's captured arms on the machine and the workload of the cell spoken of."""
    same = [cell for cell in cells if _workload(cell) == _workload(spoken)]
    arms = [
        (found.ms_per_token, found)
        for cell in same
        for arm, found in results(cell).items()
        if arm.startswith("adafuse_")
        and not arm.startswith(TWIN)
        and found.runtime in CAPTURED
        and found.ms_per_token
    ]
    if not arms:
        return
    ms, own = min(arms, key=lambda arm: arm[0])
    gemv = own.to_gemv.ratio if own.to_gemv else None
    beside = f", and {ratio_text(gemv)} of the backbone through the same product of our own" if gemv else ""
    yield (
        f"Of all its arms the fastest is {own.label}: {digits(ms)} ms a token, {ratio_text(own.ratio)} of the backbone "
        f"there{beside}."
    )


def _workload(cell: Cell) -> tuple[object, ...]:
    config = cell.config
    return (
        cell.machine["gpu"],
        config["model"]["name"],
        config["experts"],
        config["batch"],
        config["context"],
    )
