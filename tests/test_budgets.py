"""What is trained once for both budgets stands in both studies; what has other sizes there does not."""

from pathlib import Path

import synthetic_study as study
from adafuse.records import load
from adafuse.report import find


def write(folder: Path, method: str, budget: str, rank: int | None, methods: dict[str, int | None]) -> None:
    """An evaluation under a budget whose records say these ranks of all methods."""
    known = {name: study.method_file(name) | {"rank": own} for name, own in methods.items()}
    changes = {"budget": budget, "method.rank": rank, "methods": known}
    study.write_evaluation(folder, method, changes=changes)
    study.write_fit(folder, method, changes=changes)


def test_a_method_of_the_budgets_own_size_is_in_both(tmp_path: Path) -> None:
    published = {"lora": 32, "mola": None, "adafuse": None}
    equal = {"lora": 32, "mola": 3, "adafuse": None}
    for method in published:
        write(tmp_path, method, "published", published[method], published)
    # lora and adafuse are done already: only mola is trained again
    write(tmp_path, "mola", "equal", 3, equal)
    found = find(load([tmp_path])).trained
    by_budget = {own.cell.config["budget"]: own for own in found.studies}
    assert list(by_budget["equal"].variants) == list(by_budget["published"].variants) == list(published)
    (other,) = by_budget["equal"].variants["mola"][0]
    assert other.run["config"]["method"]["rank"] == 3
    assert {cell.config["budget"] for cell in found.routing} == {"published", "equal"}


def test_other_sizes_are_not_carried_over(tmp_path: Path) -> None:
    write(tmp_path, "mola", "published", None, {"mola": None})
    write(tmp_path, "adafuse", "equal", None, {"mola": 3, "adafuse": None})
    studies = find(load([tmp_path])).trained.studies
    assert [list(own.variants) for own in studies] == [["adafuse"], ["mola"]]
