"""README and docs: short enough to be read, links that lead somewhere, numbers that the code or the records have."""

import re
from pathlib import Path

import pytest

from adafuse.report.rules import MIN_SEEDS
from synthetic.configurations import ROOT, options

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\]\(([^)#\s]+)[^)]*\)")
# names of tables, tasks, types and files are no numbers
NAMES = re.compile(r"`[^`]*`|\]\([^)]*\)|\bTables? [0-9](?: and [0-9])?|\bbf16|\bblock 0")
WORDS = {"one": 1, "two": 2, "five": MIN_SEEDS}


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_bytes()) <= 15_000


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = [link for link in LINK.findall(page.read_text()) if not link.startswith("http")]
    assert not [link for link in links if not (page.parent / link).exists()]


def test_limits_hold_no_number_that_could_age() -> None:
    """What is measured stands in tables; the one number in words is the rules' own."""
    text = NAMES.sub("", (ROOT / "docs" / "limits.md").read_text())
    assert not re.findall(r"(?<![\w.])\d[\d.,]*", text)
    assert "after five had decided nothing" in text and WORDS["five"] == 5


def test_every_experiment_is_described() -> None:
    text = (ROOT / "docs" / "running.md").read_text()
    assert not [name for name in options("experiment") if f"`{name}`" not in text]


def test_every_word_of_the_vocabulary_that_a_config_has_is_explained() -> None:
    text = (ROOT / "docs" / "method.md").read_text()
    assert not [name for name in options("method") if f"`{name}`" not in text and name != "full"]
