"""Figures: what each one shows is data (results/figures.yaml), drawn from the measurements by a handful of functions.

In: a `Report`. Out: an SVG for each figure that the records allow, the same bytes for the same records; their index;
and one PNG, the head of the README. A caption says what settings all records of a figure share, so that it cannot
contradict an axis. Next: timeline.py, page.py.

    draw(report, Path("results/figures"))    # writes *.svg and headline.png
    index(report)                            # file, title, caption, experiment
"""

from __future__ import annotations

import json
import math
import re
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, cached_property, reduce
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
import pandas as pd
import yaml
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, PathPatch
from matplotlib.path import Path as Outline
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from adafuse.report import Report, routing, timeline
from adafuse.report.formats import digits
from adafuse.report.frames import Json
from adafuse.report.naming import ADAFUSE, BUDGETS, KEYS, LETTERS, TWIN, cell_key, rank

FILE = Path(__file__).resolve().parents[3] / "results" / "figures.yaml"
HEADLINE = "headline.png"
ROW = ["experiment", "cell", "row"]
INK, FAINT = "#1f2328", "#6e7781"
MARKS = ("o", "s", "D", "^", "v", "P", "X")
DASHED: Any = {"linewidth": 1.0, "linestyle": (0, (4, 3))}
NOTE: Any = {"textcoords": "offset points", "va": "center", "fontsize": 8}
# the kinds that draw lines of records, and which
LINES = {"loss": "loss", "load": "routing", "agreement": "agreement", "timeline": "trace"}
DASHES = {"bfloat16": "o-", "float16": "s--", "float32": "^:"}
# inches: of a figure, and of a character of a label in DejaVu Sans, which is wider than most
WIDTH, CHARACTER = 7.4, 0.064
ROOM = {"right": 0.15, "below": 0.5, "between": 0.65, "stacked": False}
MOST_POINTS, MOST_LABELS, MOST_ROUTERS, SHADES = 60, 12, 40, 24
# further decimals of a place on the page move nothing that a screen shows
DECIMALS, PLACES = re.compile(r"(\.\d\d)\d+"), re.compile(r'="[^"]*\.\d{3}[^"]*"')
# names of parts that nothing refers to, and that would stand twice in a page of several figures
NAMES = re.compile(r' id="[\w.]+_\d+"')


@dataclass
class Source:
    """A report, and what several figures need of it."""

    report: Report

    @cached_property
    def uses(self) -> routing.Uses:
        return routing.uses(self.report.frames)

    @cached_property
    def numbers(self) -> pd.DataFrame:
        """Every measurement that a figure draws, with what its row is called and the settings of its first record."""
        every = self.report.measurements
        wanted = {"resolution", *(name for spec in specs() for name in spec["quantities"])}
        own = every[every["quantity"].isin(wanted) & every["value"].notna()]
        names = self.report.rows.drop_duplicates(ROW)
        own = own.merge(names.assign(order=range(len(names))), on=ROW, how="left")
        own["label"] = own["label"].fillna(own["row"])
        own[["method", "routing", "strategy"]] = own[["method", "routing", "strategy"]].fillna("")
        # a row of a timed cell is an arm, whose method is not the record's
        runs = self.report.frames.runs.drop(columns=["method", "strategy"])
        own["first"] = own["records"].str.split().str[0]
        own = own.join(runs, on="first", how="inner")
        return own.sort_values("order", kind="stable")


@dataclass(frozen=True)
class Planned:
    """A figure before it is drawn. `shown`: numbers, or records by whose lines it is drawn, with their settings."""

    spec: Json
    file: str
    title: str
    caption: str
    experiment: str
    shown: pd.DataFrame
    source: Source


def draw(report: Report, folder: Path) -> list[Planned]:
    """Write every figure that the records allow into `folder`; what was drawn."""
    folder.mkdir(parents=True, exist_ok=True)
    source = Source(report)
    planned = plan(source)
    with mpl.rc_context(look()["style"]):
        for own in planned:
            (folder / own.file).write_text(svg(DRAW[own.spec["kind"]](own), own.title))
        head = headline(source)
        if head:
            head.savefig(folder / HEADLINE, dpi=200, metadata={"Software": None})
    return planned


def index(report: Report) -> pd.DataFrame:
    """Every figure that the records allow, in the order of figures.yaml: file, title, caption, experiment."""
    names = ["file", "title", "caption", "experiment"]
    rows = [[getattr(own, name) for name in names] for own in plan(Source(report))]
    return pd.DataFrame(rows, columns=names)


def plan(source: Source) -> list[Planned]:
    """What is to be drawn."""
    found: dict[str, Planned] = {}
    for own in (own for spec in specs() for own in _of_spec(source, spec)):
        # cells may differ in something that no caption says
        while own.file in found:
            own = replace(own, file=own.file.replace(".svg", "_more.svg"))
        found[own.file] = own
    return list(found.values())


@cache
def look() -> Json:
    """figures.yaml."""
    return dict(yaml.safe_load(FILE.read_text()))


def specs() -> list[Json]:
    """The entries of figures.yaml, where each field is explained, with what they leave unsaid."""
    return [look()["defaults"] | entry for entry in look()["figures"]]


def svg(figure: Figure, title: str) -> str:
    """The figure as it stands in a file or in a page, without an XML header or a date."""
    text, about = StringIO(), dict.fromkeys(["Date", "Creator", "Format", "Type"])
    figure.savefig(text, format="svg", metadata=about | {"Title": title})
    drawn = PLACES.sub(lambda found: DECIMALS.sub(r"\1", found[0]), NAMES.sub("", text.getvalue()))
    # as wide as DejaVu Sans where that is not installed
    return drawn[drawn.index("<svg") :].replace("'DejaVu Sans'", "'DejaVu Sans', Verdana, sans-serif")


# -- what a figure shows, and what it is called


def _of_spec(source: Source, spec: Json) -> list[Planned]:
    """A figure for each cell; for each machine, or backbone, where cells stand in one."""
    rows = _records(source, spec) if spec["kind"] in LINES else _numbers(source, spec)
    by = {"lines": ["folder"], "loss": ["folder", "model"]}.get(spec["kind"], ["folder", "cell"])
    groups = [group for _, group in rows.groupby(by, sort=False) if _can_show(spec, group)]
    groups.sort(key=lambda group: (group["machine"].iloc[0] == "CPU", group["cell"].iloc[0]))
    every = [_said(source, group) for group in groups]
    return [_planned(source, spec, group, said, every) for group, said in zip(groups, every, strict=True)]


def _said(source: Source, group: pd.DataFrame) -> dict[str, str]:
    """Of each setting that all records of a figure share what a caption says."""
    hashes = group["records"].str.split().explode() if "records" in group else group["record"]
    runs = source.report.frames.runs.loc[hashes.unique(), ["folder", "task", *look()["says"]]]
    known = {"machine", "model", *(name for task in runs["task"].unique() for name in KEYS[task])}
    known |= {"train_items"} if runs["task"].isin(["train", "evaluate"]).all() else set()
    found = {"folder": str(runs["folder"].iloc[0])}
    for name in (name for name in look()["says"] if name in known):
        values = set(map(str, runs[name]))
        if len(values) == 1 and not values & {"None", look()["usual"].get(name)}:
            found[name] = look()["says"][name].format(*(BUDGETS.get(value, value) for value in values))
    return found


def _planned(source: Source, spec: Json, group: pd.DataFrame, said: Json, every: list[Json]) -> Planned:
    """`every`: what is said of each figure of the entry; by what differs on one machine it is told apart."""
    near = [other for other in every if other["folder"] == said["folder"]]
    differs = [name for name in said if any(other.get(name) != said[name] for other in near)]
    words = [said["folder"], *(f"{LETTERS.get(name, '')}{group[name].iloc[0]}" for name in differs)]
    file = "_".join([spec["name"], *(re.sub(r"[^\w.]", "", word) for word in words)])
    place = " on ".join(said[name] for name in ("model", "machine") if name in said)
    title = ", ".join([f"{spec['title']}: {place}", *(said[name] for name in differs if name != "model")])
    rest = [text for name, text in said.items() if name not in ("folder", "model", "machine", *differs)]
    experiment = ", ".join(name for name in dict.fromkeys(group["experiment"]) if name)
    rest += [f"experiment={experiment}"] if experiment else []
    return Planned(spec, f"{file}.svg", title, " · ".join(rest), experiment, group, source)


def _numbers(source: Source, spec: Json) -> pd.DataFrame:
    """Measurements, experiment by experiment."""
    own = source.numbers
    own = own[own["experiment"].isin(spec["experiments"]) & own["quantity"].isin(spec["quantities"])]
    own = own.sort_values("experiment", key=lambda names: names.map(spec["experiments"].index), kind="stable")
    return own[_meets(own, spec["where"])]


def _records(source: Source, spec: Json) -> pd.DataFrame:
    """The records of a figure that hold such lines, each once."""
    frames, kind = source.report.frames, LINES[spec["kind"]]
    # a map takes more than one family
    told = source.uses.routers["tells_family"].dropna().index.get_level_values("record")
    held = set(told if kind == "routing" else frames.lines(kind)["record"])
    own = frames.members.loc[frames.members["experiment"].isin(spec["experiments"]), ["experiment", "record"]]
    own = own[own["record"].isin(held)].drop_duplicates("record").join(frames.runs, on="record")
    own = own[own["task"].isin(["train", "trace"])]
    own = own[_meets(own, spec["where"])]
    return own.assign(cell=[cell_key(run) for _, run in own.iterrows()])


def _meets(shown: pd.DataFrame, where: Json) -> pd.Series:
    """True for the rows whose records have these settings."""
    every = pd.Series(True, index=shown.index)
    return reduce(lambda found, name: found & (_setting(shown, name) == where[name]), where, every)


def _setting(shown: pd.DataFrame, name: str) -> pd.Series:
    """A setting of records: a column, or an entry of their configurations by dotted name."""
    parts = name.split(".")
    if len(parts) == 1:
        return shown[name]
    return shown["config"].map(lambda config: reduce(lambda own, part: (own or {}).get(part), parts, config))


def _can_show(spec: Json, group: pd.DataFrame) -> bool:
    """A line takes two points, a map of loads AdaFuse, agreement a gate per layer, bars an adapter."""
    if spec["kind"] == "lines":
        return any(_setting(group, name).nunique() > 1 for name in spec["over"])
    needed = {"load": ADAFUSE, "agreement": TWIN}.get(spec["kind"])
    if needed:
        return needed in set(group["method"])
    return spec["kind"] != "bars" or not _is_backbone(group).all()


def _is_backbone(shown: pd.DataFrame) -> pd.Series:
    """True for the plain backbone and its twin, with which arms are compared."""
    return (shown["method"] == "base") & (shown["strategy"] == "dense")


def _method(name: str) -> tuple[str, str]:
    """Colour and name of a method; an unknown one is called as it is."""
    own = look()["methods"].get(name, {"colour": FAINT, "name": name})
    return own["colour"], own["name"]


# -- a page for panels


def blank(count: int = 1) -> tuple[Figure, list[Axes]]:
    """A figure with panels, which `lay_out` puts in their places."""
    figure = Figure()
    return figure, [figure.add_axes((0, 0, 1, 1)) for _ in range(count)]


def lay_out(
    figure: Figure, own: Planned, left: float, height: float, handles: Iterable[Artist] = (), **rest: float
) -> Figure:
    """Title, caption and legend above the panels, which have `height` together and `left`, `right`, `below` and
    `between` them, in inches and from numbers of characters. Text that is measured takes most of the time of drawing,
    and makes bytes depend on the machine's fonts.
    """
    right, below, between, stacked = (rest.get(name, usual) for name, usual in ROOM.items())
    # a caption breaks between settings alone
    solid = own.caption.replace(" ", "\xa0").replace("\xa0·\xa0", "\xa0· ")
    title = textwrap.wrap(own.title, 84)
    caption = [line.replace("\xa0", " ").removesuffix(" ·") for line in textwrap.wrap(solid, 122)]
    named = [handle for handle in handles if handle.get_label()]
    longest = max((len(str(handle.get_label())) for handle in named), default=0)
    columns = max(1, int((WIDTH - 0.2) / (0.45 + CHARACTER * longest)))
    headed = max(axis.get_title("left").count("\n") + bool(axis.get_title("left")) for axis in figure.axes)
    legend = 0.12 + 0.16 * math.ceil(len(named) / columns)
    ends = np.cumsum([0.1, 0.2 * len(title), 0.08 + 0.14 * len(caption), legend, 0.18 * headed])
    inches = ends[-1] + height + below
    figure.set_size_inches(WIDTH, inches)
    heights, edge = 1 - ends / inches, 0.1 / WIDTH
    figure.text(edge, heights[0], "\n".join(title), va="top", fontsize=10.5, weight="bold")
    figure.text(edge, heights[1], "\n".join(caption), va="top", fontsize=7.5, color=FAINT)
    if named:
        figure.legend(handles=named, loc="upper left", bbox_to_anchor=(edge, heights[2]), ncols=columns)
    across, down = (1, len(figure.axes)) if stacked else (len(figure.axes), 1)
    width, high = (WIDTH - left - right + between) / across - between, (height + between) / down - between
    for number, axis in enumerate(figure.axes):
        x = left + (width + between) * (number % across)
        y = below + (high + between) * (down - 1 - number // across)
        axis.set_position((x / WIDTH, y / inches, width / WIDTH, high / inches))
    return figure


# -- bars


def bars(own: Planned) -> Figure:
    """An arm a bar from 1, the backbone; slowest on top. The paper's ratio, if it has one, stands under the bar."""
    spec = own.spec
    found = own.shown[(own.shown["quantity"] == spec["quantities"][0]) & ~_is_backbone(own.shown)]
    if spec["sorted"]:
        found = found.sort_values("value", ascending=False, kind="stable")
    beside = own.shown.pivot_table(index="row", columns="quantity", values="value")
    numbers = [{name: digits(value) for name, value in beside.loc[row].items()} for row in found["row"]]
    notes = [spec["note"].format_map(own) for own in numbers]
    texts = [f"{digits(value)}{more}" for value, more in zip(found["value"], notes, strict=True)]
    left = _widest(found["label"])
    inches = WIDTH - 0.15 - left
    room = inches / (inches - 0.1 - CHARACTER * max(map(len, texts)))
    figure, (axis,) = blank()
    ends = _from_one(axis, found, found["routing"], room)
    for place, (text, end) in enumerate(zip(texts, ends, strict=True)):
        axis.annotate(text, (end, place), (5, 0), **NOTE)
    axis.set_yticks(range(len(found)), found["label"])
    axis.set_xlabel(spec["axis"])
    routings = [one for name, one in look()["routings"].items() if name in set(found["routing"])]
    handles: list[Artist] = [Patch(color=one["colour"], label=one["name"]) for one in routings]
    handles += _paper_marks(axis, own, list(found["row"])) + _noise_band(axis, own)
    return lay_out(figure, own, left, 0.2 + 0.28 * max(len(found), 2), handles)


def _widest(labels: Iterable[str]) -> float:
    """Inches that names of rows take."""
    return 0.2 + CHARACTER * max(map(len, labels))


def _from_one(axis: Axes, found: pd.DataFrame, routings: Iterable[str], room: float) -> pd.Series:
    """Bars with intervals, counted from 1; where each ends. They leave `room`: the width over what they take of it."""
    low, high = (found[name].fillna(found["value"]) for name in ("low", "high"))
    known = look()["routings"]
    colours = [known[name]["colour"] if name in known else _method(ADAFUSE)[0] for name in routings]
    axis.barh(range(len(found)), found["value"] - 1, left=1, height=0.55, color=colours)
    axis.hlines(range(len(found)), low, high, color=INK, linewidth=1.4)
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
    return high.clip(lower=1)


def _paper_marks(axis: Axes, own: Planned, rows: Sequence[str]) -> list[Artist]:
    """What the paper prints for a row, over what it prints for the backbone; its Figure 1 is one row."""
    printed: dict[str, float] = {}
    for table in (own.source.report.paper[name] for name in own.spec["paper"]):
        ms = {one["arm"]: one["ms_per_token"] for one in table.get("rows", [])}
        printed |= {arm: value / ms["base"] for arm, value in ms.items()}
        printed |= {} if ms else dict.fromkeys(rows, table["adapters_ms"] / table["backbone_ms"])
    marks = [(printed[row], place + 0.38) for place, row in enumerate(rows) if row in printed]
    style: Any = {"marker": "D", "markerfacecolor": "white", "markeredgecolor": INK, "linestyle": "none"}
    return list(axis.plot(*zip(*marks, strict=True), label="paper", zorder=4, **style)) if marks else []


def _noise_band(axis: Axes, own: Planned) -> list[Artist]:
    """Between these ratios an arm cannot be told from the backbone: so far apart are two of the backbone itself."""
    every, first = own.source.numbers, own.shown.iloc[0]
    same = (every["experiment"] == first["experiment"]) & (every["cell"] == first["cell"])
    widths = 1 + every.loc[same & (every["quantity"] == "resolution"), "value"]
    style: Any = {"color": "#fff1b8", "linewidth": 0, "label": "A/A: not resolved", "zorder": 0}
    return [axis.axvspan(1 / widths.max(), widths.max(), **style)] if len(widths) else []


def headline(source: Source) -> Figure | None:
    """What a token costs, launched kernel by kernel and as one captured graph, for someone who has read nothing."""
    spec, panels = look()["headline"], []
    for number, panel in enumerate(spec["panels"]):
        found = _numbers(source, look()["defaults"] | panel).drop_duplicates("row")
        panels.append(found.set_index("row").reindex([row[2 + number] for row in spec["rows"]]))
    if any(found["value"].isna().all() for found in panels):
        return None
    figure, axes = blank(len(panels))
    right = max(found["high"].max() for found in panels)
    for axis, found, panel in zip(axes, panels, spec["panels"], strict=True):
        ends = _from_one(axis, found, [row[1] for row in spec["rows"]], 1)
        axis.barh(range(len(found)), found["value"] * 0 + 1, height=0.55, color=_method("base")[0])
        known = found["value"].notna().to_numpy().nonzero()[0]
        for place, value, end in zip(known, found["value"].iloc[known], ends.iloc[known], strict=True):
            axis.annotate(f"{digits(value)} ×", (end, place), (5, 0), **NOTE, weight="bold")
        axis.set_xticks([1, *range(2, int(right) + 1, 2)])
        axis.set(xlim=(0, 1.22 * right), title=panel["title"], xlabel="time of a token (1 = the model alone)")
        axis.set_yticks(range(len(found)), [row[0] if axis is axes[0] else "" for row in spec["rows"]])
    said = _said(source, pd.concat(panels).dropna(subset="records"))
    caption = " · ".join([*spec["about"], *(text for name, text in said.items() if name != "folder")])
    own = Planned(spec, HEADLINE, spec["title"], caption, "", panels[0], source)
    return lay_out(figure, own, 1.75, 2.4, between=0.3)


# -- lines


def lines(own: Planned) -> Figure:
    """A line an arm or a method; a point is a cell, its bar the interval. Values stand evenly: they double or are
    names. Strategies `apart` have a panel of their own.
    """
    spec, every, quantity = own.spec, own.shown[~_is_backbone(own.shown)], own.spec["quantities"][0]
    found = every[every["quantity"] == quantity]
    settings = zip(*(_setting(found, name) for name in spec["over"]), strict=True)
    found = found.assign(at=list(settings), line=_line_names(spec, found))
    found[["value", "low", "high"]] *= 1 if quantity == "ratio" else 100
    values = sorted(set(found["at"]), key=lambda at: [_order(spec, value) for value in at])
    found["place"] = found["at"].map(values.index) + _shifts(found)
    if spec["place"]:
        shares = every[every["quantity"] == spec["quantities"][1]].set_index(ROW)["value"].rename("share")
        found["place"] = 100 * found.join(shares, on=ROW)["share"]
    looks, apart = _looks(spec, found), found["strategy"].isin(spec["apart"])
    panels = {"merged into the weights": found[apart], "beside the weights": found[~apart]}
    panels = {name: part for name, part in panels.items() if len(part)}
    figure, axes = blank(len(panels))
    for axis, (name, part) in zip(axes, panels.items(), strict=True):
        curves(axis, part, looks)
        axis.set_title(name if len(panels) > 1 else "")
        axis.margins(y=0.14)
        if quantity == "ratio":
            axis.axhline(1, color=INK, linewidth=0.8)
        _name_places(axis, spec, values, part)
    handles = [*_handles(looks), *_levels(axes[-1], own)]
    # of two panels in the middle
    axes[-1].set_ylabel(spec["axis"], y=0.5 if len(axes) == 1 else 1.1)
    axes[-1].set_xlabel(spec["over_axis"])
    axes[0].tick_params(labelbottom=len(axes) == 1)
    height, below = (3.3 if len(axes) > 1 else 2.7), 0.35 + 0.15 * max(1, len(spec["over"]))
    return lay_out(figure, own, 0.65, height, handles, below=below, between=0.32, stacked=True)


def curves(axis: Axes, found: pd.DataFrame, looks: Mapping[str, Json]) -> None:
    """Lines by `line` over `place`, with intervals where there are any."""
    for line, points in found.sort_values("place", kind="stable").groupby("line", sort=False):
        own = looks[str(line)]
        axis.plot(points["place"], points["value"], **own)
        if "low" in points:
            axis.vlines(points["place"], points["low"], points["high"], color=own["color"])
    axis.yaxis.grid(True)


def _handles(looks: Mapping[str, Json]) -> list[Artist]:
    return [Line2D([], [], label=name, **own) for name, own in looks.items()]


def _shifts(found: pd.DataFrame) -> pd.Series:
    """Lines stand a little apart, so that no interval hides another."""
    numbers = found["line"].map({line: number for number, line in enumerate(found["line"].unique())})
    return 0.07 * (numbers - numbers.max() / 2)


def _name_places(axis: Axes, spec: Json, values: Sequence[tuple[Any, ...]], part: pd.DataFrame) -> None:
    """The settings, on the axis or below each point."""
    if spec["place"]:
        axis.set_xlim(left=0)
        below: Any = NOTE | {"ha": "center", "va": "top", "fontsize": 7.5}
        for at, place, low in zip(part["at"], part["place"], part["low"].fillna(part["value"]), strict=True):
            axis.annotate(f"{at[0]:g}", (place, low), (0, -3), **below)
        return
    words = [[spec["words"].get(setting, setting) for setting in value] for value in values]
    ticks = spec["ticks"] or ["{}"] * len(spec["over"])
    axis.set_xticks(range(len(values)), ["\n".join(map(str.format, ticks, own)) for own in words])
    axis.set_xlim(-0.5, len(values) - 0.5)


def _line_names(spec: Json, found: pd.DataFrame) -> list[str]:
    """The label of an arm; of a method its name, with the settings by which a figure splits it."""
    if spec["quantities"][0] == "ratio":
        return list(found["label"])
    names = [[_method(method)[1]] for method in found["method"]]
    for name, words in spec["split"].items():
        for own, value in zip(names, _setting(found, name), strict=True):
            own += [words[value]] if value in words else []
    return [", ".join(own) for own in names]


def _looks(spec: Json, found: pd.DataFrame) -> dict[str, Json]:
    """A colour and a mark for each line of a figure, no two alike, and none as a level's."""
    looks: dict[str, Json] = {}
    levels = set(spec["levels"].get("methods", [])) - set(found["method"])
    taken = {_method(name)[0] for name in levels}
    rows = found.drop_duplicates("line")[["line", "method", "strategy"]]
    for mark, (line, method, strategy) in zip(cycle(MARKS), rows.itertuples(index=False)):
        wanted = [look()["strategies"].get(strategy)] if method == ADAFUSE else []
        wanted += [_method(method)[0], *look()["spare"]]
        colour = next(one for one in wanted if one and one not in taken)
        taken.add(colour)
        looks[line] = {"color": colour, "marker": mark, "linestyle": "-" if spec["joined"] else "none"}
    return looks


def _order(spec: Json, value: Any) -> tuple[int, float, str]:
    """Words as figures.yaml has them, numbers by size, other names by letter."""
    if value in spec["words"]:
        return 0, list(spec["words"]).index(value), ""
    return (0, float(value), "") if isinstance(value, (int, float)) else (1, 0.0, str(value))


def _levels(axis: Axes, own: Planned) -> list[Artist]:
    """Methods without the setting that is varied, of the same backbone and data, as dashed lines."""
    levels, quantity = own.spec["levels"], own.spec["quantities"][0]
    if not levels:
        return []
    found = _numbers(own.source, own.spec | {"where": {}, "experiments": levels["experiments"]})
    found = found[found["method"].isin(levels["methods"]) & (found["quantity"] == quantity)]
    same = ["machine", "model", "data", "level", "train_items", "budget", "count", "rank", "top_k"]
    # as text, because what is not set is no number
    near = (found[same].map(str) == own.shown[same].map(str).iloc[0]).all(axis=1)
    handles: list[Artist] = []
    for method, value in found.loc[near, ["method", "value"]].itertuples(index=False):
        colour, name = _method(method)
        handles.append(
            axis.axhline(100 * value, color=colour, label=name + levels.get("label", ""), **DASHED)
        )
    return handles


# -- drift, loss, routers, launches


def drift(own: Planned) -> Figure:
    """Errors of weights and logits over the number of switches, a line for each strategy and dtype."""
    keys = own.source.report.frames.lines("drift")[["strategy", "dtype", "switches"]].drop_duplicates()
    # as the rows are called
    keys["row"] = [" ".join(map(str, key)) for key in keys.itertuples(index=False)]
    keys = keys.rename(columns={"switches": "place"})
    found = own.shown[["row", "quantity", "value"]].merge(keys, on="row")
    found["line"] = found["strategy"] + ", " + found["dtype"]
    # an error of nothing has no place on a log axis
    found["value"] = found["value"].where(found["value"] > 0)
    looks: dict[str, Json] = {}
    for line, strategy, dtype in sorted(found[["line", "strategy", "dtype"]].itertuples(index=False)):
        colour, dash = look()["strategies"].get(strategy, FAINT), DASHES[dtype]
        looks[line] = {"color": colour, "marker": dash[0], "linestyle": dash[1:]}
    figure, axes = blank(2)
    for axis, (quantity, words) in zip(axes, own.spec["words"].items(), strict=True):
        curves(axis, found[found["quantity"] == quantity], looks)
        axis.set(xscale="log", yscale="log", xlabel="switches", ylabel=words)
        axis.set_title(quantity.replace("_", " "))
        for one in (axis.xaxis, axis.yaxis):
            one.set_major_formatter("{x:g}")
        axis.minorticks_off()
        axis.grid(True)
    return lay_out(figure, own, 0.75, 2.7, _handles(looks), between=0.85)


def loss(own: Planned) -> Figure:
    """Training loss, mean over seeds: of the backbone, if it was pre-trained here, and of each method on it."""
    runs, every = own.source.report.frames.runs, own.source.report.frames.lines("loss")
    near = runs[(runs["task"] == "pretrain") & (runs["folder"] == own.shown["folder"].iloc[0])]
    under = near.index[near["config"].map(_backbone).isin(set(own.shown["config"].map(_backbone)))]
    fitted = every.merge(own.shown[["record", "method"]], on="record")
    stages = {"pre-training the backbone": every[every["record"].isin(under)].assign(method="base")}
    stages = {name: part for name, part in (stages | {"training adapters": fitted}).items() if len(part)}
    methods = sorted(fitted["method"].unique(), key=rank)
    looks = {name: {"color": _method(name)[0]} for name in methods}
    figure, axes = blank(len(stages))
    for axis, (name, part) in zip(axes, stages.items(), strict=True):
        steps = np.sort(part["step"].unique())
        kept = part[part["step"].isin(steps[:: math.ceil(len(steps) / MOST_POINTS)])]
        mean = kept.groupby(["method", "step"])["loss"].mean().reset_index()
        mean = mean.rename(columns={"method": "line", "step": "place", "loss": "value"})
        curves(axis, mean, looks | {"base": {"color": INK}})
        axis.set(title=name, xlabel="step", ylabel="nats per token")
        axis.set_ylim(bottom=0)
        axis.grid(True)
    return lay_out(figure, own, 0.6, 2.4, _handles({_method(name)[1]: own for name, own in looks.items()}))


def _backbone(config: Json) -> str:
    """What a backbone is made of."""
    return json.dumps([config.get("model"), config.get("pretrain")], sort_keys=True)


def load(own: Planned) -> Figure:
    """The token router's load by family in the first seed, and what each router of the gate per layer tells of the
    family. Experts have no common numbers over seeds, so that their loads cannot be averaged.
    """
    uses, shown = own.source.uses, own.shown.sort_values("seed", kind="stable")
    token, layered = (shown.loc[shown["method"] == method, "record"] for method in (ADAFUSE, TWIN))
    loads = 100 * routing.load_map(uses, token.iloc[0])
    figure, axes = blank(2)
    _mesh(axes[0], loads.to_numpy(), "% of the chosen slots", list(loads.columns), list(loads.index))
    axes[0].set(xlabel="expert", title=f"AdaFuse, seed {shown.loc[token.index[0], 'seed']}")
    axes[1].set_visible(len(layered) > 0)
    if len(layered):
        _told(axes[1], routing.told_by_router(uses, layered), routing.told_by_router(uses, token).iloc[0])
    handles = axes[1].get_lines()[1:]
    return lay_out(figure, own, 0.95, 0.5 + 0.22 * len(loads), handles, between=1.5)


def _told(axis: Axes, told: pd.Series, single: float) -> None:
    """A point a router of the gate per layer; the lines are their mean, and the one router."""
    colour, name = _method(TWIN)
    axis.plot(range(len(told)), told, ".", color=colour)
    axis.axhline(told.mean(), color=colour, label=f"{name}, mean {told.mean():.2f}", **DASHED)
    axis.axhline(single, color=_method(ADAFUSE)[0], label=f"AdaFuse {single:.2f}")
    names = _block_names(told.index)
    axis.set_xticks([place for place, name in enumerate(names) if name], filter(None, names))
    axis.set_ylim(0, 1.15 * max(told.max(), single, 0.01))
    axis.yaxis.grid(True)
    axis.set(xlabel="router, by block of the backbone", ylabel="of the family's entropy")
    axis.set_title("family told by a choice")


def _block_names(routers: Iterable[str]) -> list[str]:
    """A block's name at its middle router, and none elsewhere; not of every block where they are many."""
    blocks = pd.Series(routing.blocks(routers))
    places = blocks.groupby(blocks, sort=False).apply(lambda own: own.index[len(own) // 2])
    shown = set(places.iloc[:: math.ceil(len(places) / MOST_LABELS)])
    return [block if place in shown else "" for place, block in enumerate(blocks)]


def agreement(own: Planned) -> Figure:
    """Pairs of routers, mean over adapters; pairs of blocks where routers are many. None is compared with itself."""
    records = own.shown.loc[own.shown["method"] == TWIN, "record"]
    found = routing.agreement(own.source.report.frames, records)
    assert found is not None, "planned for records that compare routers"
    shown = pd.DataFrame(np.where(np.eye(len(found[0])), np.nan, found[1]))
    mean, routers = shown.stack().mean(), found[0]
    if len(routers) > MOST_ROUTERS:
        blocks = pd.Series(routing.blocks(routers))
        shown = shown.groupby(blocks, sort=False).mean().T.groupby(blocks, sort=False).mean().T
        routers = list(blocks.unique())
    figure, (axis,) = blank()
    names, words = _block_names(routers), "normalised mutual information\nof two routers' first choices"
    _mesh(axis, shown.to_numpy(), words, names, names)
    axis.set(xlabel="router, by block of the backbone", ylabel="router, by block of the backbone")
    axis.set_title(f"{_method(TWIN)[1]}: mean {mean:.2f}, {len(records)} adapters")
    return lay_out(figure, own, 0.65, 3.6, right=WIDTH - 0.65 - 3.6)


def _mesh(
    axis: Axes, values: NDArray[np.float64], words: str, columns: Sequence[Any], rows: Sequence[Any]
) -> None:
    """Squares in shades of blue, row 0 on top, and beside them what the shades mean. Empty names have no tick."""
    top = max(0.1, float(np.nanmax(values)))
    _shade(axis, values / top)
    for set_ticks, names in ((axis.set_xticks, columns), (axis.set_yticks, rows)):
        named = [place for place, name in enumerate(names) if name != ""]
        set_ticks([place + 0.5 for place in named], [str(names[place]) for place in named])
    scale = axis.inset_axes((1.03, 0, 0.05, 1))
    _shade(scale, (np.arange(SHADES)[::-1, None] + 0.5) / SHADES)
    scale.axis("off")
    for tick in MaxNLocator(5).tick_values(0, top):
        if tick <= top:
            scale.annotate(f"{tick:g}", (1, SHADES * (1 - tick / top)), (3, 0), **NOTE)
    upright: Any = NOTE | {"rotation": 90, "rotation_mode": "anchor", "ha": "center", "va": "top"}
    scale.annotate(words, (1, SHADES / 2), (26, 0), **upright)


def _shade(axis: Axes, shares: NDArray[np.float64]) -> None:
    """An outline for each shade: a picture's bytes would depend on libraries."""
    blues = mpl.colormaps["Blues"].resampled(SHADES)
    shades = np.floor(np.clip(shares, 0, 1 - 1e-9) * SHADES)
    axis.set(facecolor="#d8dee4", xlim=(0, shares.shape[1]), ylim=(shares.shape[0], 0))
    axis.tick_params(length=0)
    for shade in np.unique(shades[~np.isnan(shades)]):
        corners = np.argwhere(shades == shade)[:, None, ::-1] + [[0, 0], [1, 0], [1, 1], [0, 1]]
        outline = Outline.make_compound_path_from_polys(corners.astype(float))
        # not add_patch, which would look for the limits again
        axis.add_artist(PathPatch(outline, facecolor=blues(int(shade)), linewidth=0, antialiased=False))


def launches(own: Planned) -> Figure:
    """One token of each arm, launch by launch."""
    figure, (axis,) = blank()
    lanes = timeline.lanes(own.source.report.frames, own.shown)
    handles = timeline.draw(axis, lanes, look()["parts"])
    return lay_out(figure, own, _widest([lane.label for lane in lanes]), 0.2 + 0.38 * len(lanes), handles)


DRAW: dict[str, Callable[[Planned], Figure]] = {
    own.__name__: own for own in (bars, lines, drift, loss, load, agreement)
}
DRAW["timeline"] = launches
