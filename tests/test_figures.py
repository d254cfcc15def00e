"""Figures: all there, the same bytes for the same records, nothing left from before, colours that differ."""

import pandas as pd
import pytest

import synthetic
import synthetic_study
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
    (curves,) = find(load([tmp_path])).curves
    assert [(curve.method, len(curve.seeds)) for curve in curves] == [("full", 1), ("adafuse", 1)]


@pytest.mark.parametrize("own", [100, 400])
def test_adapters_stand_beside_the_backbone_under_them(tmp_path, own):
    # as many records of each backbone: the number of steps alone says whose the adapters are
    synthetic_study.write_fit(tmp_path, changes={"pretrain.steps": own})
    for steps in (100, 400):
        synthetic_study.write_pretraining(tmp_path, steps=steps)
    first, second = find(load([tmp_path])).curves
    assert [(curve.stage, curve.seeds[0][0]) for curve in first] == [("pretrain", [own]), ("train", [5])]
    assert [(curve.stage, curve.seeds[0][0]) for curve in second] == [("pretrain", [500 - own])]


def test_every_backbone_has_a_loss_figure_a_gpus_first(tmp_path):
    cpu = synthetic_study.GPU | {"name": "cpu", "gpu": None}
    for seed in range(3):
        synthetic_study.write_fit(tmp_path / "records", seed=seed, machine=cpu)
    synthetic_study.write_pretraining(tmp_path / "records", machine=cpu)
    for model, fits in (("small", 2), ("medium", 1)):
        synthetic_study.write_pretraining(tmp_path / "records", model)
        for seed in range(fits):
            synthetic_study.write_fit(tmp_path / "records", seed=seed, changes={"model.name": model})
    found = find(load([tmp_path / "records"]))
    sources = [curves[0].source.split(",")[0] for curves in found.curves]
    assert sources == ["NVIDIA H200 · small", "NVIDIA H200 · medium", "CPU · tiny"]
    draw(found, tmp_path / "out")
    figures = tmp_path / "out" / "figures"
    assert {path.name for path in figures.glob("loss*.svg")} == {
        "loss.svg",
        "loss_cell2.svg",
        "loss_cell3.svg",
    }
    rows = pd.read_csv(figures / "loss.csv")
    assert rows.groupby("figure").size().to_dict() == {1: 3, 2: 2, 3: 4}
    assert set(rows[rows["figure"] == 3]["source"].str[:3]) == {"CPU"}


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
