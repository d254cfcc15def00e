"""Drift: dtypes in one table and one figure, every quantity at every measured number of switches."""

import json

import pytest

import synthetic_gpu
from adafuse.records import load, open_record
from adafuse.report import draw, drift, figures, find, sheet
from adafuse.report.cells import Cell
from synthetic_gpu import write_drift


@pytest.fixture
def cell(tmp_path) -> Cell:
    for dtype in ("float16", "bfloat16"):
        write_drift(tmp_path, dtype)
    (found,) = find(load([tmp_path])).drift
    return found


def test_a_trace_for_each_strategy_and_dtype(cell):
    found = drift.traces(cell)
    assert [(trace.dtype, trace.strategy) for trace in found] == [
        (dtype, name) for dtype in ("bfloat16", "float16") for name in ("switch", "switch_refresh", "rebase")
    ]
    switch = found[0]
    assert switch.switches == synthetic_gpu.SWITCHES
    assert switch.values["weight_error"] == pytest.approx([2e-3 * count**0.5 for count in switch.switches])
    assert switch.values["logit_error"][0] == pytest.approx(6e-3)


def test_the_table(cell):
    (section,) = drift.drift_table([cell]).sections
    assert section.heading.startswith("NVIDIA H200 · llama2_7b · 8 experts of rank 16")
    assert [name for name in section.columns if name.startswith("t = ")] == [
        f"t = {n}" for n in (1, 10, 100, 1000)
    ]
    assert len(section.rows) == 2 * 3 * 4
    shown = [{name: show(row) for name, show in section.columns.items()} for row in section.rows]
    switch = next(row for row in shown if (row["strategy"], row["quantity"]) == ("switch", "weight error"))
    assert (switch["t = 1"], switch["t = 1000"]) == ("0.002", "0.0632")
    assert switch["weights as after t = 1"] == "differ from t = 10"
    rebase = [row for row in shown if row["strategy"] == "rebase"]
    assert {row["weights as after t = 1"] for row in rebase} == {"identical"}
    assert {row["records"][0] for row in section.rows} == {"drift/bfloat16.jsonl", "drift/float16.jsonl"}


def test_a_value_that_was_not_finite_is_a_gap(tmp_path):
    path = write_drift(tmp_path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    path.unlink()
    header, *body = ({k: v for k, v in line.items() if k != "kind"} for line in lines[:-1])
    with open_record(path, header) as record:
        for line in body:
            last = line["strategy"] == "switch" and line["switches"] == 1000
            record.write("drift", **(line | ({"logit_error": float("nan")} if last else {})))
    (cell,) = find(load([tmp_path])).drift
    assert drift.traces(cell)[0].values["logit_error"][-1] is None
    assert "–" in sheet.markdown(drift.drift_table([cell]))
    drift.drift_figure(cell)


def test_the_figure_shows_every_trace_on_log_axes(cell):
    figure = figures.all_figures([], [], [], {}, [cell])["drift"]
    assert [axis.get_title(loc="left") for axis in figure.axes] == ["Weight error", "Logit error"]
    for axis, name in zip(figure.axes, ("weight_error", "logit_error"), strict=True):
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
        drawn = {line.get_label(): list(line.get_ydata()) for line in axis.get_lines()}
        assert drawn["switch, bfloat16"] == pytest.approx(drift.traces(cell)[0].values[name])
        assert len(drawn) == 6
    looks = {(line.get_color(), line.get_linestyle()) for line in figure.axes[0].get_lines()}
    assert len(looks) == 6
    (legend,) = figure.legends
    figure.draw_without_rendering()
    box = legend.get_window_extent()
    assert len(legend.get_texts()) == 6
    assert not any(box.overlaps(axis.get_window_extent()) for axis in figure.axes)


def test_it_is_drawn_with_stable_bytes(cell, tmp_path):
    for name in ("one", "two"):
        draw(find(list(cell.records)), tmp_path / name)
    for name in ("figures/drift.svg", "figures/drift.png", "tables/drift.md", "tables/drift.csv"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name


def test_another_backbone_is_another_figure(tmp_path):
    write_drift(tmp_path / "a")
    write_drift(tmp_path / "b", machine=synthetic_gpu.GPU | {"gpu": "NVIDIA H100"})
    written = draw(find(load([tmp_path / "a", tmp_path / "b"])), tmp_path / "out")
    assert {"drift.svg", "drift_cell2.svg"} <= {path.name for path in written}
