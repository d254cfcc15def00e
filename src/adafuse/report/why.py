"""What each knob does to accuracy, in numbers: a section for each study, a row for each value and method.

In: studies of one knob and the train records behind them. Out: the sheet `why`. Next: why_figure.py.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from adafuse.report.accuracy import Seeds, heading, is_pilot, paired, trainable
from adafuse.report.accuracy_table import score_row, score_text
from adafuse.report.cells import caption, short_name
from adafuse.report.fits import Fits, behind, validation_loss
from adafuse.report.knobs import BYPASS
from adafuse.report.routing import ALL, uses
from adafuse.report.sheet import Columns, Row, Section, Sheet, nothing
from adafuse.report.text import GAP, digits, points_text, share_text
from adafuse.report.variants import ADAFUSE, TWIN
from adafuse.report.why_studies import Why

ABOUT = (
    "One setting varied, all else equal: accuracy in per cent ± one standard error (over seeds; over items for one "
    "seed), and the difference to the value that most records share, and of one gate for all layers to a gate per "
    "layer at the same value; both paired per item, with 95 % intervals, over the seeds that both have (an average "
    "is of all of a row's seeds), where the items are the same. Left alone, effective experts and entropy are those of "
    "table routing. The figures why_* show the averages."
)
EXPERIMENTS = ", ".join(
    f"experiment={name}"
    for name in ("gate_input", "expert_count", "top_k", "rank", "balance", "bypass", "difficulty")
)


def why_table(found: list[Why], known: Fits) -> Sheet:
    """A section for each study."""
    sections = [_section(why, known) for why in found]
    reason = f"no two evaluations differ in one setting alone: {EXPERIMENTS}"
    return Sheet("why", "Why: one setting at a time", ABOUT, sections or [nothing(reason)])


def value_text(why: Why, value: Any) -> str:
    """As the axis of the figure says it too."""
    if value is None:
        return "no bypass" if why.knob.name == BYPASS else GAP
    return f"{value:g}" if isinstance(value, float) else str(value)


def source(why: Why) -> str:
    """What the study is about, and whether it chose a setting on a seed that no study counts."""
    return heading(why.cell) + (" · pilot seed" if is_pilot(why.records[0]) else "")


def bypassed_share(seeds: Seeds, known: Fits) -> float | None:
    """The share of tokens that the routers behind these records left to the backbone alone."""
    return _use(seeds, known).get("bypassed")


def router_entropy(seeds: Seeds, known: Fits) -> float | None:
    """How soft the gates of the routers behind these records are: the mean entropy over all experts, in nats."""
    return _use(seeds, known).get("entropy_nats")


def _section(why: Why, known: Fits) -> Section:
    columns: Columns = {why.knob.words: lambda row: row["shown"], "method": lambda row: row["method"]}
    columns["trainable (M)"] = lambda row: GAP if row["trainable"] is None else digits(row["trainable"] / 1e6)
    for task in [*why.tasks, "average"]:
        columns[task] = partial(score_text, task=task)
    columns |= {
        f"minus {value_text(why, why.default)} [95 %]": lambda row: (
            GAP if row["value"] == why.default else points_text(row["to_default"])
        ),
        "minus a gate per layer [95 %]": lambda row: points_text(row["to_twin"]),
        "validation loss": lambda row: digits(row["validation_loss"]),
        "left alone": lambda row: share_text(row["bypassed"]),
        "effective experts": lambda row: digits(row["effective"]),
        "router entropy, nats": lambda row: digits(row["entropy_nats"]),
        "seeds": lambda row: str(row["seeds"]),
    }
    rows = [
        _row(why, known, value, name)
        for value in why.values
        for name in why.lines
        if value in why.lines[name]
    ]
    rows += [_level(why, known, name) for name in why.levels]
    told = {name: show for name, show in columns.items() if any(show(row) != GAP for row in rows)}
    return Section(f"{why.knob.words}: {source(why)}", caption(why.cell), rows, told, _notes(why))


def _row(why: Why, known: Fits, value: Any, name: str) -> Row:
    seeds, default = why.lines[name][value], why.lines[name].get(why.default)
    row = _numbers(why, known, name, seeds) | {"value": value, "shown": value_text(why, value)}
    row["to_default"] = paired(seeds, default, why.tasks) if default else None
    twin = why.lines.get(TWIN, {}).get(value) or why.levels.get(TWIN)
    row["to_twin"] = paired(seeds, twin, why.tasks) if twin and name == ADAFUSE else None
    return row


def _level(why: Why, known: Fits, name: str) -> Row:
    """A method beside the lines, which has no such knob."""
    empty: Row = {"value": None, "shown": GAP, "to_default": None, "to_twin": None}
    return _numbers(why, known, name, why.levels[name]) | empty


def _numbers(why: Why, known: Fits, name: str, seeds: Seeds) -> Row:
    records = [record for group in seeds.values() for record in group if record.status != "unfinished"]
    row: Row = {"knob": why.knob.name, "method": name, "trainable": trainable(records)}
    row |= score_row(seeds, why.tasks) | {"validation_loss": validation_loss(behind(records, known))}
    return row | _use(seeds, known) | {"records": [short_name(record) for record in records]}


def _notes(why: Why) -> list[str]:
    """What a reader would not expect of a method of that name."""
    changed = {name: settings for name, settings in why.settings.items() if settings}
    return [
        f"Here {name} has {', '.join(f'{k}={v}' for k, v in settings.items())}, unlike its file."
        for name, settings in changed.items()
    ]


def _use(seeds: Seeds, known: Fits) -> Row:
    found = uses(behind([record for group in seeds.values() for record in group], known))
    every = next((use for use in found if use.family == ALL), None)
    return {name: every and getattr(every, name) for name in ("bypassed", "effective", "entropy_nats")}
