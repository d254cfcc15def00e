"""What single settings do to accuracy, in sentences, and what a study is called: every number is looked up.

In: why studies and the training runs behind them. Out: lines of Markdown, without their bullets. Next:
findings_accuracy.py, which puts them among its own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import takewhile
from typing import Any

from adafuse.report.accuracy import Seeds, Study, average, budget_text, paired
from adafuse.report.cells import Cell, model_name
from adafuse.report.fits import Fits
from adafuse.report.older import entry
from adafuse.report.on_par import is_not_worse, margin_text
from adafuse.report.text import points_text
from adafuse.report.variants import ADAFUSE, OPPONENTS, TWIN
from adafuse.report.verdicts import MARGIN
from adafuse.report.why import bypassed_share, router_entropy, value_text
from adafuse.report.why_studies import Why
from adafuse.stats import Difference

# without experts in the first blocks
LATE = "first_expert_block"
# settings of a line in the words of its title
UNLIKE = {LATE: "no experts before block {}", "router_norm": "inputs at one scale"}


def place(cell: Cell) -> str:
    """Machine, backbone and data, in front of what is said of them."""
    return f"{_machine_and_backbone(cell)}, data {cell.config['data']['name']}"


def studied(study: Study) -> str:
    """The first column: machine, backbone, data and sizes, and whether another backbone has the same weights."""
    count, data = len(study.tasks), entry(study.cell.config, "data")
    if study.table == "table2":
        tasks = f"{data['name']} of {count} task{'' if count == 1 else 's'}"
    else:
        tasks = f"{count} single famil{'y' if count == 1 else 'ies'}"
    level = f" at level {data['level']}" if data["level"] != 1 else ""
    same = f" (the weights of {study.same_as} again)" if study.same_as else ""
    return f"{_machine_and_backbone(study.cell)}{same}, {tasks}{level}, {budget_text(study.cell)}"


def gate_input(why: Why, known: Fits) -> Iterator[str]:
    """Where the gate had better look; a sentence for each line of AdaFuse's, which may have experts in fewer layers."""
    for name in why.lines:
        line = _gate_line(why, name, known) if name.split(" ")[0] == ADAFUSE else None
        if line:
            yield line


def _gate_line(why: Why, name: str, known: Fits) -> str | None:
    points = why.lines[name]
    means = {v: average(points[v], why.tasks) for v in why.values if v in points}
    reached = {value: mean for value, mean in means.items() if mean is not None}
    if len(reached) < 2:
        return None
    best = max(reached, key=lambda value: reached[value])
    said = ", ".join(f"{value} {100 * mean:.1f} %" for value, mean in reached.items())
    rest = max((value for value in reached if value != best), key=lambda value: reached[value])
    gain = paired(points[best], points[rest], why.tasks)
    ahead = f"; {best} is {points_text(gain)} points ahead of {rest} ({gain.method})" if gain else ""
    # the other levels are said once, beside the line that is as its file
    settings = why.settings[name]
    levels = {k: seeds for k, seeds in why.levels.items() if k == TWIN} if settings else why.levels
    beside = ", ".join(_level(other, seeds, points[best], why.tasks) for other, seeds in levels.items())
    unlike = "".join(f", {UNLIKE.get(k, f'{k}={{}}').format(v)}" for k, v in settings.items())
    every = ", which has experts in every block" if LATE in settings and beside else ""
    return (
        f"**Where the gate looks{unlike}** ({place(why.cell)}): {said}{ahead}"
        f"{'; beside it ' if beside else ''}{beside}{every}."
        f"{_softness(why, name, reached, known)}"
    )


def _level(name: str, seeds: Seeds, best: Seeds, tasks: list[str]) -> str:
    """What a method without the knob reaches, and for those that AdaFuse is compared with by how much it beats them."""
    mean = average(seeds, tasks)
    gap = paired(best, seeds, tasks) if name in OPPONENTS else None
    reached = "–" if mean is None else f"{100 * mean:.1f} %"
    minus = f"AdaFuse at its best place minus {OPPONENTS[name]}: {points_text(gap)} points" if gap else ""
    return f"{name} {reached}" + (f" ({minus})" if minus else "")


def _softness(why: Why, name: str, means: dict[Any, float], known: Fits) -> str:
    """How soft the gates are at each place: what the router reads there may differ in scale as well as in content."""
    entropies = {value: router_entropy(why.lines[name][value], known) for value in means}
    soft = {value: entropy for value, entropy in entropies.items() if entropy is not None}
    if len(soft) < len(means):
        return ""
    most = math.log(why.cell.config["experts"]["count"])
    same = sorted(means, key=lambda value: means[value]) == sorted(soft, key=lambda value: soft[value])
    order = "; accuracy follows it, so that place and softness are not told apart" if same else ""
    said = ", ".join(f"{value} {entropy:.2f}" for value, entropy in soft.items())
    return (
        f" Mean entropy of the router, which hangs on the scale of what it reads as well: {said} nats, at most "
        f"{most:.2f}{order}."
    )


def over_setting(why: Why) -> dict[Any, Difference]:
    """AdaFuse minus a gate per layer at each value of a setting that both have."""
    one, many = why.lines.get(ADAFUSE, {}), why.lines.get(TWIN, {})
    found = {v: paired(one[v], many[v], why.tasks) for v in why.values if v in one and v in many}
    return {value: own for value, own in found.items() if own}


def changed(why: Why, names: list[str]) -> str:
    """What these lines have otherwise than their method's file; empty if nothing."""
    return ", ".join(sorted({f"{k}={v}" for name in names for k, v in why.settings.get(name, {}).items()}))


def bypass(why: Why, known: Fits) -> str | None:
    """How many tokens may go without any adapter before that costs more than the margin."""
    costs = _costs(why, known)
    if not costs:
        return None
    most = spared(why, known)
    if most is None:
        least = min(costs)
        value, cost = costs[least]
        penalty = value_text(why, value)
        said = f"already {_share(least)} of the tokens (penalty {penalty}) cost {points_text(cost)} points"
    else:
        share, value, cost = most
        said = (
            f"{_share(share)} of the tokens can be left to the backbone alone (penalty {value_text(why, value)}) "
            f"with a fall of {MARGIN:g} points ruled out: {margin_text(cost)}"
        )
    return f"**Bypass** ({place(why.cell)}): {said}; measured up to {_share(max(costs))}."


def spared(why: Why, known: Fits) -> tuple[float, Any, Difference] | None:
    """The largest share of tokens left to the backbone alone that, as every smaller one, costs no more than the margin:
    the share, its value of the knob, and AdaFuse's accuracy there minus that without bypass; None where already the
    least costs more, and where no share is known. `why` is a study of bypass.
    """
    costs = _costs(why, known)
    kept = list(takewhile(lambda share: is_not_worse(costs[share][1]), sorted(costs)))
    return (kept[-1], *costs[kept[-1]]) if kept else None


def _costs(why: Why, known: Fits) -> dict[float, tuple[Any, Difference]]:
    """By the share of tokens that is left to the backbone: the value of the knob, and what it does to accuracy."""
    points = why.lines.get(ADAFUSE, {})
    found: dict[float, tuple[Any, Difference]] = {}
    for value, seeds in points.items():
        share = bypassed_share(seeds, known) if value is not None else None
        cost = paired(seeds, points[None], why.tasks) if None in points else None
        if share is not None and cost:
            found[share] = (value, cost)
    return found


def _machine_and_backbone(cell: Cell) -> str:
    """A GPU by its name, whatever the CPU."""
    where = "CPU" if cell.is_cpu else str(cell.machine["gpu"])
    return f"{where}, {model_name(cell.config)}"


def _share(value: float) -> str:
    return f"{100 * value:.0f} %"
