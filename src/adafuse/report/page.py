"""The report as text: one self-contained HTML page, docs/results.md and the README's block, all by templates.

In: a `Report` and the specifications in results/. Out: a `Page`, and its files. Next: scripts/report.py.

At most six sentences answer the reader who must decide. Each has a predicate over the measurements and a text for
either outcome; it is said of the first cell that has all its numbers, and left out where none has.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
import yaml
from markupsafe import Markup

from adafuse.report import Report, figures, formats, measurements, rules, tables
from adafuse.report.board import Board, Place
from adafuse.report.claims import Claim, Json, agrees, all_claims, all_goals
from adafuse.report.rules import Difference, Number
from adafuse.report.tables import Table

RESULTS = Path(__file__).resolve().parents[3] / "results"
# what the README's block may hold of its 15 KB
BLOCK_BYTES = 6000
# where a claim's number stands on the page, by kind
SHOWN_IN = {"time": ("table6", "table1", "layers"), "memory": ("table5",), "count": ("table1",)}
SHOWN_IN |= {"accuracy": ("table2", "table3", "table4"), "goal": ("attribution", "kernels")}
COLOURS = {rules.REPLICATED: "holds", rules.MET: "holds", rules.IN_PART: "in-part"}
COLOURS |= {rules.NOT_REPLICATED: "fails", rules.MISSED: "fails"}


@dataclass(frozen=True)
class Page:
    """What a report says: claims, goals, sentences and tables; `specs` holds claims.yaml and tables.yaml by name."""

    report: Report
    specs: dict[str, Json]

    @cached_property
    def board(self) -> Board:
        return Board(self.report.measured, self.report.frames.runs)

    @cached_property
    def claims(self) -> list[Claim]:
        return all_claims(self.board, self.specs["claims"], self.report.paper)

    @cached_property
    def goals(self) -> list[Claim]:
        return all_goals(self.board, self.specs["claims"])

    @cached_property
    def sentences(self) -> list[str]:
        return sentences(self.board, self.specs["claims"]["sentences"], self.claims)

    @cached_property
    def tables(self) -> list[Table]:
        """Verdicts first."""
        about = {one["name"]: one["about"] for one in self.specs["tables"]["own"]}
        return [
            tables.claims_table(self.claims, self.board, rendered("rules.md")),
            tables.goals_table(self.goals, about["goals"]),
            *tables.all_tables(self.board, self.specs["tables"], self.report.paper),
            tables.records_table(self.report.frames.runs, self.board, about["records"]),
        ]

    def table(self, name: str) -> Table:
        """One of the tables by name."""
        return next(table for table in self.tables if table.name == name)


def page(report: Report, folder: Path = RESULTS) -> Page:
    """What is told of a report; `folder` holds the specifications."""
    texts = {name: (folder / f"{name}.yaml").read_text() for name in ("claims", "tables")}
    return Page(report, {name: yaml.safe_load(text) for name, text in texts.items()})


def write(found: Page, out: Path) -> list[figures.Planned]:
    """Write everything but docs/results.md and the README below `out`; returns the figures."""
    drawn = figures.draw(found.report, out / "figures")
    (out / "tables").mkdir(parents=True, exist_ok=True)
    for table in found.tables:
        (out / "tables" / f"{table.name}.md").write_text(tables.markdown(table))
    # the numbers of all other tables stand in measurements.csv
    for name in ("claims", "goals"):
        path = out / "tables" / f"{name}.csv"
        tables.frame(found.table(name)).to_csv(path, index=False, float_format="%.6g", lineterminator="\n")
    measurements.write(found.report.measurements, out / "measurements.csv")
    (out / "report.html").write_text(html(found, drawn, out / "figures"))
    return drawn


def html(found: Page, drawn: list[figures.Planned], folder: Path) -> str:
    """The whole page, which loads nothing; the figures' SVG is read from `folder`."""
    pictures = [(own, _inline(folder / own.file)) for own in drawn]
    lines = {
        (table.name, *line.key[1:]): _id(table.name, line.key)
        for table in found.tables
        for section in table.sections
        for line in section.lines
    }
    by_cell: dict[Place | None, list[Claim]] = {}
    for claim in found.claims:
        by_cell.setdefault(claim.place, []).append(claim)
    own = {"pictures": pictures, "by_cell": by_cell, "machines": _machines(found.report.frames.runs)}
    return rendered("report.html", page=found, links=lambda claim: _links(claim, lines), **own)


def results_md(found: Page, drawn: list[figures.Planned], folder: str) -> str:
    """docs/results.md; `folder` is the way from it to the other files."""
    return rendered("results.md", page=found, figures=drawn, folder=folder)


def readme_block(found: Page) -> str:
    """What stands between the README's markers: the sentences, and the claims of the headline cell."""
    first = next((claim.place for claim in found.claims if claim.place), None)
    own = [claim for claim in found.claims if claim.place == first and first]
    block = rendered("readme.md", page=found, claims=own, cell=found.board.name(first) if first else None)
    assert len(block.encode()) <= BLOCK_BYTES, f"the README's block has {len(block.encode())} bytes"
    return block


def rendered(template: str, **names: Any) -> str:
    """A template of templates/, filled."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    environment = _environment(loader, autoescape=template.endswith(".html"))
    return environment.get_template(f"{template}.j2").render(**names)


def tally(claims: Iterable[Claim]) -> list[tuple[str, dict[str, int]]]:
    """By kind of claim how many have which verdict."""
    by_kind: dict[str, dict[str, int]] = {}
    for claim in claims:
        counts = by_kind.setdefault(claim.kind, dict.fromkeys(rules.VERDICTS, 0))
        counts[claim.verdict.verdict] += 1
    return [(kind, counts) for kind, counts in by_kind.items() if kind]


def _environment(loader: jinja2.BaseLoader | None = None, autoescape: bool = False) -> jinja2.Environment:
    blocks = {"trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    own = jinja2.Environment(loader=loader, autoescape=autoescape, **blocks)  # type: ignore[arg-type]
    own.filters |= {"ratio": formats.ratio_text, "points": formats.points_text, "ours": formats.ours_text}
    own.filters |= {
        "share": partial(formats.plain, "share"),
        "tally": tally,
        "grid": tables.section_markdown,
        "linked": _linked,
    }
    own.filters["colour"] = lambda found: COLOURS.get(found.verdict, COLOURS.get(found.word, "open"))
    own.globals |= {"rules": rules, "lines": _lines}
    return own


def _inline(path: Path) -> str:
    """An SVG as a part of a page: without what only a file of its own needs."""
    return re.sub(r"^.*?(?=<svg)", "", path.read_text(), flags=re.DOTALL)


def _lines(section: tables.Section, table: str) -> Iterator[tuple[str, list[str], tuple[str, ...]]]:
    """Lines as the page prints them: an id where a cell's row is met first, texts, records."""
    names, before = section.headings, ""
    for line in section.lines:
        own = _id(table, line.key) if line.key else ""
        texts = [line.shown.get(name, tables.NOTHING).text for name in names]
        yield "" if own == before else own, texts, line.records
        before = own


def _linked(records: tuple[str, ...], most: int) -> Markup:
    """The records behind a number, each leading to its line in the table of records."""
    link = Markup('<a href="#{}">{}</a> ').format
    links = Markup("").join(link(_id("records", [record]), record[:6]) for record in records[:most])
    return links + (f"and {len(records) - most} more" if len(records) > most else "")


def _id(table: str, key: Iterable[str]) -> str:
    """The id of a line of a table on the page, from its cell and row."""
    return re.sub(r"[^\w.+=-]+", "_", "-".join([table, *filter(None, key)]))


def _links(claim: Claim, lines: dict[tuple[str, ...], str]) -> list[tuple[str, str]]:
    """Where a claim's number and its check stand on the page."""
    if claim.place is None:
        return []
    wanted = [*((name, "measurement") for name in SHOWN_IN[claim.kind]), ("checks", "check")]
    keys = {(name, claim.place.cell, claim.row): word for name, word in reversed(wanted)}
    found = {word: lines[key] for key, word in keys.items() if key in lines}
    return list(found.items())[::-1]


def _machines(runs: pd.DataFrame) -> pd.DataFrame:
    """Every machine that left records, with its software and how many there are."""
    facts = ["machine", "host", "driver", "torch", "python"]
    counted = runs[facts].fillna("").astype(str).value_counts(sort=False).reset_index(name="records")
    return counted.sort_values(facts)


def sentences(board: Board, specs: list[Json], claims: list[Claim]) -> list[str]:
    """Each sentence that the measurements carry, in the words of its outcome."""
    return [said for spec in specs if (said := _sentence(board, spec, claims))]


def _sentence(board: Board, spec: Json, claims: list[Claim]) -> str | None:
    places = board.places(spec["experiments"])
    places = [place for place in places if not (spec.get("only") == "gpu" and board.name(place).is_cpu)]
    places.sort(key=lambda place: not agrees(board.facts(place), spec.get("prefer", {})))
    environment = _environment()
    for place in places:
        names = {name: _looked_up(board, place, how, claims) for name, how in spec["values"].items()}
        if all(value is not None for value in names.values()):
            names |= {"model": board.facts(place).get("model"), "machine": board.name(place).machine}
            holds = environment.compile_expression(spec["holds"])(**names)
            return environment.from_string(spec["text"] if holds else spec["turned"]).render(**names)
    return None


def _looked_up(board: Board, place: Place, how: Json, claims: list[Claim]) -> Any:
    """One value that a sentence needs; None where the cell does not have it."""
    if "claim" in how:
        own = (claim for claim in claims if claim.place == place and claim.id == how["claim"])
        return next((claim for claim in own if isinstance(claim.ours, Number)), None)
    if "studies" in how:
        return _studies(board, how)
    if "best" in how:
        return _best(board, place, how)
    if "spared" in how:
        return _spared(board, place, how)
    return _enough(board.number(place, how["row"], how["quantity"]))


def _enough(found: Number | None) -> Number | None:
    """None for a difference that stands on fewer seeds than decide."""
    return None if isinstance(found, Difference) and found.n < rules.MIN_SEEDS else found


def _studies(board: Board, how: Json) -> list[Json] | None:
    """A difference in every study that has it, with its verdict; the same weights again are no further study."""
    found: dict[str, Json] = {}
    for place in board.places(how["studies"]):
        number, model = (
            _enough(board.number(place, how["row"], how["quantity"])),
            board.facts(place).get("model"),
        )
        same = board.find(place, "study", "same_weights")
        if isinstance(number, Difference) and not (
            same and same.reason in {own["model"] for own in found.values()}
        ):
            word = rules.judge_difference(number).word
            found[f"{place}"] = {"number": number, "word": word, "model": model}
    return list(found.values()) or None


def _best(board: Board, place: Place, how: Json) -> Number | None:
    """A quantity of that row of a method which is highest by another one."""
    own = [row for row in board.rows(place) if board.row(place, row).method == how["best"]]
    known = {row: value for row in own if (value := board.value(place, row, how["by"])) is not None}
    best = max(known, key=lambda row: known[row], default=None)
    return _enough(board.number(place, best, how["quantity"])) if best else None


def _spared(board: Board, place: Place, how: Json) -> Json | None:
    """The largest share of tokens without experts that, as every smaller one, rules out a loss of more than MARGIN."""
    costs = {}
    for row in board.rows(place):
        share, cost = board.value(place, row, how["spared"]), board.number(place, row, how["quantity"])
        if share is not None and isinstance(cost, Difference) and _enough(cost):
            costs[share] = cost
    kept = list(takewhile(lambda share: 100 * costs[share].low90 > -rules.MARGIN, sorted(costs)))
    return {"share": kept[-1] if kept else 0.0, "cost": costs[kept[-1]] if kept else None} if costs else None
