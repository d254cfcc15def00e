"""Figures: what each one shows is data (results/figures.yaml), drawn from the measurements by a handful of functions.

In: a `Report`. Out: an SVG for each figure that the records allow, the same bytes for the same records; and one PNG,
the head of the README. A caption says what settings all records of a figure share, so that it cannot contradict an
axis. Next: timeline.py, page.py.

    draw(report, Path("results/figures"))    # writes *.svg and headline.png
"""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from io import BytesIO, StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from adafuse.files import put
from adafuse.report import Report, beside, latency, routing, specification, timeline
from adafuse.report.formats import digits
from adafuse.report.frames import Json, setting
from adafuse.report.measurements import ROWS
from adafuse.report.naming import ADAFUSE, BUDGETS, KEYS, LETTERS, cell_key, rank

HEADLINE = "headline.png"
ROW = ROWS[:3]
INK, FAINT = "#1f2328", "#6e7781"
MARKS = ("o", "s", "D", "^", "v", "P", "X")
CROSS: Any = {"marker": "x", "markersize": 9, "linestyle": "none", "zorder": 5}
DASHED: Any = {"linewidth": 1.0, "linestyle": (0, (4, 3))}
NOTE: Any = {"textcoords": "offset points", "va": "center", "fontsize": 8}
# inches: of a figure, and of a character of a label in DejaVu Sans, which is wider than most
WIDTH, CHARACTER = 7.4, 0.064
# of one side of the map of agreement: 30 blocks would take 160 kB
SQUARES = 16
MOST_POINTS = 60
# what no screen shows: further decimals of a place on the page, and names of parts that nothing refers to
DECIMALS, PLACES = re.compile(r"(\.\d\d)\d+"), re.compile(r'="[^"]*\.\d{3}[^"]*"')
NAMES, INDENT = re.compile(r' id="[\w.]+_\d+"'), re.compile(r"\n\s+")
# of what an SVG holds as pixels
RASTER_DPI = 150


@dataclass(frozen=True)
class Planned:
    """A figure before it is drawn. `shown`: numbers, or records by whose lines it is drawn, with their settings."""

    spec: Json
    shown: pd.DataFrame
    report: Report
    file: str
    title: str
    caption: str


def draw(report: Report, folder: Path) -> list[Planned]:
    """Write every figure that the records allow into `folder`; what was drawn."""
    planned = plan(report)
    others = beside(partial(_write, planned[1::2], folder, report))
    _write(planned[::2], folder)
    others()
    return planned


def _write(planned: list[Planned], folder: Path, headed: Report | None = None) -> None:
    """Some figures, and of the report that is `headed` the headline."""
    with mpl.rc_context(look()["style"]):
        for own in planned:
            put(folder / own.file, svg(DRAW[own.spec["kind"]](own), own.title, own.file))
        head = headline(headed) if headed else None
        if head:
            drawn = BytesIO()
            head.savefig(drawn, format="png", dpi=160, metadata={"Software": None})
            put(folder / HEADLINE, drawn.getvalue())


def plan(report: Report) -> list[Planned]:
    """What is to be drawn, in the order of figures.yaml."""
    found: dict[str, Planned] = {}
    for own in (own for spec in look()["figures"] for own in _of_spec(report, spec)):
        # cells may differ in something that no caption says
        while own.file in found:
            own = replace(own, file=own.file.replace(".svg", "_more.svg"))
        found[own.file] = own
    return list(found.values())


@cache
def look() -> Json:
    """figures.yaml, where each field is explained; its figures with what they leave unsaid."""
    found = specification("figures")
    return found | {"figures": [found["defaults"] | spec for spec in found["figures"]]}


def svg(figure: Figure, title: str, file: str) -> str:
    """The figure as it stands in a file or in a page, without an XML header or a date."""
    text, about = StringIO(), dict.fromkeys(["Date", "Creator", "Format", "Type"])
    # parts are named by a hash of their shape: salted, or two figures in one page would share names
    with mpl.rc_context({"svg.hashsalt": file}):
        figure.savefig(text, format="svg", dpi=RASTER_DPI, metadata=about | {"Title": title})
    drawn = PLACES.sub(lambda found: DECIMALS.sub(r"\1", found[0]), NAMES.sub("", text.getvalue()))
    drawn = INDENT.sub("\n", drawn)
    # as wide as DejaVu Sans where that is not installed
    return drawn[drawn.index("<svg") :].replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


# -- what a figure shows, and what it is called


def _of_spec(report: Report, spec: Json) -> list[Planned]:
    """A figure for each cell; for each machine, or backbone, where cells stand in one."""
    rows = _rows(report, spec).groupby(spec["by"], sort=False)
    groups = [group for _, group in rows if _can_show(spec, group)]
    groups.sort(key=lambda group: (group["machine"].iloc[0] == "CPU", group["cell"].iloc[0]))
    every = [_said(report, group) for group in groups]
    found = []
    for group, said in zip(groups, every, strict=True):
        near = [other for other in every if other["folder"] == said["folder"]]
        differs = [name for name in said if any(other.get(name) != said[name] for other in near)]
        found.append(Planned(spec, group, report, *_words(spec, group, said, differs)))
    return found


def _said(report: Report, group: pd.DataFrame) -> dict[str, str]:
    """Of each setting that all records of a figure share what a caption says."""
    says, usual = look()["says"], look()["usual"]
    runs = report.frames.runs.loc[group["records"].str.split().explode().unique()]
    known = {"machine", "model"}.union(*(KEYS[task] for task in runs["task"].unique()))
    known |= {"train_items"} if runs["task"].isin(["train", "evaluate"]).all() else set()
    found = {"folder": str(runs["folder"].iloc[0])}
    for name in (name for name in says if name in known):
        values = set(map(str, runs[name]))
        if len(values) == 1 and not values & {"None", usual.get(name)}:
            found[name] = says[name].format(*(BUDGETS.get(value, value) for value in values))
    return found


def _words(spec: Json, group: pd.DataFrame, said: Mapping[str, str], differs: list[str]) -> tuple[str, ...]:
    """File, title and caption of a figure; what `differs` from its neighbours stands in the first two."""
    words = [said["folder"], *(f"{LETTERS.get(name, '')}{group[name].iloc[0]}" for name in differs)]
    file = "_".join([spec["name"], *(re.sub(r"[^\w.]", "", word) for word in words)])
    place = " on ".join(said[name] for name in ("model", "machine") if name in said)
    title = ", ".join([f"{spec['title']}: {place}", *(said[name] for name in differs if name != "model")])
    gone = group["withdrawn"].ne("")
    title = f"Withdrawn{'' if gone.all() else ' in part'}: {title}" if gone.any() else title
    rest = [text for name, text in said.items() if name not in ("folder", "model", "machine", *differs)]
    experiment = ", ".join(name for name in group["experiment"].unique() if name)
    rest += [f"experiment={experiment}"] if experiment else []
    rest += [f"withdrawn until measured anew: {why}" for why in group.loc[gone, "withdrawn"].unique()]
    return f"{file}.svg", title, " · ".join(rest)


@lru_cache(maxsize=1)
def numbers(report: Report) -> pd.DataFrame:
    """Every measurement that a figure draws, with what its row is called and the settings of its first record."""
    own = report.measurements.dropna(subset="value")
    own = own[own["quantity"].isin({name for spec in look()["figures"] for name in spec["quantities"]})]
    names = pd.DataFrame(report.measured.rows, columns=ROWS).drop_duplicates(ROW)
    own = own.merge(names.assign(order=range(len(names))), on=ROW, how="left")
    own["label"] = own["label"].fillna(own["row"])
    own[["method", "routing", "strategy"]] = own[["method", "routing", "strategy"]].fillna("")
    # a row of a timed cell is an arm, whose method is not the record's
    runs = report.frames.runs.drop(columns=["method", "strategy", "withdrawn"])
    own = own.assign(first=own["records"].str.split().str[0]).join(runs, on="first", how="inner")
    return own.sort_values("order", kind="stable")


def _rows(report: Report, spec: Json) -> pd.DataFrame:
    """What a figure is drawn of: measurements, experiment by experiment; or the records that hold its `lines`."""
    frames, experiments = report.frames, spec["experiments"]
    if spec["lines"]:
        # a map takes more than one family
        told = routing.uses(frames).routers["tells_family"].dropna().reset_index()
        held = (told if spec["lines"] == "routing" else frames.lines(spec["lines"]))["record"]
        own = frames.members[frames.members["experiment"].isin(experiments)].drop_duplicates("record")
        own = own[own["task"].isin(["train", "trace"]) & own["record"].isin(held)]
        own = own.assign(records=own["record"], cell=[cell_key(run) for _, run in own.iterrows()])
    else:
        own = numbers(report)
        own = own[own["experiment"].isin(experiments) & own["quantity"].isin(spec["quantities"])]
        own = own.sort_values("experiment", key=lambda names: names.map(experiments.index), kind="stable")
    for name, value in spec["where"].items():
        own = own[_setting(own, name) == value]
    return own


def _setting(shown: pd.DataFrame, name: str) -> pd.Series:
    """A setting of records: a column, or an entry of their configurations by dotted name."""
    return shown["config"].map(partial(setting, path=name)) if "." in name else shown[name]


def _can_show(spec: Json, group: pd.DataFrame) -> bool:
    """A line takes two points, bars an adapter, maps the method that they are of."""
    if spec["kind"] == "lines":
        return any(_setting(group, name).nunique() > 1 for name in spec["over"])
    if spec["kind"] == "bars":
        return len(_drawn(spec, group)) > 0
    return not spec["method"] or spec["method"] in set(group["method"])


def _drawn(spec: Json, shown: pd.DataFrame) -> pd.DataFrame:
    """What bars and lines are drawn of: neither the plain backbone nor its twin, with which arms are compared."""
    backbone = (shown["method"] == "base") & (shown["strategy"] == "dense")
    return shown[(shown["quantity"] == spec["quantities"][0]) & ~backbone]


def _method(name: str) -> tuple[str, str]:
    """Colour and name of a method; an unknown one is called as it is."""
    own = look()["methods"].get(name, {"colour": FAINT, "name": name})
    return own["colour"], own["name"]


# -- a page for panels


def blank(down: int = 1, across: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with panels, which `lay_out` puts in their places."""
    figure = Figure()
    return figure, list(figure.subplots(down, across, squeeze=False).flat)


def lay_out(
    figure: Figure,
    own: Planned,
    left: float,
    height: float,
    handles: Sequence[Artist] | None = None,
    **room: float,
) -> Figure:
    """Title, caption and legend above the panels, which have `height` together; all in inches and from numbers of
    characters. Text that is measured takes most of the time of drawing, and makes bytes depend on the machine's fonts.
    `handles`: of the legend, else all that has a name. `room`: `right` and `below` panels, and `apart`, of a panel.
    """
    if handles is None:
        handles = [one for axis in figure.axes for one in axis.get_legend_handles_labels()[0]]
    named = {str(one.get_label()): one for one in handles}
    columns = int((WIDTH - 0.2) / (0.45 + CHARACTER * max(map(len, named), default=0)))
    title = textwrap.wrap(own.title, 84)
    caption = [line.removesuffix(" ·") for line in textwrap.wrap(own.caption, 122)]
    headed = max(len(axis.get_title("left").splitlines()) for axis in figure.axes)
    legend = 0.12 + 0.16 * math.ceil(len(named) / columns)
    ends = np.cumsum([0.1, 0.2 * len(title), 0.08 + 0.14 * len(caption), legend, 0.18 * headed])
    below, right, apart = room.get("below", 0.5), room.get("right", 0.15), room.get("apart", 0.2)
    inches, edge = ends[-1] + height + below, 0.1 / WIDTH
    heights = 1 - ends / inches
    figure.set_size_inches(WIDTH, inches)
    figure.text(edge, heights[0], "\n".join(title), va="top", fontsize=10.5, weight="bold")
    figure.text(edge, heights[1], "\n".join(caption), va="top", fontsize=7.5, color=FAINT)
    if named:
        where: Any = {"loc": "upper left", "bbox_to_anchor": (edge, heights[2])}
        figure.legend(named.values(), named, ncols=columns, **where)
    figure.subplots_adjust(left / WIDTH, below / inches, 1 - right / WIDTH, heights[-1], apart, 0.2)
    # else every label of a tick is measured to find the place of an axis' own
    for axis in figure.axes:
        box = axis.get_position()
        axis.xaxis.set_label_coords(0.5, (0.2 - below) / box.height / inches)
        axis.yaxis.set_label_coords((0.28 - left) / box.width / WIDTH, axis.yaxis.label.get_position()[1])
    return figure


# -- bars


def bars(own: Planned) -> Figure:
    """An arm a bar from 1, the backbone; slowest on top. The paper's ratio, if it has one, stands under the bar."""
    # of two experiments that time an arm, the first
    spec, every = own.spec, own.shown.drop_duplicates(["row", "quantity"])
    found = _drawn(spec, every)
    if spec["sorted"]:
        found = found.sort_values("value", ascending=False, kind="stable")
    beside = every.pivot(index="row", columns="quantity", values="value")
    notes = [spec["note"].format_map(beside.loc[row].dropna().map(digits)) for row in found["row"]]
    texts = [digits(value) + note for value, note in zip(found["value"], notes, strict=True)]
    left = 0.2 + CHARACTER * found["label"].str.len().max()
    inches = WIDTH - 0.15 - left
    room = inches / (inches - 0.1 - CHARACTER * max(map(len, texts)))
    figure, (axis,) = blank()
    _from_one(axis, found, list(found["routing"]), texts, room)
    axis.set_yticks(range(len(found)), found["label"])
    axis.set_xlabel(spec["axis"])
    routings = [one for name, one in look()["routings"].items() if name in set(found["routing"])]
    handles: list[Artist] = [Patch(color=one["colour"], label=one["name"]) for one in routings]
    handles += _references(axis, own, found)
    return lay_out(figure, own, left, 0.2 + 0.28 * max(len(found), 2), handles)


def _from_one(
    axis: Axes, found: pd.DataFrame, routings: Sequence[str], texts: Sequence[str], room: float, **how: Any
) -> None:
    """Bars with intervals and texts, counted from 1. They leave `room`: the width over what they take of it."""
    low, high = (found[name].fillna(found["value"]) for name in ("low", "high"))
    known, places = look()["routings"], range(len(found))
    colours = [known[name]["colour"] if name in known else _method(ADAFUSE)[0] for name in routings]
    axis.barh(places, found["value"] - 1, left=1, height=0.55, color=colours)
    axis.hlines(places, low, high, color=INK, linewidth=1.4)
    for place, text, end in zip(places, texts, high.clip(lower=1), strict=True):
        axis.annotate(text, (end, place), (5, 0), **NOTE, **how) if text else None
    left = min(0.95, 0.98 * low.min())
    right = left + room * (max(1.05, high.max()) - left)
    # 1 always has its tick: a multiple of every step up to it, and the first of longer ones
    ticks = np.array(MaxNLocator(7, steps=[1, 2, 5, 10]).tick_values(left, right))
    ticks = ticks if ticks[1] - ticks[0] <= 1 else np.append(1, ticks[ticks > 1])
    axis.set_xticks(ticks[(ticks >= left) & (ticks <= right)])
    axis.set(xlim=(left, right), ylim=(len(found) - 0.4, -0.6))
    axis.axvline(1, color=INK, linewidth=0.8)
    axis.xaxis.grid(True)
    axis.tick_params(axis="y", length=0)


def _references(axis: Axes, own: Planned, shown: pd.DataFrame) -> list[Artist]:
    """What the paper prints for a row over the backbone's (its Figure 1 is one row); and the band in which an arm
    cannot be told from the backbone, for so far apart are two of the backbone itself in the arm's runtime.
    """
    rows = list(shown["row"])
    printed: dict[str, float] = {}
    for table in (own.report.paper[name] for name in own.spec["paper"]):
        ms = {one["arm"]: one["ms_per_token"] for one in table.get("rows", [])}
        printed |= {arm: value / ms["base"] for arm, value in ms.items()}
        printed |= {} if ms else dict.fromkeys(rows, table["adapters_ms"] / table["backbone_ms"])
    marks = [(printed[row], place + 0.38) for place, row in enumerate(rows) if row in printed]
    noise = own.shown[own.shown["quantity"] == "resolution"].groupby("row")["value"].max()
    widths = (1 + shown["runtime"].map(noise)).fillna(1).to_numpy(float)
    found: list[Artist] = []
    if marks:
        style: Any = {"marker": "D", "markerfacecolor": "white", "markeredgecolor": INK, "linestyle": "none"}
        found += axis.plot(*zip(*marks, strict=True), label="paper", zorder=4, **style)
    if widths.max(initial=1) > 1:
        band: Any = {"color": "#fff1b8", "linewidth": 0}
        axis.barh(range(len(rows)), widths - 1 / widths, height=1, left=1 / widths, zorder=0, **band)
        found.append(Patch(label="A/A: not resolved", **band))
    return found


def headline(report: Report) -> Figure | None:
    """What a token costs, launched kernel by kernel, as one captured graph, and in few launches, for someone who has
    read nothing.
    """
    spec, panels = look()["headline"], []
    labels, routings, *arms = zip(*spec["rows"], strict=True)
    alone: list[str] = []
    titles: list[str] = []
    for panel, rows in zip(spec["panels"], arms, strict=True):
        found = _rows(report, look()["defaults"] | panel | {"quantities": ["ratio"]})
        found = found.drop_duplicates("row").set_index("row").reindex(rows)
        if found["value"].notna().any():
            base = report.measurements.query("row == @panel['alone'] and quantity == 'ms_per_token'")
            ms = base[base["cell"] == found["cell"].dropna().iloc[0]]["value"]
            panels.append(found)
            titles.append(panel["title"])
            alone.append(f"{digits(ms.iloc[0])} ms" if len(ms) else "not measured")
    if len(panels) < 2:
        return None
    figure, axes = blank(across=len(panels))
    right = max(found["high"].max() for found in panels)
    for axis, found, title in zip(axes, panels, titles, strict=True):
        texts = [f"{digits(value)} ×" if value > 0 else "" for value in found["value"]]
        _from_one(axis, found, routings, texts, 1, weight="bold")
        axis.barh(range(len(found)), found["value"] * 0 + 1, height=0.55, color=_method("base")[0])
        axis.set_xticks([1, *range(2, int(right) + 1, 2)])
        axis.set(xlim=(0, 1.35 * right), title=title)
        axis.set_yticks(range(len(found)), labels if axis is axes[0] else [""] * len(labels))
    axes[len(axes) // 2].set_xlabel("time of a token (1 = the model alone)")
    said = _said(report, pd.concat(panels).dropna(subset="records"))
    about = [*spec["about"], f"The model alone: {', '.join(alone)}."]
    caption = f"{' '.join(about)} {' · '.join(text for name, text in said.items() if name != 'folder')}"
    own = Planned(spec, panels[0], report, HEADLINE, spec["title"], caption)
    return lay_out(figure, own, 1.75, 2.4, [], apart=0.11)


# -- lines


def lines(own: Planned) -> Figure:
    """A line an arm or a method, a point a cell with its interval. Strategies `apart` have their own panel."""
    spec, found = own.spec, _points(own)
    looks, merged = _looks(spec, found), found["strategy"].isin(spec["apart"])
    panels = {"merged into the weights": found[merged], "beside the weights": found[~merged]}
    panels = {name: part for name, part in panels.items() if len(part)}
    figure, axes = blank(down=len(panels))
    for axis, (name, part) in zip(axes, panels.items(), strict=True):
        curves(axis, part, looks)
        gone = part[part["withdrawn"] != ""]
        if len(gone):
            axis.plot(gone["place"], gone["value"], color=INK, label="withdrawn", **CROSS)
        axis.set_title(name if len(panels) > 1 else "")
        axis.margins(y=0.14)
        if spec["quantities"][0] == "ratio":
            axis.axhline(1, color=INK, linewidth=0.8)
        _name_places(axis, spec, found)
    _levels(axes[-1], own)
    # of two panels in the middle
    axes[-1].set_ylabel(spec["axis"], y=0.5 if len(axes) == 1 else 1.1)
    axes[-1].set_xlabel(spec["over_axis"])
    axes[0].tick_params(labelbottom=len(axes) == 1)
    height, below = (3.3 if len(axes) > 1 else 2.7), 0.35 + 0.15 * max(1, len(spec["over"]))
    return lay_out(figure, own, 0.65, height, below=below)


def _points(own: Planned) -> pd.DataFrame:
    """Every number of a figure with its `line`, the settings `at` which it is, their number `tick`, and its `place`.
    Values stand evenly: they double or are names.
    """
    spec, found = own.spec, _drawn(own.spec, own.shown)
    at = list(zip(*(_setting(found, name) for name in spec["over"]), strict=True))
    found = found.assign(at=pd.Series(at, found.index), line=_line_names(spec, found))
    found[["value", "low", "high"]] *= 1 if spec["quantities"][0] == "ratio" else 100
    # words as figures.yaml has them, numbers by size, other names by letter
    order = {value: number for number, value in enumerate(spec["words"])}
    key = {own: [(isinstance(one, str), one) for one in (order.get(one, one) for one in own)] for own in at}
    found["tick"] = found["at"].map(sorted(key, key=lambda own: key[own]).index)
    if spec["place"]:
        shares = own.shown[own.shown["quantity"] == spec["quantities"][1]].set_index(ROW)["value"]
        return found.assign(place=100 * found.join(shares.rename("share"), on=ROW)["share"])
    # lines stand a little apart, so that no interval hides another
    number = pd.Series(pd.factorize(found["line"])[0], found.index)
    return found.assign(place=found["tick"] + 0.07 * (number - number.max() / 2))


def curves(axis: Axes, found: pd.DataFrame, looks: Mapping[str, Json]) -> None:
    """Lines by `line` over `place`, with intervals where there are any."""
    for line, points in found.sort_values("place", kind="stable").groupby("line", sort=False):
        own = looks[str(line)]
        axis.plot(points["place"], points["value"], label=line, **own)
        if "low" in points:
            axis.vlines(points["place"], points["low"], points["high"], color=own["color"])
    axis.yaxis.grid(True)


def _name_places(axis: Axes, spec: Json, found: pd.DataFrame) -> None:
    """The settings, on the axis or below each point."""
    if spec["place"]:
        axis.set_xlim(left=0)
        below: Any = NOTE | {"ha": "center", "va": "top", "fontsize": 7.5}
        bottoms = found["low"].fillna(found["value"])
        for at, place, bottom in zip(found["at"], found["place"], bottoms, strict=True):
            axis.annotate(f"{at[0]:g}", (place, bottom), (0, -3), **below)
        return
    named = found.drop_duplicates("tick").sort_values("tick")
    words = [[spec["words"].get(setting, setting) for setting in at] for at in named["at"]]
    ticks = spec["ticks"] or ["{}"] * len(spec["over"])
    axis.set_xticks(named["tick"], ["\n".join(map(str.format, ticks, own)) for own in words])
    axis.set_xlim(-0.5, len(named) - 0.5)


def _line_names(spec: Json, found: pd.DataFrame) -> list[str]:
    """The label of an arm; of a method its name, with the settings by which a figure splits it."""
    if spec["quantities"][0] == "ratio":
        return list(found["label"])
    names = [_method(method)[1] for method in found["method"]]
    for path, words in spec["split"].items():
        parts = zip(names, _setting(found, path), strict=True)
        names = [f"{name}, {words[value]}" if value in words else name for name, value in parts]
    return names


def _looks(spec: Json, found: pd.DataFrame) -> dict[str, Json]:
    """A colour and a mark for each line of a figure, no two alike, and none as a level's."""
    looks: dict[str, Json] = {}
    taken = {_method(name)[0] for name in set(spec["levels"].get("methods", [])) - set(found["method"])}
    rows = found.drop_duplicates("line")[["line", "method", "strategy"]]
    for mark, (line, method, strategy) in zip(cycle(MARKS), rows.itertuples(index=False)):
        first = look()["strategies"].get(strategy) if method == ADAFUSE else None
        wanted = [first, _method(method)[0], *look()["spare"]]
        colour = next(one for one in wanted if one and one not in taken)
        taken.add(colour)
        looks[line] = {"color": colour, "marker": mark, "linestyle": "-" if spec["joined"] else "none"}
    return looks


def _levels(axis: Axes, own: Planned) -> None:
    """Methods without the setting that is varied, of the same backbone and data, as dashed lines."""
    levels = own.spec["levels"]
    if not levels:
        return
    found = _drawn(own.spec, _rows(own.report, own.spec | {"where": {}} | levels))
    same = ["machine", "model", "data", "level", "train_items", "budget", "count", "rank", "top_k"]
    # as text, because what is not set is no number
    near = (found[same].map(str) == own.shown[same].map(str).iloc[0]).all(axis=1)
    for _, row in found[near & found["method"].isin(levels["methods"])].iterrows():
        colour, name = _method(row["method"])
        label = name + levels.get("label", "") + " (withdrawn)" * bool(row["withdrawn"])
        axis.axhline(100 * row["value"], color=colour, label=label, **DASHED)


# -- drift, loss, routers, launches


def drift(own: Planned) -> Figure:
    """Errors of weights and logits over the number of switches, a line for each strategy and dtype."""
    keys = own.report.frames.lines("drift")[["strategy", "dtype", "switches"]].drop_duplicates()
    keys = keys.join(latency.drift_rows(keys)).sort_values(["strategy", "dtype"])
    found = keys.merge(own.shown[["row", "quantity", "value"]], on="row")
    found = found.rename(columns={"label": "line", "switches": "place"})
    found["value"] = found["value"].where(found["value"] > 0)
    colours, dtypes, rows = look()["strategies"], look()["dtypes"], list[Any](found.itertuples())
    looks = {row.line: {"color": colours.get(row.strategy, FAINT), **dtypes[row.dtype]} for row in rows}
    figure, axes = blank(across=2)
    for axis, (quantity, label) in zip(axes, own.spec["words"].items(), strict=True):
        curves(axis, found[found["quantity"] == quantity], looks)
        axis.set(
            xscale="log", yscale="log", title=quantity.replace("_", " "), xlabel="switches", ylabel=label
        )
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(True)
    return lay_out(figure, own, 0.75, 2.7, apart=0.33)


def loss(own: Planned) -> Figure:
    """Training loss, mean over seeds: of the backbone, if it was pre-trained here, and of each method on it."""
    runs, every = own.report.frames.runs, own.report.frames.lines("loss")
    near = runs[(runs["task"] == "pretrain") & (runs["folder"] == own.shown["folder"].iloc[0])]
    # what a backbone is made of
    made = [[config.get("model"), config.get("pretrain")] for config in own.shown["config"]]
    under = near.index[[[config.get("model"), config.get("pretrain")] in made for config in near["config"]]]
    stages = {"pre-training the backbone": every[every["record"].isin(under)].assign(method="base")}
    stages |= {"training adapters": every.merge(own.shown[["record", "method"]], on="record")}
    stages = {name: part for name, part in stages.items() if len(part)}
    figure, axes = blank(across=len(stages))
    for axis, (name, part) in zip(axes, stages.items(), strict=True):
        steps = np.sort(part["step"].unique())
        kept = part[part["step"].isin(steps[:: math.ceil(len(steps) / MOST_POINTS)])]
        mean = kept.groupby(["method", "step"])["loss"].mean().unstack("step")
        for method in sorted(mean.index, key=rank):
            colour, label = (INK, "") if method == "base" else _method(method)
            axis.plot(mean.columns, mean.loc[method], color=colour, label=label)
        axis.set(title=name, xlabel="step", ylabel="nats per token")
        axis.set_ylim(bottom=0)
        axis.grid(True)
    return lay_out(figure, own, 0.6, 2.4)


def load(own: Planned) -> Figure:
    """The token router's load by family in the first seed, as experts have no common numbers over seeds, so that their
    loads cannot be averaged; and how much a router of each method tells of the family, mean over routers and seeds.
    """
    uses, shown = routing.uses(own.report.frames), own.shown.sort_values("seed", kind="stable")
    first = shown[shown["method"] == own.spec["method"]].iloc[0]
    loads = 100 * routing.load_map(uses, first["record"])
    told = uses.routers["tells_family"].groupby(level="record").mean()
    told = 100 * shown.join(told, on="record").groupby("method")["tells_family"].mean().dropna()
    told = told.loc[sorted(told.index, key=rank, reverse=True)]
    colours, names = zip(*map(_method, told.index), strict=True)
    figure, (left, right) = blank(across=2)
    _mesh(left, loads, "% of the chosen slots")
    left.set(xlabel="expert", title=f"AdaFuse, seed {first['seed']}")
    right.barh(names, told, height=0.55, color=colours)
    right.set(xlabel="% of what there is to know", title="told of the family")
    right.tick_params(axis="y", length=0)
    room = max(0.95, 0.2 + CHARACTER * max(map(len, loads.index)))
    return lay_out(figure, own, room, 0.5 + 0.22 * len(loads), right=0.3, apart=1.5)


def agreement(own: Planned) -> Figure:
    """Routers of two blocks, mean over adapters and pairs; of many blocks neighbours share a square, which bears the
    first one's number. No router is compared with itself.
    """
    records = own.shown.loc[own.shown["method"] == own.spec["method"], "record"]
    found = routing.agreement(own.report.frames, records)
    assert found is not None, "planned for records that compare routers"
    blocks, pairs = routing.blocks(found[0]), np.where(np.eye(len(found[0])), np.nan, found[1])
    order = list(dict.fromkeys(blocks))
    together = -(-len(order) // SQUARES)
    first = {block: order[place // together * together] for place, block in enumerate(order)}
    blocks = [first[block] for block in blocks]
    long = pd.DataFrame(pairs, blocks, blocks).groupby(level=0, sort=False).mean()
    figure, (axis,) = blank()
    _mesh(axis, long.T.groupby(level=0, sort=False).mean(), "normalised mutual information\nof first choices")
    axis.set(xlabel="block of the backbone", ylabel="block of the backbone")
    adapters = "1 adapter" if len(records) == 1 else f"{len(records)} adapters"
    axis.set_title(f"{_method(own.spec['method'])[1]}: mean {np.nanmean(pairs):.2f}, {adapters}")
    return lay_out(figure, own, 0.65, 3.6, right=WIDTH - 0.65 - 3.6)


def _mesh(axis: Axes, values: pd.DataFrame, words: str) -> None:
    """Squares, row 0 on top, as pixels: outlines of hundreds of them take five times the bytes."""
    blues, squares = mpl.colormaps["Blues"].resampled(24), values.to_numpy(float)
    mesh = axis.pcolormesh(squares, cmap=blues, vmin=0, vmax=max(0.1, np.nanmax(squares)), rasterized=True)
    axis.set_xticks(np.arange(values.shape[1]) + 0.5, values.columns)
    axis.set_yticks(np.arange(values.shape[0]) + 0.5, values.index)
    axis.set(facecolor="#d8dee4", ylim=(values.shape[0], 0))
    axis.tick_params(length=0)
    axis.figure.colorbar(mesh, cax=axis.inset_axes((1.03, 0, 0.05, 1)), label=words)


def launches(own: Planned) -> Figure:
    """One token of each arm, launch by launch."""
    figure, (axis,) = blank()
    lanes = timeline.lanes(own.report.frames, own.shown)
    handles, longest = timeline.draw(axis, lanes, look()["parts"]), max(len(lane.label) for lane in lanes)
    return lay_out(figure, own, 0.2 + CHARACTER * longest, 0.2 + 0.38 * len(lanes), handles)


DRAW: dict[str, Callable[[Planned], Figure]] = {"bars": bars, "lines": lines, "drift": drift, "loss": loss}
DRAW |= {"load": load, "agreement": agreement, "timeline": launches}
