"""Figures: all there, the same bytes for the same records, nothing left from before, colours that differ."""

import pytest

import synthetic
import synthetic_study
from adafuse import records
from adafuse.records import load
from adafuse.report import draw, find, style


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return find(load([synthetic.write_all(tmp_path_factory.mktemp("records"), seeds=1)]))


def test_every_figure_as_svg_and_png(found, tmp_path):
    draw(found, tmp_path)
    names = {path.name for path in (tmp_path / "figures").iterdir()}
    stems = {"figure1", "figure2", "latency_paper", "latency_controls", "loss"}
    assert names == {f"{stem}.{kind}" for stem in stems for kind in ("svg", "png")} | {"loss.csv"}


def test_bytes_are_stable(found, tmp_path):
    for folder in ("one", "two"):
        draw(found, tmp_path / folder)
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes(), (
            path.name
        )
    assert "<dc:date>" not in (tmp_path / "one" / "figures" / "loss.svg").read_text()


def test_studies_of_adapters_draw_their_own_with_stable_bytes(tmp_path):
    """Why studies, loads and agreement; an SVG holds no picture, whose bytes would depend on libraries."""
    records = tmp_path / "records"
    for rank in (4, 8):
        fits = {"information": 0.3, "changes": {"experts.rank": rank}}
        synthetic_study.write_study(records, {"adafuse": 0.7, "adafuse_layerwise": 0.7}, 2, **fits)
    for folder in ("one", "two"):
        draw(find(load([records])), tmp_path / folder)
    drawn = {path.stem: path for path in (tmp_path / "one" / "figures").glob("*.svg")}
    assert {"why_rank", "load", "agreement", "loss"} == set(drawn)
    for path in drawn.values():
        assert path.read_bytes() == (tmp_path / "two" / "figures" / path.name).read_bytes(), path.name
        assert "<image" not in path.read_text(), path.name


def test_the_loss_of_a_methods_own_setting_is_drawn_alone(tmp_path):
    for penalty in (0.0, 0.5):
        changes = {"method.null_expert": True, "method.bypass_penalty": penalty}
        synthetic_study.write_fit(tmp_path, changes=changes)
    synthetic_study.write_fit(tmp_path)
    synthetic_study.write_fit(tmp_path, "full")
    curves = find(load([tmp_path])).curves
    assert [(curve.method, len(curve.seeds)) for curve in curves] == [("full", 1), ("adafuse", 1)]


@pytest.mark.parametrize("own", [100, 400])
def test_the_backbones_loss_is_that_under_the_adapters(tmp_path, own):
    # as many records of each backbone: the number of steps alone says whose the adapters are
    synthetic_study.write_fit(tmp_path, changes={"pretrain.steps": own})
    for name, steps in (("one", 100), ("two", 400)):
        plain = synthetic_study.study_config("base", {"pretrain.steps": steps}, "pretrain")
        header = synthetic.run_fields("pretrain", name, plain, machine=synthetic_study.GPU)
        with records.open_record(tmp_path / "pretrain" / f"{name}.jsonl", header) as record:
            record.write("loss", step=steps, loss=1.0, balance_loss=0.0, learning_rate=1e-3)
    curves = find(load([tmp_path])).curves
    backbone = next(curve for curve in curves if curve.stage == "pretrain")
    assert backbone.seeds == [([own], [1.0])]


def test_a_second_cell_gets_a_number_and_stale_figures_go(tmp_path):
    synthetic.write_latency(tmp_path / "records")
    synthetic.write_latency(tmp_path / "records", plain={"batch": 4})
    out = tmp_path / "out"
    (out / "figures").mkdir(parents=True)
    for name in (
        "figure2.svg",
        "drift.png",
        "drift_cell2.svg",
        "why_rank.svg",
        "agreement.svg",
        "load_cell2.png",
    ):
        (out / "figures" / name).write_text("old")
    (out / "figures" / "mine.svg").write_text("not ours")
    draw(find(load([tmp_path / "records"])), out)
    assert {p.name for p in (out / "figures").glob("*.svg")} == {
        "latency_paper.svg",
        "latency_paper_cell2.svg",
        "mine.svg",
    }
    assert not list((out / "figures").glob("drift*"))


def test_one_process_and_one_round_can_be_drawn(tmp_path):
    synthetic.write_latency(tmp_path / "records", rounds=1)
    synthetic.write_layer(tmp_path / "records")
    draw(find(load([tmp_path / "records"])), tmp_path / "out")
    assert (tmp_path / "out" / "figures" / "latency_paper.png").stat().st_size > 1000


def test_colours_differ():
    assert len(set(style.METHODS.values())) == len(style.METHODS)
    assert len(set(style.ROUTING.values())) == len(style.ROUTING)
