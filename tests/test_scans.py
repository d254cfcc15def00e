"""Scans: cells that differ in one thing are drawn together, in its order, and nothing else is."""

from pathlib import Path

import pytest

from adafuse.records import load
from adafuse.report.cells import title
from adafuse.report.figures import all_figures
from adafuse.report.paper import load_paper
from adafuse.report.scans import scan_figure, scans
from adafuse.report.timing import latency_cells
from synthetic import config, write_latency


def latency(folder: Path, **varied: object) -> list:
    ((name, values),) = varied.items()
    for number, value in enumerate(values):
        for replicate in range(2):
            write_latency(folder, replicate, name=f"{name}{number}", plain={name: value})
    return latency_cells(load([folder]))


def test_batches_are_one_scan_in_order(tmp_path: Path) -> None:
    (scan,) = scans(latency(tmp_path, batch=[8, 1, 64, 2]))
    assert (scan.what, scan.values) == ("batch", (1, 2, 8, 64))


def test_two_points_are_no_scan(tmp_path: Path) -> None:
    assert scans(latency(tmp_path, batch=[1, 8])) == []


def test_cells_that_differ_in_two_things_are_no_scan(tmp_path: Path) -> None:
    for batch, context in ((1, 64), (2, 128), (4, 256)):
        write_latency(tmp_path, name=f"c{context}", plain={"batch": batch, "context": context})
    assert scans(latency_cells(load([tmp_path]))) == []


def test_geometries_stand_by_linears_then_rank(tmp_path: Path) -> None:
    own = config()["experts"]
    wide = {**own, "targets": ["q_proj", "k_proj", "v_proj", "o_proj"]}
    (scan,) = scans(latency(tmp_path, experts=[wide, {**own, "rank": 64}, {**own, "rank": 16}]))
    assert scan.what == "experts" and [value.split("\n")[:2] for value in scan.values] == [
        ["q,v", "r=16"],
        ["q,v", "r=64"],
        ["q,k,v,o", "r=8"],
    ]


def test_sources_of_gates_are_one_scan(tmp_path: Path) -> None:
    own = config()["latency"]
    (scan,) = scans(latency(tmp_path, latency=[{**own, "gates": g} for g in ("zipf", "router", "uniform")]))
    assert (scan.what, scan.values) == ("gates", ("router", "uniform", "zipf"))


def test_shares_of_bypassed_tokens_are_one_scan_on_an_even_axis(tmp_path: Path) -> None:
    """A record from before there was a share counts as none."""
    own = config()["latency"]
    knobs = [own, *({**own, "bypass_share": share} for share in (1.0, 0.25, 0.5))]
    cells = latency(tmp_path, latency=knobs)
    (scan,) = scans(cells)
    assert (scan.what, scan.values) == ("bypass_share", (0.0, 0.25, 0.5, 1.0))
    figure = scan_figure(scan)
    (axis,) = figure.axes
    assert axis.get_xscale() == "linear" and axis.get_xlabel() == "share of tokens left to the backbone alone"
    assert axis.get_xticks().tolist() == [0.0, 0.25, 0.5, 1.0]
    assert [" · 25 % of tokens bypassed · " in title(cell) for cell in scan.cells] == [
        False,
        True,
        False,
        False,
    ]


def test_the_figure_holds_every_arm_at_every_value(tmp_path: Path) -> None:
    (scan,) = scans(latency(tmp_path, batch=[1, 2, 8]))
    figure = scan_figure(scan)
    (axis,) = figure.axes
    lines = {c.get_label(): c.lines[0].get_xdata().tolist() for c in axis.containers}
    assert all(places == [1.0, 2.0, 8.0] for places in lines.values())
    assert "Backbone" not in lines and "Backbone (again)" not in lines and "AdaFuse (switch)" in lines
    assert [label.get_text() for label in axis.get_xticklabels()] == ["1", "2", "8"]


def test_a_scans_cells_have_no_bars_of_their_own(tmp_path: Path) -> None:
    cells = latency(tmp_path, batch=[1, 2, 8])
    names = set(all_figures(cells, [], [], load_paper()))
    assert names == {"scan_batch"}


@pytest.mark.parametrize("values", [[1, 2, 4]])
def test_an_arm_without_a_ratio_somewhere_leaves_a_gap(tmp_path: Path, values) -> None:
    for number, value in enumerate(values):
        failed = ("adafuse_switch",) if number == 1 else ()
        write_latency(tmp_path, name=f"b{value}", failed=failed, plain={"batch": value})
    (scan,) = scans(latency_cells(load([tmp_path])))
    (axis,) = scan_figure(scan).axes
    lines = {c.get_label(): c.lines[0].get_xdata().tolist() for c in axis.containers}
    assert lines["AdaFuse (switch)"] == [1.0, 4.0]
