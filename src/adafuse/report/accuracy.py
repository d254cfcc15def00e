"""Accuracy: what each method reaches, and how far it lies from another one on the same items.

In: evaluations, and the training behind them. Out: `Measured`; and `studies`, by which routing.py finds the same rows.
A study is one experiment on one cell. Its rows are methods, or `method (setting=value, ...)` for what the experiment
sweeps beside methods and seeds, as the overrides of its jobs name it; where adapters are evaluated through strategies
a row is a strategy and a dtype. Next: routing.py. Quantities of a row, differences as fractions:

    accuracy.TASK, error.TASK   mean over seeds, and standard error (over items for one seed); .average is over tasks
    minus.OTHER                 paired difference to another method (.TASK: on one task), to `default.SETTING` (the
                                value of a sweep that most records share) or to `dense`, the unmerged adapter, beside
                                how many of the `items` are `differing`
    rest.OTHER.TASK             the same over all tasks but one; later.OTHER: over seeds beyond the first MIN_SEEDS
    minus90.X, p.X, spread.X    of minus.X (or X): 90 % interval, test of equivalence, deviation between seeds
    loss_minus.OTHER            of the held-out validation_loss in nats a token, which is also told by learning rate

Of a withdrawn evaluation the numbers of its wrong tasks are withdrawn, and what is made from them.
"""

from __future__ import annotations

import math
from collections import Counter
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from adafuse.report.frames import BEFORE, Frames, Json, method_settings, setting
from adafuse.report.latency import UNFINISHED, behind, measured
from adafuse.report.measurements import KEY, Measured
from adafuse.report.membership import coordinates
from adafuse.report.naming import ADAFUSE, BASE, KEYS, LORA, TWIN, cell_key, rank
from adafuse.report.rules import MARGIN, MIN_SEEDS
from adafuse.stats import equivalence, mean_interval, paired_difference

# from here on seeds chose settings: no study counts them but those that chose
PILOT_SEED = 100
PILOTS = ("difficulty", "scarce_data", "learning_rate")
OTHERS = (TWIN, LORA, "mola", "moral", "pesc", "mixlora")
# the two by which the paper's one gate stands or falls: these differences are also told task by task
ENDS = (TWIN, LORA)
# what makes one domain of a study of several, which together are one row
DOMAIN = ("data.families", "data.path", "suite.tasks")
JOB = ["experiment", "profile", "overrides"]
HOW = ["strategy", "evaluate_dtype", "restored"]
PLACE, ROW = KEY[:2], KEY[:3]
OTHER = [f"{name}_other" for name in ROW]
PAIR, FLAGS = [*ROW, "name", *OTHER], ["is_alone", "is_method"]


def measure(found: Frames) -> Measured:
    """Every study of accuracy, and the learning rates."""
    own = studies(found)
    scores, (rates, tried) = scored(found, own), _learning_rates(found, own)
    parts = [rates]
    if len(own):
        parts += [_accuracies(own, scores), _training(own), _differences(own, scores), _same_weights(own)]
    named = pd.concat([tried, own], ignore_index=True)
    routing = named["config"].map(partial(setting, path="method.routing"))
    named = named.assign(label=named["row"], routing=routing, strategy=named["through"])
    # a study is called after its first evaluation at the usual point
    cells = named.sort_values("is_usual", ascending=False, kind="stable").groupby(PLACE, sort=False)
    values, rows = pd.concat(parts, ignore_index=True), named.drop_duplicates(ROW)
    return measured(values, behind(named, ROW), rows, cells)


@lru_cache(maxsize=1)
def studies(found: Frames) -> pd.DataFrame:
    """Every evaluation in its row of each experiment, in the order of tables, with what `_evaluations` says of it.

    `point` is where the row stands in a sweep, `usual` by axis the point at the value that most evaluations of this
    machine and backbone share, `through` the strategy, where a study compares these.
    """
    every = _counted(found.members[found.members["task"] == "evaluate"])
    every = every.join(_evaluations(found), on="record")
    near = found.runs[(found.runs["task"] == "evaluate") & (found.runs["method"] != BASE)]
    near, studied = near[_is_as_trained(near)], [_in_rows(every.iloc[:0].assign(cell="", at=None), {})]
    for _, group in every.groupby(["experiment", "folder"]):
        names, swept, hidden = _axes(group)
        points = []
        for config, job in zip(group["config"], map(coordinates, group["overrides"]), strict=True):
            own = [path for path in names if path in swept or path in job]
            points.append({names[path]: setting(config, path) for path in own})
        group = group.assign(at=pd.Series(points, group.index))
        key = ["machine", "model", *(name for name in KEYS["evaluate"] if name not in hidden)]
        for (machine, model, *_), cell in group.groupby(key, dropna=False):
            configs, usual = near.loc[(near["machine"] == machine) & (near["model"] == model), "config"], {}
            for path in filter(names.get, swept):
                most = Counter(str(setting(config, path)) for config in configs)
                values = sorted((at[names[path]] for at in cell["at"]), key=_order)
                counts = [most[str(value)] for value in values]
                usual[names[path]] = values[counts.index(max(counts))]
            studied.append(_in_rows(cell.assign(cell=cell_key(cell.iloc[0], hidden)), usual))
    return pd.concat(studied, ignore_index=True)


def _counted(members: pd.DataFrame) -> pd.DataFrame:
    """Without the seeds on which settings were chosen, except where that was done."""
    return members[(members["seed"] < PILOT_SEED) | members["experiment"].isin(PILOTS)]


def _is_as_trained(runs: pd.DataFrame) -> pd.Series:
    """True for the unmerged adapter in the precision of its training, or in that of its backbone."""
    usual = runs[HOW] == [BEFORE[name] for name in HOW]
    usual["evaluate_dtype"] |= runs["evaluate_dtype"] == runs["dtype"]
    return usual.all(axis=1)


def _axes(group: pd.DataFrame) -> tuple[dict[str, str], list[str], set[str]]:
    """The settings that rows name, by dotted path, with their names there; those that most jobs name, so that the
    experiment sweeps them; and their columns, which have no part in a cell. What only some jobs name is their own.
    """
    jobs = [coordinates(overrides) for overrides in group["overrides"].unique()]
    varied = []
    for path in sorted({path for job in jobs for path in job} - {"method", "task"}):
        values = group["config"].map(partial(setting, path=path))
        # a whole group of settings, a backbone say, is in the cell's own name
        whole = any(isinstance(value, dict) for value in values)
        if not whole and (values.map(str).groupby(group["method"]).nunique() > 1).any():
            varied.append(path)
    swept = [path for path in varied if 2 * sum(path in job for job in jobs) > len(jobs)]
    last = {path: path.rpartition(".")[2] for path in varied}
    columns = {path: "data" if path == "data.path" else last[path] for path in varied}
    named = [path for path in varied if path in swept or columns[path] not in KEYS["evaluate"]]
    if any(setting(config, "data.name") == "domain" for config in group["config"]):
        named = [path for path in named if path not in DOMAIN]
    words = list(last.values())
    names = {path: last[path] if words.count(last[path]) == 1 else path for path in named}
    return names, swept, {columns[path] for path in swept}


def _in_rows(cell: pd.DataFrame, usual: Json) -> pd.DataFrame:
    """The evaluations of one cell in their rows, by point, method, seed and name."""
    cell = cell.sort_values("name")
    cell["point"] = cell["at"].map(_point)
    named = zip(cell["method"], cell["point"], strict=True)
    cell["row"] = [f"{method} ({point})".removesuffix(" ()") for method, point in named]
    others = [{axis: _point(at | {axis: value}) for axis, value in usual.items()} for at in cell["at"]]
    cell["usual"] = pd.Series(others, cell.index)
    cell["is_usual"], cell["through"] = cell["at"].map(usual.__eq__), ""
    if not _is_as_trained(cell).all():
        cell["through"], cell["at"] = cell["strategy"], pd.Series(cell[HOW].to_dict("records"), cell.index)
        how = cell[HOW].itertuples(index=False, name=None)
        cell["row"] = [f"{name} {dtype}" + ("" if kept else " (restored=False)") for name, dtype, kept in how]
    seen = cell.groupby(["row", "seed"], sort=False).ngroup()
    places = zip(cell["at"], cell["row"], seen, strict=True)
    keys = [([*map(_order, at.values())], rank(row), place) for at, row, place in places]
    return cell.iloc[sorted(range(len(cell)), key=keys.__getitem__)]


def _point(at: Json) -> str:
    return ", ".join(f"{name}={value}" for name, value in at.items())


def _order(value: Any) -> tuple[int, float, str]:
    """Numbers by size, words after them."""
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))


def _losses(found: Frames) -> pd.Series:
    """The held-out loss of each training run, in nats a token."""
    lines = found.lines("metric", "train")
    return lines[lines["metric"] == "loss"].astype({"value": float}).groupby("record")["value"].mean()


def _evaluations(found: Frames) -> pd.DataFrame:
    """Of each evaluation the training behind it, which is that of the same job, and what else its lines say."""
    every = found.members[[*JOB, "task", "record", "config"]]
    fits = every[every["task"] == "train"]
    jobs = every[every["task"] == "evaluate"].merge(fits, on=JOB, suffixes=("", "_fit"))
    # a job whose settings have changed since then has the fits of both
    pairs = zip(jobs["config"], jobs["config_fit"], strict=True)
    same = [method_settings(one.get("method")) == method_settings(two.get("method")) for one, two in pairs]
    jobs = jobs[np.array(same, bool)].drop_duplicates(["record", "record_fit"])
    jobs["loss"] = jobs["record_fit"].map(_losses(found))
    said = found.runs.loc[found.runs["task"] == "evaluate", ["status"]]
    said = said.join(jobs.groupby("record").agg(fits=("record_fit", tuple), losses=("loss", tuple)))
    for kind, name in {"backbone": "sha256", "parameters": "trainable", "error": "message"}.items():
        said = said.join(found.lines(kind).drop_duplicates("record").set_index("record")[name].rename(kind))
    why = said["error"].map("error: {}".format, na_action="ignore").fillna("not in the record")
    return said.assign(why=why.mask(said.pop("status") == "unfinished", UNFINISHED)).drop(columns="error")


def scored(found: Frames, own: pd.DataFrame) -> pd.DataFrame:
    """By row, seed and task the suite's own metric, and if kept each item's result, `correct`; own files by folder."""
    key = ["record", "suite_task", "metric"]
    lines = found.lines("metric", "evaluate").drop_duplicates(["record", "suite_task"])
    lines = lines.merge(found.lines("items")[[*key, "correct"]], on=key, how="left")
    kept = [np.array(items if isinstance(items, list) else [], float) for items in lines["correct"]]
    lines["correct"] = pd.Series(kept, lines.index)
    lines["task_hash"] = lines.get("task_hash", pd.Series("", lines.index)).fillna("")
    own = own.assign(nth=own.groupby(ROW)["seed"].rank("dense"))
    about = ["seed", "nth", "record", "config", "backbone", "withdrawn", "wrong"]
    lines = own[[*ROW, *about]].merge(lines, on="record")
    folders = [setting(config, "data.path") for config in lines.pop("config")]
    named = zip(lines["suite_task"], folders, strict=True)
    tasks = [Path(folder or task).name if task.startswith("local") else task for task, folder in named]
    lines["task"] = pd.Series(tasks, lines.index, dtype=object)
    asked = zip(tasks, lines.pop("wrong"), lines["withdrawn"], strict=True)
    lines["withdrawn"] = [why if task in wrong else "" for task, wrong, why in asked]
    lines = lines.drop_duplicates([*ROW, "seed", "task"]).astype({"value": float, "stderr": float})
    lines["tasks"] = lines.groupby(PLACE)["task"].transform("nunique")
    # tasks in one order in all rows of a study
    return lines.iloc[lines.groupby([*PLACE, "task"], sort=False).ngroup().argsort(kind="stable")]


def _accuracies(own: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Means and intervals over seeds, and standard errors: over items for one seed, over seeds for more."""
    without = own.drop_duplicates(ROW).rename(columns={"why": "reason"}).assign(quantity="accuracy.average")
    without = without[[*KEY, "reason"]].set_index(ROW)
    if scores.empty:
        return without.reset_index()
    size = scores.groupby([*ROW, "seed"])["task"].transform("size")
    whole = scores[size == scores["tasks"]].groupby([*ROW, "seed"], sort=False)
    error = whole["stderr"].agg(lambda own: float(np.linalg.norm(own) / len(own)))
    average = whole[["value"]].mean().assign(stderr=error, task="average", reason="")
    average = average.assign(withdrawn=whole["withdrawn"].max()).reset_index()
    how = [f"{metric}, {n} items" for metric, n in zip(scores["metric"], scores["n"], strict=True)]
    by = pd.concat([scores.assign(reason=how), average]).groupby([*ROW, "task"], sort=False)
    first: Any = {"error": ("stderr", "first"), "reason": ("reason", "first")}
    found: Any = by.agg(values=("value", list), withdrawn=("withdrawn", "max"), **first)
    found = found[[not math.isnan(sum(values)) for values in found["values"]]].reset_index()
    ends = [mean_interval(own) if len(own) > 1 else (own[0], math.nan, math.nan) for own in found["values"]]
    found[["value", "low", "high"]] = np.reshape(ends, (-1, 3))
    found["n"] = found["values"].map(len)
    error = (found["values"].map(np.std) / (found["n"] - 1) ** 0.5).where(found["n"] > 1, found["error"])
    errors = found[[*ROW, "n", "withdrawn"]].assign(
        quantity=found["task"].map("error.{}".format), value=error
    )
    without = without.drop(pd.MultiIndex.from_frame(average[ROW]).unique()).reset_index()
    return pd.concat([found.assign(quantity=found["task"].map("accuracy.{}".format)), errors, without])


def _training(own: pd.DataFrame) -> pd.DataFrame:
    """What training left beside accuracy."""
    sizes = own.dropna(subset="parameters").drop_duplicates(ROW).rename(columns={"parameters": "value"})
    fits = own[[*ROW, "fits", "losses", "withdrawn"]].explode(["fits", "losses"])
    by = fits.dropna().drop_duplicates([*ROW, "fits"]).astype({"losses": float}).groupby(ROW, sort=False)
    of_fits: Any = {"records": ("fits", tuple), "withdrawn": ("withdrawn", "max")}
    losses = by.agg(value=("losses", "mean"), n=("losses", "size"), **of_fits).reset_index()
    sizes = sizes[[*ROW, "value"]].assign(quantity="trainable")
    return pd.concat([sizes, losses.assign(quantity="validation_loss")])


def _plain(own: pd.DataFrame) -> dict[tuple[str, ...], Any]:
    """By cell and method the row without a sweep, of several that of most seeds; of an unmerged adapter by dtype."""
    rows = own.assign(seeds=own.groupby(ROW)["seed"].transform("nunique")).drop_duplicates(ROW)
    rows = rows.sort_values("seeds", ascending=False, kind="stable")
    found: dict[tuple[str, ...], Any] = {}
    for one in list[Any](rows.itertuples()):
        if one.through == "dense" or not (one.through or one.point):
            found.setdefault((one.cell, one.method, one.through and one.evaluate_dtype), one)
    return found


def _pairs(own: pd.DataFrame) -> pd.DataFrame:
    """What each row is held against, and under which name. Another method stands at the same point; where the
    experiment has none there, it is that method's own row on the same cell in one without a sweep (for gate_input in
    same_tokens). Of the numbers of a method without a sweep (`is_alone`) some are told task by task.
    """
    rows, plain = list[Any](own.drop_duplicates(ROW).itertuples()), _plain(own)
    at = {(one.experiment, one.cell, one.method, one.point): one for one in rows if not one.through}
    inside, lines = own.groupby(PLACE)["record"].agg(set), []
    for one in rows:
        home, beside = plain.get((one.cell, one.method, one.through and one.evaluate_dtype)), dict[str, Any]()
        if one.through:
            beside["dense"] = home
        elif one.method != LORA:
            for name in OTHERS if one.method == ADAFUSE else [LORA]:
                other = at.get((one.experiment, one.cell, name, one.point))
                beside[name] = other or plain.get((one.cell, name, ""))
        if one.point and not one.through:
            if home and home.record not in inside[one.experiment, one.cell]:
                beside[one.method] = home
            for axis, point in one.usual.items():
                beside[f"default.{axis}"] = at.get((one.experiment, one.cell, one.method, point))
        is_alone = one.method == ADAFUSE and not (one.point or one.through)
        for name, other in beside.items():
            key = (other.experiment, other.cell, other.row) if other else (None, None, None)
            if key != (one.experiment, one.cell, one.row):
                is_method = name in OTHERS and name != one.method
                lines.append((one.experiment, one.cell, one.row, name, *key, is_alone, is_method))
    return pd.DataFrame(lines, columns=[*PAIR, *FLAGS]).astype(dict.fromkeys(FLAGS, bool))


def _differences(own: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """Everything that a row is held against: a seed counts if both have the same items of all tasks."""
    pairs = _pairs(own)
    lacking = pairs[pairs["row_other"].isna() & pairs["is_alone"] & pairs["is_method"]]
    reasons = lacking["name"].map("not run for {}".format)
    lacking = lacking.assign(quantity=lacking["name"].map("minus.{}".format), reason=reasons)
    losses = _beside(pairs[pairs["is_method"]], _losses_as_scores(own)).assign(is_tested=False)
    both = _beside(pairs, scores)
    both = both.assign(is_tested=~both["name"].str.startswith("default.") & (both["name"] != "dense"))
    # run because of what the first ones showed, but independent of them
    later = both[both["is_method"] & (both[["nth", "nth_other"]] > MIN_SEEDS).all(axis=1)]
    ends = both[both["is_alone"] & both["name"].isin(ENDS) & (both["tasks"] > 1)]
    alone = pd.concat([ends, both[both["name"] == "dense"]]).assign(tasks=1, is_tested=False)
    rest = ends[[*PLACE, "task"]].drop_duplicates().rename(columns={"task": "without"}).merge(ends, on=PLACE)
    rest = rest[rest["task"] != rest["without"]].assign(tasks=rest["tasks"] - 1)
    kinds = [("minus", both, ["name"]), ("later", later, ["name"]), ("minus", alone, ["name", "task"])]
    kinds += [("rest", rest, ["name", "without"]), ("loss_minus", losses, ["name"])]
    words = [zip(*(lines[column] for column in columns), strict=True) for _, lines, columns in kinds]
    named = zip(kinds, words, strict=True)
    every = pd.concat(
        lines.assign(quantity=[".".join((kind, *own)) for own in of]) for (kind, lines, _), of in named
    )
    whole = every[every.groupby([*KEY, "seed"])["task"].transform("size") == every["tasks"]]
    return pd.concat([lacking, _paired(own, whole)])


def _beside(pairs: pd.DataFrame, scores: pd.DataFrame) -> pd.DataFrame:
    """The scores of both rows of each pair on the same items, where they name no two backbones, by seed."""
    same = ["seed", "task", "task_hash"]
    keys = [*OTHER, *(f"{name}_other" for name in same)]
    both = pairs.merge(scores, on=ROW)
    both = both.merge(scores.add_suffix("_other"), left_on=[*OTHER, *same], right_on=keys)
    one, two = both["backbone"], both["backbone_other"]
    both = both[(one == two) | one.isna() | two.isna()]
    items = zip(both["correct"], both["correct_other"], strict=True)
    are_same = np.array([0 < len(own) == len(other) for own, other in items], bool)
    return both[are_same].sort_values("seed", kind="stable")


def _losses_as_scores(own: pd.DataFrame) -> pd.DataFrame:
    """Held-out losses of what was learnt, a domain a task of one item; two rows must have learnt as many."""
    task = [f"{setting(config, 'data.families')} {setting(config, 'data.path')}" for config in own["config"]]
    size = own.groupby([*ROW, "seed"])["record"].transform("size")
    loss = own["losses"].map(np.mean, na_action="ignore")
    found = own.assign(task=task, task_hash=size, tasks=size, loss=loss).dropna(subset="loss")
    found["correct"] = found["loss"].map(np.atleast_1d)
    return found[[*ROW, "seed", "task", "task_hash", "tasks", "correct", "backbone", "withdrawn"]]


def _paired(own: pd.DataFrame, whole: pd.DataFrame) -> pd.DataFrame:
    """Each difference over its seeds, where it is tested what the test says, and how many items differ from dense."""
    by_seed: dict[tuple[str, ...], dict[int, list[Any]]] = {}
    scored = ["correct", "correct_other", "withdrawn", "withdrawn_other"]
    whole = whole[[*KEY, "seed", *OTHER, "name", "is_tested", *scored]].astype(object)
    for one in list[Any](whole.itertuples(index=False)):
        by_seed.setdefault(one[:4], {}).setdefault(one.seed, []).append(one)
    lines, records = list[Json](), own.groupby([*ROW, "seed"])["record"].agg(tuple).to_dict()
    fits = own.dropna(subset="fits").groupby([*ROW, "seed"])["fits"].agg("sum").to_dict()
    for (*row, quantity), seeds in by_seed.items():
        items = [[(one.correct, one.correct_other) for one in seed] for seed in seeds.values()]
        found = paired_difference(*zip(*(zip(*seed, strict=True) for seed in items), strict=True))
        first, name = next(iter(seeds.values()))[0], quantity.removeprefix("minus.")
        sides = row, (first.experiment_other, first.cell_other, first.row_other)
        is_loss = quantity.startswith("loss_minus.")
        source, how = fits if is_loss else records, found.method
        behind = tuple(one for seed in seeds for side in sides for one in source[*side, seed])
        numbers: Json = {quantity: {"value": found.value, "low": found.low, "high": found.high}}
        numbers[quantity]["reason"] = how.replace("items only", "no interval") if is_loss else how
        if first.is_tested and found.n_seeds > 1:
            test = equivalence(found.by_seed, MARGIN / 100)
            numbers[f"minus90.{name}"] = {"value": found.value, "low": test.low, "high": test.high}
            numbers |= {f"p.{name}": {"value": test.p}, f"spread.{name}": {"value": found.spread}}
        if first.name == "dense":
            pairs, name = [pair for seed in items for pair in seed], name.removeprefix("dense")
            of_row = {"n": None, "records": None}
            numbers[f"differing{name}"] = of_row | {"value": sum(np.sum(one != two) for one, two in pairs)}
            numbers[f"items{name}"] = of_row | {"value": sum(len(one) for one, _ in pairs)}
        at = {**dict(zip(ROW, row, strict=True)), "n": found.n_seeds, "records": behind}
        at["withdrawn"] = max(
            max(one.withdrawn, one.withdrawn_other) for seed in seeds.values() for one in seed
        )
        lines += [at | {"quantity": quantity} | number for quantity, number in numbers.items()]
    return pd.DataFrame(lines)


def _same_weights(own: pd.DataFrame) -> pd.DataFrame:
    """Under which other name the weights of a study's backbone were trained too."""
    names = own.assign(name=own["config"].map(partial(setting, path="model.name"))).dropna(subset="backbone")
    shared, records, lines = names.groupby("backbone")["name"].agg(set), behind(own, ROW), []
    for place, cell in names.groupby(PLACE, sort=False):
        others = set[str]().union(*shared[cell["backbone"].unique()]) - set(cell["name"])
        first = records[*place, cell["row"].iloc[0]]
        lines += [(*place, "study", "same_weights", name, first) for name in sorted(others)]
    return pd.DataFrame(lines, columns=[*KEY, "reason", "records"])


def _rate(config: Json) -> float:
    """The rate at which a method was trained: the stage's, times the method's own factor."""
    rate, factor = setting(config, "train.learning_rate"), setting(config, "method.learning_rate_factor")
    # a product of decimals: 3e-3 times 0.1 is no round number
    return float(f"{(rate or 0.0) * (1.0 if factor is None else factor):.6g}")


def _learning_rates(found: Frames, own: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Of experiments that only train: loss by rate, the best rate, that of the cell's study; and the records by row."""
    members = _counted(found.members[found.members["task"] != "pretrain"])
    alone = ~members["experiment"].isin(members.loc[members["task"] != "train", "experiment"])
    tried = members[alone].drop_duplicates(["experiment", "record"])
    cells, order = [cell_key(run) for _, run in tried.iterrows()], tried["method"].map(rank)
    tried = tried.assign(cell=cells, row=tried["method"], order=order).sort_values([*PLACE, "order"])
    losses = tried["record"].map(_losses(found)).astype(float)
    tried = tried.assign(rate=tried["config"].map(_rate), value=losses)
    by = tried.dropna(subset="value").groupby([*ROW, "rate"])
    by_rate = by.agg(value=("value", "mean"), withdrawn=("withdrawn", "max")).reset_index()
    best = by_rate.sort_values("value", kind="stable").drop_duplicates(ROW)
    plain, records, used = _plain(own), behind(own, ROW), []
    for experiment, cell, row in tried[ROW].drop_duplicates().itertuples(index=False):
        if one := plain.get((cell, row, "")):
            key = one.experiment, one.cell, one.row
            used.append((experiment, cell, row, "used_rate", _rate(one.config), records[key]))
    numbers = [by_rate.assign(quantity=by_rate["rate"].map("validation_loss.{:g}".format))]
    numbers.append(best.assign(quantity="best_rate", value=best["rate"]))
    return pd.concat([*numbers, pd.DataFrame(used, columns=[*KEY, "value", "records"])]), tried
