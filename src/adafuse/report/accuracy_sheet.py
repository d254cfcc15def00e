"""Accuracy in one place: what AdaFuse gains and loses, what carries it, whether routing pays, and whether layers agree.

In: studies, why studies, routers and the training runs behind them. Out: the sheet `accuracy`. Next: readme.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from adafuse.report.accuracy import Seeds, Study, difference, enough, extremes, paired, without_one
from adafuse.report.agreement import agreements
from adafuse.report.cells import Cell, short_name
from adafuse.report.findings_why import changed, over_setting, place, studied
from adafuse.report.fits import Fits
from adafuse.report.held_out import loss_difference, loss_text
from adafuse.report.on_par import equivalent, verdict_word
from adafuse.report.sheet import Columns, Row, Section, Sheet, nothing
from adafuse.report.text import GAP, points_text, share_text
from adafuse.report.trained import Trained
from adafuse.report.variants import ADAFUSE, LORA, OPPONENTS, TWIN, variants
from adafuse.report.verdicts import MARGIN, MIN_SEEDS
from adafuse.report.why import value_text
from adafuse.report.why_studies import Why
from adafuse.stats import SIZE, Difference

TITLE = "Accuracy in one place"
ABOUT = (
    "Differences in points of accuracy, mean over tasks, paired per item, with 95 % intervals over seeds. On par means "
    f"within ± {MARGIN:g} points, not worse above -{MARGIN:g}, each by a test at {100 * SIZE:.0f} %; no difference "
    f"stands on fewer than {MIN_SEEDS} seeds. Later seeds are those after the first {MIN_SEEDS}: run because of what "
    "those showed, but independent of them, so that alone they need no correction. Without one task: the lowest and "
    "the highest of the means over all tasks but one, chosen by their result and so no tests. Of a held-out loss, the "
    "lower is the better."
)
DIFFERENCES = "AdaFuse minus what it is compared with"
CARRIED = "What the mean over tasks hides, and held-out loss"
ROUTING = "Every routed method minus plain LoRA"
SETTINGS = "AdaFuse minus a gate per layer, over one setting"
AGREEMENT = "How much of one layer's choice another's tells"
INFORMATION = (
    "Of what there is to know of the other's choice, with a gate per layer: normalised mutual information."
)
IN_BRACKETS = "In brackets: the task that is left out, or that stands at this end."
TWIN_IS = f"{TWIN}: AdaFuse's experts with a gate per layer."
REASON = f"no {MIN_SEEDS} seeds of AdaFuse and what it is compared with: experiment=table2, table3 or table4"
# of those that AdaFuse is held against, the two by which the paper's one gate stands or falls
ENDS = (TWIN, LORA)
ROUTED = ("mola", "moral", "pesc", "mixlora", ADAFUSE, TWIN)


def sheet(trained: Trained) -> Sheet:
    """Five sections, each where it has rows; without any, the reason."""
    decided = [study for study in trained.studies if any(_compared(study).values())]
    found = [
        Section(DIFFERENCES, "", [_differences(study) for study in decided], _difference_columns()),
        Section(CARRIED, IN_BRACKETS, [_carried(s, trained.fits) for s in decided], _carried_columns()),
        Section(ROUTING, TWIN_IS, list(_some(map(_routed, trained.studies))), _routed_columns()),
        Section(SETTINGS, "", list(_some(map(_over, trained.whys))), _over_columns()),
        _agreement_section(trained.routing),
    ]
    told = [section for section in found if section.rows] or [nothing(REASON)]
    return Sheet("accuracy", TITLE, ABOUT, told)


def later_seeds(study: Study, other: str) -> Difference | None:
    """AdaFuse minus another over the seeds beyond the least that may decide."""
    one, two = (dict(sorted(study.variants.get(name, {}).items())[MIN_SEEDS:]) for name in (ADAFUSE, other))
    return paired(one, two, study.tasks)


def _compared(study: Study) -> dict[str, Difference | None]:
    return {other: enough(difference(study, ADAFUSE, other)) for other in OPPONENTS}


def _differences(study: Study) -> Row:
    found = _compared(study)
    row: Row = {"study": studied(study), "seeds": _most(found.values())}
    for other, own in found.items():
        row |= _judged(f"minus_{other}", own)
    for other in OPPONENTS:
        row |= _judged(f"later_minus_{other}", enough(later_seeds(study, other)))
    return row | {"records": _files(study.variants, [ADAFUSE, *(name for name, own in found.items() if own)])}


def _difference_columns() -> Columns:
    columns: Columns = {"study": lambda row: row["study"], "seeds": lambda row: str(row["seeds"])}
    for other, words in OPPONENTS.items():
        columns[f"minus {words}"] = partial(_judged_text, key=f"minus_{other}")
    for other in ENDS:
        name = f"later seeds alone: minus {OPPONENTS[other]}"
        columns[name] = partial(_judged_text, key=f"later_minus_{other}", left=MIN_SEEDS)
    return columns


def _carried(study: Study, known: Fits) -> Row:
    """What is left without one task, the two ends by task, and the loss by which learning rates were
    chosen, which may say otherwise than accuracy does.
    """
    row: Row = {"study": studied(study), "seeds": _most(_compared(study).values())}
    for other in ENDS:
        rest = without_one(study, ADAFUSE, other)
        for name, end in zip(
            ("least", "most"), (rest[0], rest[-1]) if rest else [(None, None)] * 2, strict=True
        ):
            row[f"rest_{name}_minus_{other}_task"] = end[0]
            row |= _judged(f"rest_{name}_minus_{other}", enough(end[1]))
        ends = extremes(study, ADAFUSE, other) or []
        whole = ends and all(enough(own) for _, own in ends)
        for name, end in zip(("least", "most"), ends if whole else [(None, None)] * 2, strict=True):
            row[f"{name}_minus_{other}_task"], row[f"{name}_minus_{other}"] = end
    for other in ENDS:
        one, two = (study.variants.get(name, {}) for name in (ADAFUSE, other))
        row[f"loss_minus_{other}"] = enough(loss_difference(one, two, known))
    return row | {"records": _files(study.variants, [ADAFUSE, *ENDS])}


def _carried_columns() -> Columns:
    columns: Columns = {"study": lambda row: row["study"]}
    for other in ENDS:
        columns[f"minus {OPPONENTS[other]}, without one task"] = partial(_rest_text, other=other)
    for other in ENDS:
        columns[f"furthest tasks to {OPPONENTS[other]}"] = partial(_ends_text, other=other)
    for other in ENDS:
        columns[f"held-out loss, nats: minus {OPPONENTS[other]}"] = partial(_loss, key=f"loss_minus_{other}")
    return columns


def _routed(study: Study) -> Row | None:
    """Whether routing pays at all: only where every routed method was run, or a column would choose its studies."""
    found = {name: enough(difference(study, name, LORA)) for name in ROUTED}
    if not all(found.values()):
        return None
    row: Row = {"study": studied(study), "seeds": _most(found.values())} | found
    return row | {"records": _files(study.variants, [LORA, *ROUTED])}


def _routed_columns() -> Columns:
    columns: Columns = {"study": lambda row: row["study"], "seeds": lambda row: str(row["seeds"])}
    for name in ROUTED:
        columns[name] = partial(_points, key=name)
    return columns


def _over(why: Why) -> Row | None:
    """How far AdaFuse's distance to its twin hangs on a setting that both have."""
    known = {value: own for value, own in over_setting(why).items() if enough(own)}
    if len(known) < 2:
        return None
    row: Row = {"setting": why.knob.words, "where": place(why.cell)}
    row["unlike"] = changed(why, [ADAFUSE, TWIN]) or None
    row["_at"] = {value_text(why, value): own for value, own in known.items()}
    row |= {f"at_{value}": own for value, own in row["_at"].items()}
    seeds = [why.lines[name][value] for name in (ADAFUSE, TWIN) for value in known]
    return row | {"records": [file for own in seeds for file in _names(own)]}


def _over_columns() -> Columns:
    return {
        "setting": lambda row: row["setting"],
        "where": lambda row: row["where"],
        "points at each value": lambda row: _at_text(row["_at"]),
        "unlike the methods' files": lambda row: row["unlike"] or GAP,
    }


def _agreement_section(cells: Sequence[Cell]) -> Section:
    """Whether layers agree, as one gate for all of them supposes."""
    columns: Columns = {"where": lambda row: row["where"]}
    columns["between layers"] = lambda row: share_text(row["between_layers"])
    columns["within a block"] = lambda row: share_text(row["within_block"])
    return Section(AGREEMENT, INFORMATION, list(_some(map(_agreement, cells))), columns)


def _agreement(cell: Cell) -> Row | None:
    one = next((found for found in agreements(cell) if found.method == TWIN), None)
    if one is None:
        return None
    row: Row = {"where": place(cell), "between_layers": one.mean, "within_block": one.within_blocks}
    return row | {"records": [short_name(r) for r in variants(cell.finished)[TWIN] if r.of("agreement")]}


def _judged(key: str, found: Difference | None) -> Row:
    """A difference with its verdict, and the p of equivalence for programs."""
    tested = equivalent(found) if found else None
    return {
        key: found,
        f"{key}_verdict": verdict_word(found) if found else None,
        f"{key}_p_equivalence": tested and tested.p,
    }


def _judged_text(row: Row, key: str, left: int = 0) -> str:
    if row[key] is None:
        return GAP
    return f"{points_text(row[key])} {row[f'{key}_verdict']}{_unlike_row(row, key, left)}"


def _rest_text(row: Row, other: str) -> str:
    """The lowest and the highest mean without one task, and which task that is."""
    keys = [f"rest_{name}_minus_{other}" for name in ("least", "most")]
    if any(row[key] is None for key in keys):
        return GAP
    return " to ".join(f"{_judged_text(row, key)} ({row[f'{key}_task']})" for key in keys)


def _points(row: Row, key: str) -> str:
    return points_text(row[key]) + _unlike_row(row, key)


def _loss(row: Row, key: str) -> str:
    return GAP if row[key] is None else loss_text(row[key]) + _unlike_row(row, key)


def _unlike_row(row: Row, key: str, left: int = 0) -> str:
    """How many seeds a difference has, where they are not those of its row."""
    count = row[key].n_seeds
    return "" if count == row["seeds"] - left else f" ({count} seeds)"


def _ends_text(row: Row, other: str) -> str:
    if row[f"least_minus_{other}"] is None:
        return GAP
    keys = [f"{name}_minus_{other}" for name in ("least", "most")]
    return " to ".join(f"{points_text(row[key])} ({row[f'{key}_task']})" for key in keys)


def _at_text(points: dict[str, Difference]) -> str:
    """Each value's difference; how many seeds it has once for all, or beside each."""
    counts = {own.n_seeds for own in points.values()}
    if len(counts) == 1:
        said = "; ".join(f"{value}: {points_text(own)}" for value, own in points.items())
        return f"{said}; {counts.pop()} seeds each"
    return "; ".join(f"{value}: {points_text(own)} ({own.n_seeds} seeds)" for value, own in points.items())


def _most(found: Iterable[Difference | None]) -> int:
    return max(own.n_seeds for own in found if own)


def _some(rows: Iterable[Row | None]) -> Iterator[Row]:
    return (row for row in rows if row is not None)


def _files(by_variant: dict[str, Seeds], names: Iterable[str]) -> list[str]:
    return [file for name in names for file in _names(by_variant.get(name, {}))]


def _names(seeds: Seeds) -> list[str]:
    return [short_name(r) for records in seeds.values() for r in records if r.status != "unfinished"]
