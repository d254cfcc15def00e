"""Draw the report: records in; one page, figures, verdicts, tables and the README's block out. The last thing `make
reproduce` does.

Example: python scripts/report.py --records results/runs/records --out results/runs/report
Published (--readme) is less: tables as Markdown say no more than the page, and are left out.
"""

from __future__ import annotations

import argparse
import gc
import gzip
import os
import re
import sys
import tempfile
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adafuse import archive, report
from adafuse.files import put, read_bytes
from adafuse.report import compare, load_measurements, membership, page
from adafuse.report.formats import ours_text
from adafuse.report.rules import IN_PART, NOT_REPLICATED, REPLICATED

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
CURE = "draw it again with scripts/report.py, without --check"
WIDE = 130
COLUMNS = (("where", 2), ("claim", 6), ("paper", 3), (escape("ours [95 %]"), 4), ("verdict", 3), ("why", 6))
COLOURS = {REPLICATED: "green", IN_PART: "yellow", NOT_REPLICATED: "red"}
# A figure's coordinates may differ in the last digit between processors.
TOLERANCE = 0.02
SVG = re.compile(r"<svg.*?</svg>", re.DOTALL)
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?|-?\d+")


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--records", nargs="+", type=Path, required=True, help="folders or archives of records"
    )
    parser.add_argument(
        "--membership", type=Path, help="which experiments they are of; left out: beside the records"
    )
    parser.add_argument(
        "--out",
        type=Path,
        help="folder that gets report.html, measurements.csv.gz, claims.csv, figures/ and, without --readme, tables/",
    )
    parser.add_argument(
        "--readme", type=Path, help="README whose block is renewed, with docs/results.md beside it"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; fail if anything would change")
    parser.add_argument(
        "--compare",
        type=Path,
        metavar="CSV",
        help="only say how these records differ from measurements.csv.gz",
    )
    options = parser.parse_args(arguments)
    try:
        return _run(options)
    except (ValueError, OSError) as error:
        print(_plain(error), file=sys.stderr)
        return 1


def _run(options: argparse.Namespace) -> int:
    if options.out is None and options.compare is None:
        raise ValueError("--out is missing: name the folder that the report is to be written into")
    # nothing that is read is thrown away before the end: looking for what could be takes a second and a half
    gc.disable()
    loaded = archive.load(options.records)
    for line in loaded.left_out:
        print(f"left out: {_plain(line)}", file=sys.stderr)
    found = report.build(loaded.records, _membership(options))
    if options.compare:
        return _compare(found, options)
    told = page.page(found)
    if options.check:
        return _check(told, options)
    if options.readme:
        _refuse_dirty(found)
    _write(told, options.out, options.readme)
    _print_claims(told)
    _print_records(found)
    print(f"page:    {options.out / 'report.html'}")
    print(
        f"figures: {options.out / 'figures'}"
        + ("" if options.readme else f", tables: {options.out / 'tables'}")
    )
    return 0


def _membership(options: argparse.Namespace) -> membership.pd.DataFrame | None:
    """The file that was named, or the first that lies in or beside a folder of records."""
    near = [folder / "membership.csv" for path in options.records for folder in (path, path.parent)]
    chosen = options.membership or next((path for path in near if path.exists()), None)
    return membership.read(chosen) if chosen else None


def _write(told: page.Page, out: Path, readme: Path | None) -> None:
    """What is published, with docs/results.md beside the README; without one that and all tables lie in `out`."""
    drawn = page.write(told, out)
    docs, folder = out, "."
    if readme:
        docs, folder = readme.parent / "docs", f"../{out.resolve().relative_to(readme.resolve().parent)}"
        put(readme, _inserted(readme, page.readme_block(told)))
    else:
        page.write_tables(told, out / "tables")
    put(docs / "results.md", page.rendered("results.md", page=told, figures=drawn, folder=folder))


def _inserted(readme: Path, text: str) -> str:
    """The README with `text` between its markers. Raises ValueError if the markers are missing."""
    try:
        old = read_bytes(readme).decode()
    except OSError:
        raise ValueError(f"no file {readme}: pass the README with --readme") from None
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{readme} needs the lines {BEGIN} and {END} once each, in this order")
    return f"{old[: old.index(BEGIN) + len(BEGIN)]}\n\n{text.strip()}\n\n{old[old.index(END) :]}"


def _refuse_dirty(found: report.Report) -> None:
    """Raise ValueError if a record that would be published was made from changed sources."""
    runs = found.frames.runs
    for name in runs.loc[runs["dirty"].map(lambda dirty: dirty is not False), "name"]:
        raise ValueError(f"record {name} was made from uncommitted sources: commit, then measure again")


def _check(told: page.Page, options: argparse.Namespace) -> int:
    """Draw what is published anew elsewhere and compare."""
    with tempfile.TemporaryDirectory() as folder:
        fresh, kept, readme = Path(folder) / options.out.name, options.out, options.readme
        if readme:
            (fresh.parent / readme.name).write_text(readme.read_text())
        _write(told, fresh, fresh.parent / readme.name if readme else None)
        pairs = [
            (path, kept / path.name) for path in fresh.iterdir() if path.suffix in (".html", ".csv", ".gz")
        ]
        names = {path.name for folder in (fresh, kept) for path in (folder / "figures").glob("*")}
        pairs += [(fresh / "figures" / name, kept / "figures" / name) for name in names]
        if readme:
            docs = Path("docs") / "results.md"
            pairs += [(fresh.parent / name, readme.parent / name) for name in (docs, readme.name)]
        found = sorted(one.name for one, two in pairs if not _same(one, two))
    if found:
        print(f"{options.out} differs from the records in {', '.join(found)}: {CURE}", file=sys.stderr)
        return 1
    print(f"{options.out} agrees with its records")
    return 0


def _same(fresh: Path, kept: Path) -> bool:
    """Text to the letter, SVG coordinates within TOLERANCE, PNG by name alone: its bytes hang on matplotlib's build."""
    if not fresh.is_file() or not kept.is_file():
        return False
    if fresh.suffix == ".png":
        return True
    one, two = map(_text, (fresh, kept))
    drawn = list(zip(SVG.findall(one), SVG.findall(two), strict=False))
    return one == two or (SVG.sub("", one) == SVG.sub("", two) and all(_near(*pair) for pair in drawn))


def _text(path: Path) -> str:
    content = path.read_bytes()
    return (gzip.decompress(content) if path.suffix == ".gz" else content).decode()


def _near(one: str, two: str) -> bool:
    left, right = NUMBER.findall(one), NUMBER.findall(two)
    close = all(abs(float(a) - float(b)) <= TOLERANCE for a, b in zip(left, right, strict=False))
    return NUMBER.sub("#", one) == NUMBER.sub("#", two) and close


def _compare(found: report.Report, options: argparse.Namespace) -> int:
    rows = compare.compare(found.measurements, load_measurements(options.compare))
    text = page.rendered("compare.md", found=rows, outcomes=compare.OUTCOMES)
    print("\n".join(map(_plain, text.splitlines())))
    if options.out:
        put(options.out / "compare.md", text)
    return 0


def _print_claims(told: page.Page) -> None:
    console = Console()
    # Reasons need room; they stand in the page anyway.
    columns = COLUMNS if console.width >= WIDE else COLUMNS[:-1]
    for cell, claims in groupby(told.claims, key=lambda claim: claim.cell):
        table = Table(
            title=escape(_plain(cell.name.title if cell else "Not run")), title_justify="left", expand=True
        )
        for name, share in columns:
            table.add_column(name, ratio=share, overflow="fold")
        for claim in claims:
            verdict, ours = claim.verdict, ours_text(claim.ours)
            texts = [escape(_plain(text)) for text in (claim.where, claim.text, claim.printed, ours)]
            texts += [f"[{COLOURS.get(verdict.verdict, 'dim')}]{verdict.verdict}[/]", escape(verdict.why)]
            table.add_row(*texts[: len(columns)])
        console.print(table)


def _print_records(found: report.Report) -> None:
    """How many there are, and those that could not be read or that no experiment names, a line each."""
    status = found.frames.runs["status"].value_counts()
    failed, unfinished = (int(status.get(name, 0)) for name in ("error", "unfinished"))
    withdrawn = found.frames.runs["withdrawn"].ne("").sum()
    print(
        f"{len(found.frames.runs):,} records: {failed} with errors, {unfinished} unfinished, {withdrawn} withdrawn"
    )
    for name, reason in found.frames.left_out.items():
        print(f"left out: {_plain(name)}: {reason}")
    for record in found.frames.unlisted:
        print("in no membership:", _plain(found.frames.runs.at[record, "name"]))


def _plain(text: object) -> str:
    """What records say, with nothing in it that moves a terminal."""
    return "".join(c if c.isprintable() else " " for c in str(text))


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    # to give back the memory of all records piece by piece takes a second
    os._exit(status)
