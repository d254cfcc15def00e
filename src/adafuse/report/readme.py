"""The generated block of README.md, and the check that nothing in the repository differs from its records.

In: findings, the README, the folder with tables and figures. Out: the text between two markers; or one line
that names what differs. Next: scripts/report.py.
"""

from __future__ import annotations

import re
import tempfile
from dataclasses import replace
from pathlib import Path

from adafuse.report import (
    Findings,
    accuracy_sheet,
    accuracy_table,
    claims,
    conclusions,
    draw,
    findings,
    findings_accuracy,
    goals,
    scan_table,
    tables,
)
from adafuse.report.cells import short_name
from adafuse.report.sheet import Sheet, section_parts
from adafuse.report.verdicts import Claim

BEGIN, END = "<!-- results:begin -->", "<!-- results:end -->"
# how the headings of its cells begin (cells.title)
CPU = "CPU"
# where claims on accuracy stand in the paper
ACCURACY = ("Table 2", "Table 3", "Table 4")
CURE = "draw it again with scripts/report.py, without --check"
# A figure's coordinates may differ in the last digit between processors.
TOLERANCE = 0.02
NUMBER = re.compile(r"-?\d+\.\d+(?:e-?\d+)?|-?\d+")


def block(found: Findings, out: Path, readme: Path) -> str:
    """What stands between the markers: verdicts, the first cell of each table, goals (of a GPU), and figures."""
    folder = _relative(out, readme)
    parts = ["Generated from the records by `scripts/report.py`; CI draws it again and compares."]
    said = findings.sentences(found.latency, found.traces, found.drift)
    said += findings_accuracy.sentences(found.trained)
    concluded = conclusions.paragraphs(found.latency, found.claims, found.trained)
    parts += ["### Conclusions", concluded] if concluded else []
    parts += ["### What was found", "\n".join(said)] if said else []
    on_gpu = [cell for cell in found.latency if not cell.is_cpu]
    latency = on_gpu or found.latency
    timed = [kind(latency, found.paper) for kind in (tables.table1, tables.table5, tables.table6)]
    beside = {section.heading for section in timed[0].sections[1:]}
    told = [claim for claim in _without_cpu(found.claims) if claim.cell not in beside]
    hidden = len({claim.cell for claim in found.claims} - {claim.cell for claim in told})
    parts += ["### Verdicts", *_sheet_parts(claims.sheet(told)), *_elsewhere(hidden, "claims", folder)]
    for table in (*timed, _table2(found)):
        first = replace(table, sections=table.sections[:1])
        parts += [
            f"### {table.title}",
            *_located(_sheet_parts(first, with_records=table in timed), found, readme),
        ]
        parts += _elsewhere(len(table.sections) - 1, table.name, folder)
    accuracies = accuracy_sheet.sheet(found.trained)
    if "reason" not in accuracies.sections[0].rows[0]:
        parts += [f"### {accuracies.title}", *_sheet_parts(accuracies)]
    if goals.gpus(found.latency, found.kernels):
        own = goals.sheet(found.latency, found.kernels)
        parts += [f"### {own.title}", *_sheet_parts(own)]
    scanned = scan_table.sheet(on_gpu)
    if on_gpu and scanned.sections[0].rows[0].get("_arms"):
        parts += [f"### {scanned.title}", *_sheet_parts(scanned)]
    # of several cells of one kind the first, which is a GPU's if there is one
    drawn = sorted(path for path in (out / "figures").glob("*.svg") if "_cell" not in path.stem)
    if drawn:
        parts.append("### Figures")
    parts += [f"![{path.stem}]({folder}/figures/{path.name})" for path in drawn]
    names = sorted(path.name for path in (out / "tables").glob("*.md"))
    parts.append("All tables: " + " · ".join(f"[{Path(n).stem}]({folder}/tables/{n})" for n in names) + ".")
    return "\n\n".join(parts)


def _without_cpu(all_claims: list[Claim]) -> list[Claim]:
    """A CPU's word on the cost of what a GPU has timed stands in table claims alone; accuracy is the same on both."""
    answered = {
        claim.where for claim in all_claims if not claim.cell.startswith(CPU) and claim.ours is not None
    } - set(ACCURACY)
    return [claim for claim in all_claims if not (claim.cell.startswith(CPU) and claim.where in answered)]


def insert(readme: Path, text: str) -> str:
    """The README with `text` between its markers. Raises ValueError if the markers are missing."""
    try:
        old = readme.read_text()
    except OSError:
        raise ValueError(f"no file {readme}: pass the README with --readme") from None
    if old.count(BEGIN) != 1 or old.count(END) != 1 or old.index(BEGIN) > old.index(END):
        raise ValueError(f"{readme} needs the lines {BEGIN} and {END} once each, in this order")
    return old[: old.index(BEGIN) + len(BEGIN)] + f"\n\n{text}\n\n" + old[old.index(END) :]


def refuse_dirty(found: Findings) -> None:
    """Raise ValueError if a record that would be published was made from changed sources."""
    for record in found.records:
        if record.run.get("dirty") is not False:
            raise ValueError(
                f"record {short_name(record)} was made from uncommitted sources: commit, then measure again"
            )


def check(found: Findings, out: Path, readme: Path | None) -> str | None:
    """Draw everything again elsewhere and compare; one line that names what differs, or None.

    PNG files are compared by name only, because their bytes depend on the build of matplotlib.
    """
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        draw(found, fresh)
        for kind in ("tables", "figures"):
            names = {path.name for path in (fresh / kind).glob("*")}
            differing = names ^ {path.name for path in (out / kind).glob("*") if path.suffix != ".gitkeep"}
            differing |= {n for n in names - differing if not same_file(fresh / kind / n, out / kind / n)}
            if differing:
                names_text = ", ".join(sorted(differing))
                return f"{out / kind} differs from the records in {names_text}: {CURE}"
    if readme is not None and insert(readme, block(found, out, readme)) != readme.read_text():
        return f"{readme} differs from the records between its markers: {CURE}"
    return None


def _sheet_parts(table: Sheet, with_records: bool = False) -> list[str]:
    parts = [table.about]
    for section in table.sections:
        parts += [f"**{section.heading}**", *section_parts(section, with_records)]
    return [part for part in parts if part]


def _located(parts: list[str], found: Findings, readme: Path) -> list[str]:
    """Lists of record files, each with its path from the README instead of its last folder alone."""
    paths = {f"`{short_name(record)}`": f"`{_relative(record.path, readme)}`" for record in found.records}
    return [
        re.sub(r"`[^`]+`", lambda name: paths.get(name[0], name[0]), part)
        if part.startswith("Records: ")
        else part
        for part in parts
    ]


def _table2(found: Findings) -> Sheet:
    trained = found.trained
    return accuracy_table.table("table2", trained.studies, found.paper, trained.fits)


def _elsewhere(count: int, name: str, folder: str) -> list[str]:
    """Where the cells stand that are left out here."""
    cells_text = f"{count} more cell{'' if count == 1 else 's'}"
    return [f"{cells_text}: [{name}]({folder}/tables/{name}.md)."] if count > 0 else []


def same_file(fresh: Path, kept: Path) -> bool:
    """Text to the letter, SVG coordinates within TOLERANCE, PNG not at all."""
    if fresh.suffix == ".png":
        return True
    one, two = fresh.read_text(), kept.read_text()
    if one == two or fresh.suffix != ".svg":
        return one == two
    left, right = NUMBER.findall(one), NUMBER.findall(two)
    close = all(abs(float(a) - float(b)) <= TOLERANCE for a, b in zip(left, right, strict=False))
    return NUMBER.sub("#", one) == NUMBER.sub("#", two) and close


def _relative(out: Path, readme: Path) -> str:
    try:
        return out.resolve().relative_to(readme.resolve().parent).as_posix()
    except ValueError:
        return out.as_posix()
