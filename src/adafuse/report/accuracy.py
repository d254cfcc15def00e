"""Accuracy: what each method reaches, and how far it lies from another one on the same items.

In: evaluations, and the training behind them. Out: `Measured`; and `studies`, by which routing.py finds the same rows.
Next: routing.py.

A study is one experiment on one cell. Its rows are methods, or `method (setting=value, ...)` for what the experiment
sweeps beside methods and seeds, as the overrides of its jobs name it; where adapters are evaluated through strategies
a row is a strategy and a dtype. Quantities of a row:

    accuracy.TASK, error.TASK       mean over seeds with its 95 % interval, and standard error (over items for one
                                    seed); .average is over tasks. The reason is the metric, or says why there is none
    minus.OTHER, minus.OTHER.TASK   paired difference to the row of another method, as a fraction
    rest.OTHER.TASK, later.OTHER    the same over all tasks but one; over the seeds beyond the first MIN_SEEDS
    minus.default.SETTING           to the value of a sweep that most records share
    minus.dense, minus.dense.TASK   to the unmerged adapter; differing, items: how many items have another result
    minus90.X, p.X, spread.X, items_error.X   of the difference minus.X, or X for rest and later: 90 % interval, test of
                                    equivalence, deviation between seeds, error that the items alone leave in a seed
    validation_loss, loss_minus.OTHER   nats a token on held-out items; validation_loss.RATE, best_rate and used_rate
                                    (in the study of the same cell) where learning rates were chosen
    trainable                       parameters; of the row `study` backbones (their checksums) and same_weights (as
                                    the backbone of another name)
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from adafuse.report.frames import BEFORE, Frames, Json, method_settings
from adafuse.report.measurements import CellName, Measured, Measurement, RowName
from adafuse.report.membership import coordinates
from adafuse.report.naming import ADAFUSE, BASE, KEYS, LORA, OPPONENTS, TWIN, caption, cell_key, heading, rank
from adafuse.report.rules import MARGIN, MIN_SEEDS
from adafuse.stats import Difference, equivalence, mean_interval, paired_difference

# from here on seeds chose settings: no study counts them but those that chose
PILOT_SEED = 100
PILOTS = ("difficulty", "scarce_data", "learning_rate")
OTHERS = (*OPPONENTS, "moral", "pesc", "mixlora")
# the two by which the paper's one gate stands or falls: these differences are also told task by task
ENDS = (TWIN, LORA)
DENSE = "dense"
# what makes one domain of a study of several, which together are one row
DOMAIN = ("data.families", "data.path", "suite.tasks")
JOB = ["experiment", "profile", "overrides"]
HOW = {"strategy": "evaluate_strategy", "evaluate_dtype": "evaluate_dtype", "restored": "evaluate_restore"}


@dataclass(frozen=True)
class Score:
    """One task of one evaluation; `correct` holds a value an item, or nothing if they were not kept."""

    metric: str
    value: float
    stderr: float
    n: int
    task_hash: str | None
    correct: NDArray[np.float64]


@dataclass(frozen=True)
class Evaluation:
    """One record, scores by task; `fits` are the training runs behind it, with their held-out loss or nan."""

    record: str
    config: Json
    scores: dict[str, Score]
    fits: dict[str, float]
    backbone: str | None
    trainable: float
    why_none: str


@dataclass(frozen=True)
class Row:
    """A method at one point of a sweep, with its evaluations by seed, one a domain."""

    experiment: str
    cell: str
    name: str
    method: str
    at: Json
    seeds: dict[int, tuple[Evaluation, ...]]

    @property
    def every(self) -> list[Evaluation]:
        """All evaluations."""
        return [one for seed in self.seeds.values() for one in seed]

    @property
    def fits(self) -> dict[str, float]:
        """All training runs."""
        return {fit: loss for one in self.every for fit, loss in one.fits.items()}

    def scores(self, seed: int) -> dict[str, Score]:
        """The scores of one seed, over its domains."""
        return {task: score for one in reversed(self.seeds[seed]) for task, score in one.scores.items()}

    def number(self, quantity: str, value: float = math.nan, *rest: Any, **more: Any) -> Measurement:
        """One number of this row; without other records that of all its evaluations."""
        more.setdefault("records", tuple(one.record for one in self.every))
        return Measurement(self.experiment, self.cell, self.name, quantity, value, *rest, **more)


@dataclass(frozen=True)
class Axis:
    """A setting that varies in an experiment: its dotted path, its name in rows, and whether most jobs name it, so that
    the experiment sweeps it; what only some jobs name is their own.
    """

    path: str
    name: str
    swept: bool

    @property
    def column(self) -> str:
        """Of `Frames.runs`, where there is one."""
        return "data" if self.path == "data.path" else self.path.rpartition(".")[2]


@dataclass(frozen=True)
class Study:
    """One experiment on one cell, rows in the order of tables; `default` is the value of each setting that it sweeps
    which most evaluations of this machine and backbone share.
    """

    default: Json
    rows: list[Row]

    @property
    def every(self) -> list[Evaluation]:
        """All evaluations, those at the default first: by the first of them the study is called."""
        return [one for row in sorted(self.rows, key=lambda row: row.at != self.default) for one in row.every]

    def find(self, method: str, at: Json) -> Row | None:
        """The row of a method at a point."""
        return next((row for row in self.rows if row.method == method and row.at == at), None)


# by cell and method the row of a study without a sweep; of the unmerged adapter by method and dtype
Plain = dict[tuple[str, str], Row]


def measure(found: Frames) -> Measured:
    """Every study of accuracy, and the learning rates."""
    every = studies(found)
    plain = _plain(every)
    measured = _learning_rates(found, plain)
    for study in every:
        tasks = list(dict.fromkeys(task for one in study.every for task in one.scores))
        records = [one.record for one in study.every]
        measured.cells.append(
            _cell_name(study.rows[0].experiment, study.rows[0].cell, found.runs.loc[records])
        )
        measured.values += _backbones(study, every)
        for row in study.rows:
            measured.values += [
                *_scores(row, tasks),
                *_training(row),
                *_differences(study, row, plain, tasks),
            ]
            what = (
                row.method,
                str(setting(row.every[0].config, "method.routing")),
                row.at.get("strategy", ""),
            )
            measured.rows.append(RowName(row.experiment, row.cell, row.name, row.name, *what))
    return measured


# -- which evaluations belong together


@lru_cache(maxsize=1)
def studies(found: Frames) -> list[Study]:
    """Every experiment whose members are evaluations, cell by cell."""
    known = _evaluations(found)
    members = _counted(found.members[found.members["task"] == "evaluate"])
    own = found.runs[(found.runs["task"] == "evaluate") & (found.runs["method"] != BASE)]
    near = dict(list(own[_is_as_trained(own)].groupby(["machine", "model"])["config"]))
    whole = []
    for _, group in members.groupby(["experiment", "folder"]):
        axes = _axes(group)
        swept = {axis.column for axis in axes if axis.swept}
        key = ["machine", "model", *(name for name in KEYS["evaluate"] if name not in swept)]
        told = [axis for axis in axes if axis.swept or axis.column not in KEYS["evaluate"]]
        if any(setting(config, "data.name") == "domain" for config in group["config"]):
            told = [axis for axis in told if axis.path not in DOMAIN]
        for (machine, model, *_), cell in group.groupby(key, dropna=False):
            rows = _rows(cell, cell_key(cell.iloc[0], swept), told, known)
            common: Iterable[Json] = near.get((machine, model), [])
            whole.append(Study({axis.name: _most(common, axis, rows) for axis in told if axis.swept}, rows))
    return whole


def _counted(members: pd.DataFrame) -> pd.DataFrame:
    """Without the seeds on which settings were chosen, except where that was done."""
    return members[(members["seed"] < PILOT_SEED) | members["experiment"].isin(PILOTS)]


def _axes(group: pd.DataFrame) -> list[Axis]:
    """The settings that vary within one method, as the overrides of jobs name them."""
    jobs = [coordinates(overrides) for overrides in group["overrides"].unique()]
    varied = []
    for path in sorted({path for job in jobs for path in job} - {"method", "task"}):
        values = group["config"].map(partial(setting, path=path))
        # a whole group of settings, a backbone say, is in the cell's own name
        whole = values.map(lambda value: isinstance(value, dict)).any()
        if not whole and (values.map(str).groupby(group["method"]).nunique() > 1).any():
            varied.append(path)
    words = [path.rpartition(".")[2] for path in varied]
    return [
        Axis(path, word if words.count(word) == 1 else path, 2 * sum(path in job for job in jobs) > len(jobs))
        for path, word in zip(varied, words, strict=True)
    ]


def _rows(members: pd.DataFrame, cell: str, axes: list[Axis], known: dict[str, Evaluation]) -> list[Row]:
    """The rows of one cell, by point and then by method."""
    rows: dict[str, Row] = {}
    through = not _is_as_trained(members).all()
    columns = ["experiment", "method", "seed", "record", "overrides", *HOW]
    for run in members.sort_values("name")[columns].to_dict("records"):
        own, job = known[run["record"]], coordinates(run["overrides"])
        at = {axis.name: setting(own.config, axis.path) for axis in axes if axis.swept or axis.path in job}
        name = f"{run['method']} ({', '.join(f'{key}={value}' for key, value in at.items())})"
        if through:
            at = {name: run[name] for name in HOW}
            name = (
                f"{run['strategy']} {run['evaluate_dtype']} ({'' if run['restored'] else 'restored=False'})"
            )
        name = name.removesuffix(" ()")
        row = rows.setdefault(name, Row(run["experiment"], cell, name, str(run["method"]), at, {}))
        row.seeds[run["seed"]] = (*row.seeds.get(run["seed"], ()), own)
    return sorted(rows.values(), key=lambda row: ([*map(_order, row.at.values())], rank(row.name)))


def _most(configs: Iterable[Json], axis: Axis, rows: list[Row]) -> Any:
    """The value of an axis that most of `configs` have; the first of several."""
    count = Counter(str(setting(config, axis.path)) for config in configs)
    values = sorted((row.at[axis.name] for row in rows if axis.name in row.at), key=_order)
    return max(values, key=lambda value: count[str(value)], default=None)


def _is_as_trained(runs: pd.DataFrame) -> pd.Series:
    """True for the unmerged adapter in the precision of its training."""
    return (runs[list(HOW)] == [BEFORE[name] for name in HOW.values()]).all(axis=1)


def setting(config: Json, path: str) -> Any:
    """One setting of a configuration by its dotted name; None if it has none."""
    value: Any = config
    for part in path.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, words after them."""
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))


def _plain(every: Iterable[Study]) -> Plain:
    """The rows that those of a sweep are held against; of several that with most seeds."""
    found: Plain = {}
    for row in (row for study in every for row in study.rows):
        dense = row.at.get("strategy") == DENSE
        key = (row.cell, f"{row.method} {row.at['evaluate_dtype']}" if dense else row.method)
        if (dense or not row.at) and (key not in found or len(found[key].seeds) < len(row.seeds)):
            found[key] = row
    return found


# -- what single records say


def of_task(found: Frames, kind: str, task: str) -> pd.DataFrame:
    """The lines of one kind in the records of one task."""
    lines = found.lines(kind)
    return lines[lines["record"].map(found.runs["task"]) == task]


def _evaluations(found: Frames) -> dict[str, Evaluation]:
    """Every evaluation by its hash; the training behind it is that of the same job."""
    members = found.members[[*JOB, "task", "record"]]
    jobs = members[members["task"] == "evaluate"].merge(members[members["task"] == "train"], on=JOB)
    scores, losses = _scores_by_record(found), _losses(found)
    fits: dict[str, dict[str, float]] = {}
    for record, fit in zip(jobs["record_x"], jobs["record_y"], strict=True):
        # a job whose settings have changed since then has the fits of both
        one, two = (
            method_settings(found.records[name].run["config"].get("method") or {}) for name in (record, fit)
        )
        if one == two:
            fits.setdefault(record, {})[fit] = losses.get(fit, math.nan)
    known = {}
    for record, run in found.records.items():
        if run.run["task"] != "evaluate":
            continue
        first = {line["kind"]: line for line in reversed(run.lines) if run.status != "unfinished"}
        why = f"error: {first['error']['message']}" if "error" in first else "not in the record"
        known[record] = Evaluation(
            record,
            run.run["config"],
            scores.get(record, {}),
            fits.get(record, {}),
            first.get("backbone", {}).get("sha256"),
            first.get("parameters", {}).get("trainable", math.nan),
            why if first else "unfinished record: run the same command again",
        )
    return known


def _losses(found: Frames) -> dict[str, float]:
    """The held-out loss of each training run, in nats a token."""
    lines = of_task(found, "metric", "train").query("metric == 'loss'")
    return {str(record): loss for record, loss in lines.groupby("record")["value"].mean().items()}


def _scores_by_record(found: Frames) -> dict[str, dict[str, Score]]:
    """By evaluation and task the first metric, the suite's own choice; a task over the user's own files is named after
    their folder.
    """
    key = ["record", "suite_task", "metric"]
    lines = of_task(found, "metric", "evaluate").drop_duplicates(["record", "suite_task"])
    lines = lines.merge(found.lines("items")[[*key, "correct"]], on=key, how="left")
    scores: dict[str, dict[str, Score]] = {}
    for line in lines.to_dict("records"):
        folder = setting(found.records[line["record"]].run["config"], "data.path")
        task = Path(folder).name if folder and line["suite_task"].startswith("local") else line["suite_task"]
        correct = np.asarray(line["correct"] if isinstance(line["correct"], list) else [], float)
        value, stderr = (
            math.nan if line[name] is None else float(line[name]) for name in ("value", "stderr")
        )
        score = Score(line["metric"], value, stderr, line["n"], line.get("task_hash"), correct)
        scores.setdefault(line["record"], {})[task] = score
    return scores


# -- the numbers of one row


def _scores(row: Row, tasks: list[str]) -> Iterator[Measurement]:
    by_seed = [own for seed in row.seeds if (own := row.scores(seed))]
    for task in tasks:
        known = [own[task] for own in by_seed if task in own]
        how = f"{known[0].metric}, {known[0].n} items" if known else ""
        yield from _mean(row, task, [own.value for own in known], [own.stderr for own in known], how)
    whole = [[own[task] for task in tasks] for own in by_seed if tasks and own.keys() >= set(tasks)]
    means = [float(np.mean([score.value for score in own])) for own in whole]
    errors = [float(np.linalg.norm([score.stderr for score in own])) / len(tasks) for own in whole]
    yield from _mean(row, "average", means, errors)
    if not whole:
        yield row.number("accuracy.average", reason=row.every[0].why_none)


def _mean(
    row: Row, task: str, values: list[float], errors: list[float], how: str = ""
) -> Iterator[Measurement]:
    """Mean and interval over seeds, and standard error: over items for one seed, over seeds for more."""
    if values and not math.isnan(sum(values)):
        count = len(values)
        error = float(np.std(values, ddof=1)) / math.sqrt(count) if count > 1 else errors[0]
        yield row.number(f"accuracy.{task}", *_interval(values), count, how)
        yield row.number(f"error.{task}", error, n=count)


def _interval(values: list[float]) -> tuple[float, float, float]:
    return mean_interval(values) if len(values) > 1 else (values[0], math.nan, math.nan)


def _training(row: Row) -> Iterator[Measurement]:
    """What training left beside accuracy."""
    sizes = [one.trainable for one in row.every if not math.isnan(one.trainable)]
    if sizes:
        yield row.number("trainable", sizes[0])
    losses = {fit: loss for fit, loss in row.fits.items() if not math.isnan(loss)}
    if losses:
        yield row.number(
            "validation_loss", float(np.mean([*losses.values()])), n=len(losses), records=tuple(losses)
        )


# -- how far one row lies from another


def _differences(study: Study, row: Row, plain: Plain, tasks: list[str]) -> Iterator[Measurement]:
    """Everything that a row is held against: other methods, the defaults of a sweep, the unmerged adapter."""
    if "strategy" in row.at:
        dense = plain.get((row.cell, f"{row.method} {row.at['evaluate_dtype']}"))
        if dense and dense.at != row.at:
            yield from _to_dense(row, dense, tasks)
        return
    for name in OTHERS if row.method == ADAFUSE else (LORA,) if row.method != LORA else ():
        other = opponent(study, row, name, plain)
        if other:
            yield from _to_other(row, other, tasks)
        elif row.method == ADAFUSE and not row.at:
            yield row.number(f"minus.{name}", reason=f"not run for {name}")
    home = plain.get((row.cell, row.method))
    if row.at and home and not {id(one) for one in home.every} & {id(one) for one in study.every}:
        yield from _difference(f"minus.{row.method}", row, home, tasks)
    for axis, value in study.default.items():
        point = study.find(row.method, row.at | {axis: value})
        if point and point != row:
            yield from _difference(f"minus.default.{axis}", row, point, tasks, tested=False)


def opponent(study: Study, row: Row, other: str, plain: Plain) -> Row | None:
    """The row of another method at the same point; where the experiment has none, that method's own row on the same
    cell in an experiment without a sweep (for gate_input in same_tokens).
    """
    return study.find(other, row.at) or plain.get((row.cell, other))


def paired(left: Row, right: Row, tasks: list[str]) -> tuple[Difference, tuple[str, ...]] | None:
    """Accuracy of `left` minus that of `right`, and the records behind it; a seed counts if both have the same items of
    all `tasks` and stand on one backbone, as far as they name it. None without any.
    """
    sides: tuple[list[list[ArrayLike]], list[list[ArrayLike]]] = ([], [])
    records: list[str] = []
    for seed in _seeds_on_one_backbone(left, right) if tasks else []:
        both = [row.scores(seed) for row in (left, right)]
        if all(_same_items(*(own.get(task) for own in both)) for task in tasks):
            for side, own in zip(sides, both, strict=True):
                side.append([own[task].correct for task in tasks])
            records += [one.record for row in (left, right) for one in row.seeds[seed]]
    return (paired_difference(*sides), tuple(records)) if records else None


def _seeds_on_one_backbone(left: Row, right: Row) -> list[int]:
    """The seeds that both have, where their records name no two backbones."""
    seeds = sorted(left.seeds.keys() & right.seeds.keys())
    return [seed for seed in seeds if len(_under([*left.seeds[seed], *right.seeds[seed]])) < 2]


def _under(every: Iterable[Evaluation]) -> set[str]:
    return {one.backbone for one in every if one.backbone}


def _same_items(one: Score | None, two: Score | None) -> bool:
    """True if both kept the results of the same items: as many, under the same hash where they have one."""
    if one is None or two is None:
        return False
    return 0 < len(one.correct) == len(two.correct) and one.task_hash == two.task_hash


def _to_other(row: Row, other: Row, tasks: list[str]) -> Iterator[Measurement]:
    name = other.method
    yield from _difference(f"minus.{name}", row, other, tasks)
    # run because of what the first ones showed, but independent of them
    one, two = (replace(own, seeds=dict(sorted(own.seeds.items())[MIN_SEEDS:])) for own in (row, other))
    yield from _difference(f"later.{name}", one, two, tasks)
    yield from _to_loss(row, other)
    if row.method != ADAFUSE or row.at or name not in ENDS or len(tasks) < 2:
        return
    for task in tasks:
        yield from _difference(f"minus.{name}.{task}", row, other, [task], tested=False)
        yield from _difference(f"rest.{name}.{task}", row, other, [own for own in tasks if own != task])


def _to_dense(row: Row, dense: Row, tasks: list[str]) -> Iterator[Measurement]:
    """The difference to the unmerged adapter, and how many of the common items have another result."""
    for suffix, own in {"": tasks, **{f".{task}": [task] for task in tasks}}.items():
        yield from _difference(f"minus.{DENSE}{suffix}", row, dense, own, tested=False)
        other = [
            one.correct != two.correct
            for seed in _seeds_on_one_backbone(row, dense)
            for one, two in [(row.scores(seed).get(task), dense.scores(seed).get(task)) for task in own]
            if one and two and _same_items(one, two)
        ]
        if other:
            yield row.number(f"differing{suffix}", sum(int(np.sum(one)) for one in other))
            yield row.number(f"items{suffix}", sum(np.size(one) for one in other))


def _difference(
    quantity: str, row: Row, other: Row, tasks: list[str], tested: bool = True
) -> Iterator[Measurement]:
    found = paired(row, other, tasks)
    if found is None:
        return
    own, records = found
    number, key = partial(row.number, n=own.n_seeds, records=records), quantity.removeprefix("minus.")
    yield number(quantity, own.value, own.low, own.high, reason=own.method)
    if tested:
        yield number(f"items_error.{key}", own.items_error)
    if tested and own.n_seeds > 1:
        test = equivalence(own.by_seed, MARGIN / 100)
        yield number(f"minus90.{key}", own.value, test.low, test.high)
        yield number(f"p.{key}", test.p)
        yield number(f"spread.{key}", own.spread)


def _to_loss(row: Row, other: Row) -> Iterator[Measurement]:
    """Held-out loss of `row` minus that of `other`, better downwards: a value a seed, the mean over its domains; a seed
    counts if both learnt the same domains on one backbone and every loss is known.
    """
    values, records = [], []
    for seed in _seeds_on_one_backbone(row, other):
        one, two = ({_learnt(own): _loss(own) for own in side.seeds[seed]} for side in (row, other))
        lost = float(np.mean([one[name] - two.get(name, math.nan) for name in one]))
        if one.keys() == two.keys() and not math.isnan(lost):
            values.append(lost)
            records += [fit for side in (row, other) for own in side.seeds[seed] for fit in own.fits]
    if values:
        reason = f"t over {len(values)} seeds" if len(values) > 1 else "one seed: no interval"
        number = partial(row.number, n=len(values), reason=reason, records=tuple(records))
        yield number(f"loss_minus.{other.method}", *_interval(values))


def _learnt(own: Evaluation) -> str:
    return f"{setting(own.config, 'data.families')} {setting(own.config, 'data.path')}"


def _loss(own: Evaluation) -> float:
    return float(np.mean([*own.fits.values()])) if own.fits else math.nan


# -- what is told once a study


def _backbones(study: Study, every: Iterable[Study]) -> Iterator[Measurement]:
    """On which backbones a study stands, and under which other name their weights were trained too."""
    own = _under(study.every)
    head = replace(study.rows[0], name="study")
    if own:
        yield head.number("backbones", len(own), reason=" ".join(sorted(own)))
    names = {
        str(setting(one.config, "model.name"))
        for other in every
        for one in other.every
        if one.backbone in own
    }
    for name in sorted(names - {str(setting(one.config, "model.name")) for one in study.every}):
        yield head.number("same_weights", reason=name)


def _cell_name(experiment: str, key: str, runs: pd.DataFrame) -> CellName:
    run = runs.iloc[0]
    return CellName(experiment, key, heading(run), caption(runs), run["machine"], run["machine"] == "CPU")


def learning_rate(config: Json) -> float:
    """The rate at which a method was trained: the stage's, times the method's own factor."""
    rate, factor = setting(config, "train.learning_rate"), setting(config, "method.learning_rate_factor")
    # a product of decimals: 3e-3 times 0.1 is no round number
    return float(f"{(rate or 0.0) * (1.0 if factor is None else factor):.6g}")


def _learning_rates(found: Frames, plain: Plain) -> Measured:
    """Of experiments that only train: held-out loss by rate, the best rate, and that of the study on the same cell."""
    measured = Measured()
    members = _counted(found.members[found.members["task"] != "pretrain"])
    alone = members.groupby("experiment")["task"].transform(lambda tasks: (tasks == "train").all())
    columns = ["experiment", "folder", "model", *KEYS["train"]]
    losses = pd.Series(_losses(found), dtype=float)
    for _, cell in members[alone].drop_duplicates(["experiment", "record"]).groupby(columns, dropna=False):
        experiment, key = str(cell["experiment"].iloc[0]), cell_key(cell.iloc[0])
        measured.cells.append(_cell_name(experiment, key, cell))
        for method in sorted(cell["method"].unique(), key=rank):
            own = cell[cell["method"] == method]
            make = partial(Measurement, experiment, key, method, records=tuple(own["record"]))
            by_rate = own["record"].map(losses).groupby(own["config"].map(learning_rate)).mean().dropna()
            measured.values += [make(f"validation_loss.{rate:g}", loss) for rate, loss in by_rate.items()]
            if len(by_rate):
                measured.values.append(make("best_rate", float(by_rate.index[by_rate.argmin()])))
            used = plain.get((key, method))
            if used:
                records = tuple(one.record for one in used.every)
                measured.values.append(
                    make("used_rate", learning_rate(used.every[0].config), records=records)
                )
            measured.rows.append(RowName(experiment, key, method, method, method))
    return measured
