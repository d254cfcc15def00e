"""Draw the report: records in; tables, figures, verdicts and the README's block out. The last thing `make
reproduce` does.

Example: python scripts/report.py --records results/runs/records --out results/runs/report
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from adafuse import records
from adafuse.report import draw, find, readme
from adafuse.report.claims import ours_text
from adafuse.report.verdicts import IN_PART, NOT_REPLICATED, REPLICATED, Claim

WIDE = 130
COLUMNS = (("where", 2), ("claim", 6), ("paper", 3), (escape("ours [95 %]"), 4), ("verdict", 3), ("why", 6))
COLOURS = {REPLICATED: "green", IN_PART: "yellow", NOT_REPLICATED: "red"}


def main(arguments: list[str] | None = None) -> int:
    """Exit code 0, or 1 with one line on stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", nargs="+", type=Path, required=True, help="folders with record files")
    parser.add_argument("--out", type=Path, required=True, help="folder that gets tables/ and figures/")
    parser.add_argument("--readme", type=Path, help="README whose block between the markers is renewed")
    parser.add_argument("--check", action="store_true", help="write nothing; fail if anything would change")
    options = parser.parse_args(arguments)
    try:
        return _check(options) if options.check else _draw(options)
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


def _check(options: argparse.Namespace) -> int:
    differing = readme.check(find(records.load(options.records)), options.out, options.readme)
    print(differing or f"{options.out} agrees with its records", file=sys.stderr if differing else sys.stdout)
    return 1 if differing else 0


def _draw(options: argparse.Namespace) -> int:
    found = find(records.load(options.records))
    if options.readme:
        readme.refuse_dirty(found)
    written = draw(found, options.out)
    if options.readme:
        options.readme.write_text(
            readme.insert(options.readme, readme.block(found, options.out, options.readme))
        )
        written.append(options.readme)
    _print_claims(found.claims)
    failed = [record for record in found.records if record.status == "error"]
    unfinished = [record for record in found.records if record.status == "unfinished"]
    print(f"{len(found.records)} records: {len(failed)} with errors, {len(unfinished)} unfinished")
    print(f"tables:  {options.out / 'tables'} (start with claims.md)")
    print(f"figures: {options.out / 'figures'}")
    return 0


def _print_claims(claims: list[Claim]) -> None:
    console = Console()
    # Reasons need room; they stand in claims.md anyway.
    columns = COLUMNS if console.width >= WIDE else COLUMNS[:-1]
    for cell in dict.fromkeys(claim.cell for claim in claims):
        table = Table(title=cell, title_justify="left", expand=True)
        for name, share in columns:
            table.add_column(name, ratio=share, overflow="fold")
        for claim in (claim for claim in claims if claim.cell == cell):
            texts = [claim.where, claim.text, claim.printed, ours_text(claim.ours), claim.verdict, claim.why]
            cells = [escape(text) for text in texts]
            cells[4] = f"[{COLOURS.get(claim.verdict, 'dim')}]{cells[4]}[/]"
            table.add_row(*cells[: len(columns)])
        console.print(table)


if __name__ == "__main__":
    sys.exit(main())
