"""Why studies: records that agree in all but one knob, found by configuration alone; differences that are known."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

import synthetic_study as study
from adafuse.records import load
from adafuse.report import find, sheet
from adafuse.report.trained import Trained
from adafuse.report.why import why_table
from adafuse.report.why_figure import why_figure
from adafuse.report.why_studies import Why, why_studies

PAIR = {"adafuse": 0.70, "adafuse_layerwise": 0.74}


def trained(folder: Path) -> Trained:
    return find(load([folder])).trained


def vary(folder: Path, accuracy: dict[str, float], name: str, values: list[Any], **how: Any) -> None:
    """One study more for each value; the accuracy rises by 1 point each time."""
    for index, value in enumerate(values):
        higher = {method: own + 0.01 * index for method, own in accuracy.items()}
        study.write_study(folder, higher, changes={name: value}, **how)


def one(folder: Path) -> Why:
    (why,) = trained(folder).whys
    return why


def rows(folder: Path) -> dict[tuple[Any, str], sheet.Row]:
    found = trained(folder)
    (section,) = why_table(found.whys, found.fits).sections
    return {(row["value"], row["method"]): row for row in section.rows}


@pytest.mark.parametrize(
    ("name", "values", "knob"),
    [
        ("method.router_input", ["first_linear", "embedding", "block0_output"], "router_input"),
        ("experts.count", [2, 4, 8, 16], "count"),
        ("experts.top_k", [1, 2, 4], "top_k"),
        ("experts.rank", [2, 8, 64], "rank"),
        ("method.balance_coefficient", [0.0, 0.01], "balance"),
        ("train.learning_rate", [3e-4, 1e-3], "learning_rate"),
        ("method.learning_rate_factor", [0.3, 1.0, 3.0], "learning_rate"),
        ("data.level", [1, 2], "level"),
    ],
)
def test_every_knob_is_found_in_its_order(tmp_path: Path, name: str, values: list[Any], knob: str) -> None:
    vary(tmp_path, PAIR, name, values[::-1], seeds=2)
    why = one(tmp_path)
    expected = [value * 1e-3 if name == "method.learning_rate_factor" else value for value in values]
    assert (why.knob.name, list(why.values)) == (knob, expected)
    assert list(why.lines) == ["adafuse_layerwise", "adafuse"]
    assert all(len(seeds) == 2 for points in why.lines.values() for seeds in points.values())


def test_what_moves_with_a_knob_is_ignored(tmp_path: Path) -> None:
    for rank in (4, 8):
        changes = {
            "experts.rank": rank,
            "experts.alpha": 2 * rank,
            "budget": "equal",
            "method.rank": rank // 2,
        }
        study.write_study(tmp_path, PAIR, seeds=1, changes=changes)
    assert one(tmp_path).values == (4, 8)


def test_records_that_differ_in_two_knobs_are_no_study(tmp_path: Path) -> None:
    study.write_study(tmp_path, PAIR, seeds=2)
    both = {"experts.rank": 4, "experts.top_k": 1}
    study.write_study(tmp_path, PAIR, seeds=2, changes=both)
    assert trained(tmp_path).whys == []


def test_another_strategy_or_precision_is_no_study(tmp_path: Path) -> None:
    study.write_evaluation(tmp_path)
    study.write_evaluation(tmp_path, changes={"experts.rank": 4, "evaluate_dtype": "bfloat16"})
    assert why_studies(load([tmp_path])) == []


def test_the_default_is_what_most_records_share(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "mola": 0.7, **PAIR}, seeds=2)
    vary(tmp_path, PAIR, "experts.rank", [2, 64], seeds=2)
    assert one(tmp_path).default == 8


def test_differences_are_paired_to_the_default_and_to_the_twin(tmp_path: Path) -> None:
    vary(tmp_path, PAIR, "experts.rank", [8, 16], spread=0.01, loss=0.5)
    found = rows(tmp_path)
    first, second = found[8, "adafuse"], found[16, "adafuse"]
    assert first["average"] == pytest.approx(0.70) and second["average"] == pytest.approx(0.71)
    assert first["average_se"] == pytest.approx(0.01 * (2.5 / 5) ** 0.5)
    gain = second["to_default"]
    assert (gain.value, gain.low, gain.high) == pytest.approx((0.01, 0.01, 0.01)) and gain.n_seeds == 5
    assert second["to_twin"].value == pytest.approx(-0.04) and second["to_twin"].high > -0.03
    assert found[16, "adafuse_layerwise"]["to_twin"] is None
    assert second["trainable"] == 1_200_000 and second["validation_loss"] == 0.5
    assert second["entropy_nats"] == 1.5
    assert len(second["records"]) == 5


def test_other_items_are_not_paired(tmp_path: Path) -> None:
    vary(tmp_path, PAIR, "data.level", [1, 2], seeds=2)
    found = rows(tmp_path)
    assert found[2, "adafuse"]["to_default"] is None and found[2, "adafuse"]["to_twin"] is not None


def test_bypass_is_measured_against_no_bypass(tmp_path: Path) -> None:
    write_bypass(tmp_path)
    why = one(tmp_path)
    assert why.values == (None, 0.0, 0.1) and why.default is None
    found = rows(tmp_path)
    assert found[0.1, "adafuse"]["bypassed"] == pytest.approx(0.6)
    assert found[0.1, "adafuse"]["to_default"].value == pytest.approx(-0.05)
    text = sheet.markdown(why_table([why], trained(tmp_path).fits))
    assert "no bypass" in text and "60 %" in text and "minus a gate per layer" not in text


def write_bypass(folder: Path) -> None:
    """No bypass at 70 %; 20 % skipped at no cost, 60 % at 5 points."""
    study.write_study(folder, {"adafuse": 0.70}, spread=0.01)
    for penalty, share, accuracy in ((0.0, 0.2, 0.70), (0.1, 0.6, 0.65)):
        changes = {"method.null_expert": True, "method.bypass_penalty": penalty}
        study.write_study(folder, {"adafuse": accuracy}, spread=0.01, bypassed=share, changes=changes)


def test_the_figure_has_a_line_a_method_with_intervals(tmp_path: Path) -> None:
    vary(tmp_path, PAIR, "experts.rank", [2, 8, 64], spread=0.01)
    found = trained(tmp_path)
    figure = why_figure(found.whys[0], found.fits)
    (axis,) = figure.axes
    lines = {c.get_label(): c.lines for c in axis.containers}
    assert lines["adafuse"][0].get_ydata().tolist() == pytest.approx([70.0, 71.0, 72.0])
    assert [label.get_text() for label in axis.get_xticklabels()] == ["2", "8", "64"]
    (bars,) = lines["adafuse"][2]
    low, high = bars.get_segments()[0][:, 1]
    # t of four degrees of freedom times the standard error of five seeds one point apart
    assert (high - low) / 2 == pytest.approx(2.776 * (2.5 / 5) ** 0.5, rel=1e-3)


def test_bypass_is_drawn_over_the_measured_share(tmp_path: Path) -> None:
    write_bypass(tmp_path)
    found = trained(tmp_path)
    figure = why_figure(found.whys[0], found.fits)
    (axis,) = figure.axes
    (container,) = axis.containers
    assert container.lines[0].get_xdata().tolist() == pytest.approx([20.0, 60.0])
    level = next(line for line in axis.lines if line.get_label() == "adafuse, no bypass")
    assert level.get_ydata() == pytest.approx([70.0, 70.0])


def test_methods_without_a_gate_input_stand_beside_it(tmp_path: Path) -> None:
    vary(tmp_path, {"adafuse": 0.70}, "method.router_input", ["first_linear", "block0_output"], seeds=2)
    study.write_study(tmp_path, {"base": 0.3, "lora": 0.72, "adafuse_layerwise": 0.74}, seeds=2)
    why = one(tmp_path)
    assert list(why.levels) == ["base", "lora", "adafuse_layerwise"]
    found = {row["method"]: row for row in why_table([why], {}).sections[0].rows}
    assert found["lora"]["average"] == pytest.approx(0.72) and found["lora"]["to_default"] is None
    assert found["adafuse"]["to_twin"].value == pytest.approx(-0.03)
    figure = why_figure(why, {})
    levels = {line.get_label(): line.get_ydata()[0] for line in figure.axes[0].lines}
    assert levels["lora"] == pytest.approx(72) and "base" not in levels


def test_other_knobs_have_no_methods_beside_them(tmp_path: Path) -> None:
    vary(tmp_path, PAIR, "experts.rank", [4, 8], seeds=1)
    study.write_study(tmp_path, {"lora": 0.72}, seeds=1)
    assert one(tmp_path).levels == {}


def test_a_setting_unlike_the_files_is_said_and_is_in_no_table_2(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"lora": 0.7, "adafuse": 0.7}, seeds=2)
    for top_k in (1, 2, 4):
        changes = {"experts.top_k": top_k, "method.normalisation": "softmax_topk_raw"}
        study.write_study(tmp_path, PAIR, seeds=2, changes=changes)
    found = trained(tmp_path)
    (section,) = why_table(found.whys, {}).sections
    assert section.notes[1] == "Here adafuse has normalisation=softmax_topk_raw, unlike its file."
    assert {row["method"] for row in section.rows} == set(PAIR)
    assert section.rows[-1]["to_twin"].value == pytest.approx(-0.04)
    assert [list(own.variants) for own in found.studies] == [["lora", "adafuse"]]


def test_a_pilot_seed_is_no_part_of_any_other_study(tmp_path: Path) -> None:
    study.write_study(tmp_path, {"base": 0.3, "lora": 0.7, "adafuse": 0.7}, seeds=2)
    for level in (1, 2):
        for method in ("base", "lora"):
            study.write_evaluation(tmp_path, method, 0.9, seed=100, changes={"data.level": level})
    found = trained(tmp_path)
    assert [sorted(own.variants["lora"]) for own in found.studies] == [[0, 1]]
    (why,) = found.whys
    assert list(why.lines) == ["base", "lora"] and list(why.lines["lora"][1]) == [100]
    assert why_table([why], {}).sections[0].heading.endswith("pilot seed")


def test_one_seed_and_no_fit_can_be_drawn(tmp_path: Path) -> None:
    for penalty in (0.0, 0.1):
        changes = {"method.null_expert": True, "method.bypass_penalty": penalty}
        study.write_evaluation(tmp_path, changes=changes)
    study.write_evaluation(tmp_path, changes={"experts.rank": 2})
    study.write_evaluation(tmp_path)
    found = trained(tmp_path)
    for why in found.whys:
        why_figure(why, found.fits)
    assert {why.knob.name for why in found.whys} == {"bypass", "rank"}


def test_no_legend_is_wider_than_its_figure(tmp_path: Path) -> None:
    places = ["first_linear", "embedding"]
    for changes in (
        {},
        {"method.first_expert_block": 1},
        {"method.first_expert_block": 1, "method.router_norm": True},
    ):
        for place in places:
            own = changes | {"method.router_input": place}
            study.write_study(tmp_path, {"adafuse": 0.7}, seeds=2, changes=own)
    study.write_study(tmp_path, {"full": 0.8, "lora": 0.72, "mola": 0.7, "adafuse_layerwise": 0.74}, seeds=2)
    figure = why_figure(one(tmp_path), {})
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    (legend,) = figure.legends
    box = legend.get_window_extent(canvas.get_renderer())
    assert len(legend.get_texts()) == 7 and box.x0 >= 0 and box.x1 <= figure.bbox.width
