"""What routers do: effective experts, collapse, what a choice tells, and whether layers agree; from known loads."""

import math
from pathlib import Path

import numpy as np
import pytest

import synthetic
import synthetic_study as study
from adafuse.records import load
from adafuse.report import find, sheet
from adafuse.report.agreement import agreements
from adafuse.report.routing import effective_number, routing_table, tells_family, uses
from adafuse.report.routing_figure import agreement_figure, load_figure

EVEN = [0.125] * 8
# four families, each with two experts to itself
APART = {
    family: [0.5 * (index // 2 == number) for index in range(8)]
    for number, family in enumerate(synthetic.FAMILIES)
}


def test_effective_number_counts_equal_loads() -> None:
    assert effective_number([0.5, 0.5, 0, 0]) == pytest.approx(2)
    assert effective_number(EVEN) == pytest.approx(8)


def test_families_with_experts_of_their_own_are_no_collapse(tmp_path: Path) -> None:
    study.write_fit(tmp_path, loads=APART, bypassed=0.25)
    (record,) = load([tmp_path])
    every, *by_family = uses([record])
    assert every.effective == pytest.approx(8) and every.collapsed == 0 and every.bypassed == 0.25
    assert every.tells_family == pytest.approx(1) == tells_family(record, "token")
    assert [use.family for use in by_family] == synthetic.FAMILIES
    assert all(use.effective == pytest.approx(2) and use.collapsed == 1 for use in by_family)


def test_the_same_load_everywhere_tells_nothing(tmp_path: Path) -> None:
    study.write_fit(tmp_path, loads=dict.fromkeys(synthetic.FAMILIES, [0.5, 0.5] + 6 * [0.0]))
    (every, *_) = uses(load([tmp_path]))
    assert every.tells_family == pytest.approx(0) and every.collapsed == 1


@pytest.mark.parametrize(
    ("shares", "collapsed"), [([0.37, 0.33, 0.3], 1), ([0.25, 0.25, 0.25, 0.25], 0)], ids=["3", "4"]
)
def test_collapse_begins_a_quarter_of_the_way_from_top_k(
    tmp_path: Path, shares: list, collapsed: int
) -> None:
    """Top-2 of 8: fewer than 3.5 effective experts."""
    study.write_fit(tmp_path, loads={"copy": shares + [0.0] * (8 - len(shares))})
    assert uses(load([tmp_path]))[0].collapsed == collapsed


def test_families_without_any_chosen_expert_count_as_left_alone(tmp_path: Path) -> None:
    study.write_fit(tmp_path, loads={"copy": [math.nan] * 8, "sort": EVEN}, bypassed=0.5)
    every, copy, _ = uses(load([tmp_path]))
    assert every.effective == pytest.approx(8) and every.bypassed == 0.5
    assert copy.effective is None and copy.bypassed == 0.5
    assert "–" in sheet.markdown(routing_table(find(load([tmp_path])).trained.routing))


def test_older_lines_without_families_give_one_row(tmp_path: Path) -> None:
    study.write_fit(tmp_path)
    (record,) = load([tmp_path])
    for line in record.lines:
        line.pop("family", None)
        line.pop("bypassed", None)
    (every,) = uses([record])
    assert every.family == "all" and every.tells_family is None and every.bypassed is None


def test_a_cell_that_only_a_knob_trained_has_no_section(tmp_path: Path) -> None:
    for rank, accuracy in ((8, 0.7), (16, 0.71)):
        study.write_study(tmp_path, {"adafuse": accuracy, "mola": 0.7}, 2, changes={"experts.rank": rank})
    study.write_study(tmp_path, {"lora": 0.7}, seeds=2)
    (cell,) = find(load([tmp_path])).trained.routing
    assert cell.config["experts"]["rank"] == 8
    rows = routing_table([cell]).sections[0].rows
    assert {row["method"]: row["routers"] for row in rows} == {"mola": 8, "adafuse": 1}
    assert all(row["seeds"] == 2 and len(row["records"]) == 2 for row in rows)


def test_agreement_is_the_mean_over_pairs_and_seeds(tmp_path: Path) -> None:
    for seed, information in enumerate((0.2, 0.4)):
        study.write_fit(tmp_path, "adafuse_layerwise", seed, information=information)
    (cell,) = find(load([tmp_path])).trained.routing
    (one,) = agreements(cell)
    assert one.mean == pytest.approx(0.3) and one.by_adapter == pytest.approx((0.2, 0.4))
    assert one.blocks == [2, 4, 6] and one.within_blocks == pytest.approx(0.3)
    assert "0.30, 0.30 within a block" in routing_table([cell]).sections[0].notes[0]
    figure = agreement_figure(cell)
    axis = figure.axes[0]
    assert "0.30" in axis.get_title() and "2 adapters" in axis.get_title()
    shown = axis.collections[0].get_array()
    # the diagonal is left out
    assert np.ma.masked_invalid(shown).count() == 8 * 8 - 8 and float(shown[0, 1]) == pytest.approx(0.3)


def test_the_load_of_the_first_seed_is_drawn_by_family(tmp_path: Path) -> None:
    study.write_fit(tmp_path, "adafuse", 1, loads=dict.fromkeys(synthetic.FAMILIES, EVEN))
    study.write_fit(tmp_path, "adafuse", 0, loads=APART)
    study.write_fit(tmp_path, "adafuse_layerwise", 0, loads=APART)
    (cell,) = find(load([tmp_path])).trained.routing
    figure = load_figure(cell)
    left, right = figure.axes[:2]
    assert [label.get_text() for label in left.get_yticklabels()] == synthetic.FAMILIES
    assert left.collections[0].get_array().max() == 50 and "seed 0" in left.get_title()
    points = next(line for line in right.lines if len(line.get_xdata()) == len(study.LAYERS))
    assert points.get_ydata().tolist() == pytest.approx([1.0] * len(study.LAYERS))
    assert "adafuse 0.50" in [line.get_label() for line in right.lines]


def test_without_families_or_agreement_nothing_is_drawn(tmp_path: Path) -> None:
    study.write_fit(tmp_path, "adafuse", loads={"copy": EVEN})
    (cell,) = find(load([tmp_path])).trained.routing
    assert load_figure(cell) is None and agreement_figure(cell) is None
