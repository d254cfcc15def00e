"""Figures: what is drawn is what was measured, looks differ, captions agree with axes, the same bytes twice."""

import html
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex

from adafuse import archive
from adafuse.report import build, figures
from adafuse.report.membership import COLUMNS
from synthetic import study

ROOT = Path(__file__).resolve().parents[2]
RUNS = {"kind": "block", "position": 0, "tokens": 64, "excluded": None, "state": {}}
TIMES = {"base": 10.0, "base_again": 10.2, "mola_loop": 105.0, "adafuse_loop": 40.0, "adafuse_switch": 12.0}
GRAPH = {
    "base_graph": 10.0,
    "base_graph_again": 10.1,
    "base_gemv_graph": 9.0,
    "adafuse_gather_graph": 10.8,
    "adafuse_fused_graph": 9.7,
    "adafuse_switch_graph": 20.0,
}
PAIR = {"adafuse": 0.70, "adafuse_layerwise": 0.74}
SWITCHES = (1, 10, 100)


def timed(made, key, times, measured=None, **changes):
    """A latency record; `times` are ms per token of the arms that were asked for, of which some were `measured`."""
    lines = [
        {**RUNS, "arm": arm, "round": number, "block_ms": 64 * ms * (1 + 0.01 * number)}
        for number in range(3)
        for arm, ms in times.items()
        if measured is None or arm in measured
    ]
    return made(key, "latency", lines, arms=times, **changes)


def report_of(records, jobs):
    """`jobs`: experiment, overrides and hash of each record."""
    rows = [[experiment, "gpu", "latency", overrides, key] for experiment, overrides, key in jobs]
    return build(records, pd.DataFrame(rows, columns=COLUMNS))


def planned(report, name):
    found = [own for own in figures.plan(report) if own.spec["name"] == name]
    assert len(found) == 1, f"{len(found)} figures {name}"
    return found[0]


def drawn(report, name):
    own = planned(report, name)
    with mpl.rc_context(figures.look()["style"]):
        return figures.DRAW[own.spec["kind"]](own)


def labels(ticks):
    return [tick.get_text() for tick in ticks]


def lines_of(axis):
    """By colour and mark the points of each line that has marks."""
    return {
        (to_hex(line.get_color()), line.get_marker()): line
        for line in axis.lines
        if line.get_marker() != "None"
    }


@pytest.fixture
def paper(made):
    keys = ["a", "b", "c"]
    measured = [arm for arm in TIMES if arm != "adafuse_loop"]
    records = [
        timed(made, key, TIMES | {"mola_loop": 105.0 + number}, measured) for number, key in enumerate(keys)
    ]
    return report_of(records, [("table6", f"replicate={key}", key) for key in keys])


def scan(made, batches=(1, 2, 8)):
    records = [timed(made, f"b{batch}", GRAPH, batch=batch) for batch in batches]
    return report_of(records, [("batch_scan", f"batch={batch}", f"b{batch}") for batch in batches])


# -- bars


def test_bars_are_the_measured_ratios_slowest_first_and_an_arm_without_a_value_leaves_none(paper):
    (axis,) = drawn(paper, "latency_paper").axes
    assert labels(axis.get_yticklabels()) == ["MoLA", "AdaFuse (switch)"], "neither backbone nor what failed"
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "the slowest on top"
    found = paper.measurements.query("quantity == 'ratio'").set_index("row")
    bars = [patch for patch in axis.patches if patch.get_height() == 0.55]
    assert [1 + bar.get_width() for bar in bars] == pytest.approx(
        [found.loc["mola_loop", "value"], found.loc["adafuse_switch", "value"]]
    )
    ends = axis.collections[0].get_segments()[0][:, 0]
    assert list(ends) == pytest.approx([found.loc["mola_loop", "low"], found.loc["mola_loop", "high"]])
    colours = figures.look()["routings"]
    assert [to_hex(bar.get_facecolor()) for bar in bars] == [
        colours[name]["colour"] for name in ("layerwise", "token")
    ]


def test_the_papers_ratio_stands_under_its_bar_and_the_band_is_what_two_equal_arms_differ_by(paper):
    (axis,) = drawn(paper, "latency_paper").axes
    (marks,) = [line for line in axis.lines if line.get_label() == "paper"]
    table = {
        row["arm"]: row["ms_per_token"]
        for row in paper.paper["table6"]["rows"] + paper.paper["table5"]["rows"]
    }
    expected = [table[arm] / table["base"] for arm in ("mola_loop", "adafuse_switch")]
    assert marks.get_xdata() == pytest.approx(expected)
    assert [round(y) for y in marks.get_ydata()] == [0, 1] and all(marks.get_ydata() % 1 > 0.3)
    width = 1 + paper.measurements.query("quantity == 'resolution'")["value"].iloc[0]
    found = bands(axis)
    assert [band.get_x() for band in found] == pytest.approx([1 / width] * 2)
    assert [band.get_x() + band.get_width() for band in found] == pytest.approx([width] * 2)


def bands(axis) -> list[Any]:
    return [patch for patch in axis.patches if to_hex(patch.get_facecolor()) == "#fff1b8"]


def test_an_arm_stands_before_the_band_of_its_own_runtime() -> None:
    rows = pd.DataFrame({"row": ["slow", "fast", "alone"], "runtime": ["eager", "graph", "compiled"]})
    noise = pd.DataFrame({"row": ["eager", "graph"], "quantity": "resolution", "value": [0.25, 0.01]})
    own = SimpleNamespace(shown=noise, report=SimpleNamespace(paper={}), spec={"paper": []})
    _, (axis,) = figures.blank()
    figures._references(axis, own, rows)
    assert [band.get_x() + band.get_width() for band in bands(axis)] == pytest.approx([1.25, 1.01, 1])


def layer(made, key, ranks=(4, 16)):
    lines = [
        {
            "kind": "layer",
            "sequence_length": tokens,
            "rank": rank,
            "phase": phase,
            "part": part,
            "ms": ms * (1 + number / 9),
        }
        for tokens, phase in ((100, "prefill"), (1, "decode"))
        for rank in ranks
        for part, ms in (("backbone", 0.1), ("adapters", 0.01 * rank))
        for number in range(3)
    ]
    return made(key, "layer", lines, layer={"ranks": list(ranks)})


def test_figure_2_has_intervals_and_milliseconds_in_the_order_of_the_record(made):
    report = report_of(
        [layer(made, key) for key in "ab"], [("figure2", f"replicate={key}", key) for key in "ab"]
    )
    (axis,) = drawn(report, "figure2").axes
    names = labels(axis.get_yticklabels())
    assert names == [
        f"{phase}, rank {rank}" for phase in ("prefill, 100 tokens", "decode, 1 token") for rank in (4, 16)
    ]
    assert len(axis.collections[0].get_segments()) == 4
    assert [text.get_text() for text in axis.texts][:2] == [
        "0.400  (0.0444 / 0.111 ms)",
        "1.60  (0.178 / 0.111 ms)",
    ]


def test_the_headline_compares_the_same_arms_launched_one_by_one_and_captured(made):
    eager = {"base": 10.0, "mola_loop": 110.0, "adafuse_switch": 10.3}
    records = [timed(made, "a", eager), timed(made, "b", GRAPH)]
    report = report_of(records, [("table6", "replicate=0", "a"), ("graph", "replicate=0", "b")])
    figure = figures.headline(report)
    left, right = figure.axes
    assert [text.get_text() for text in left.texts] == ["11.0 ×", "1.03 ×"]
    assert [text.get_text() for text in right.texts] == ["2.00 ×", "1.08 ×"]
    assert [round(text.xy[1]) for text in right.texts] == [3, 4], "beside their rows"
    assert left.get_xlim() == right.get_xlim(), "bars of both panels can be compared"
    assert figures.headline(report_of(records[:1], [("table6", "replicate=0", "a")])) is None


def test_an_arm_of_two_experiments_has_one_bar(made):
    jobs = [("table1", "replicate=0", "a"), ("table6", "replicate=0", "a")]
    report = report_of([timed(made, "a", TIMES)], jobs)
    (axis,) = drawn(report, "latency_paper").axes
    names = labels(axis.get_yticklabels())
    assert len(names) == len(set(names)) == 3
    assert "experiment=table1, table6" in planned(report, "latency_paper").caption


# -- lines


def test_a_scan_has_a_line_an_arm_none_with_the_colour_or_mark_of_another(made):
    report = scan(made)
    (axis,) = drawn(report, "scan_batch").axes
    lines = lines_of(axis)
    assert len(lines) == 4 and len({colour for colour, _ in lines}) == len({mark for _, mark in lines}) == 4
    assert labels(axis.get_xticklabels()) == ["1", "2", "8"]
    handles = [handle.get_label() for handle in axis.figure.legends[0].legend_handles]
    assert handles == [
        "Backbone (own GEMV, graph)",
        "AdaFuse (gather, graph)",
        "AdaFuse (fused, graph)",
        "AdaFuse (switch, graph)",
    ]
    ratios = report.measurements.query("quantity == 'ratio' and row == 'adafuse_switch_graph'")["value"]
    (switch,) = [
        line for (colour, _), line in lines.items() if colour == figures.look()["strategies"]["switch"]
    ]
    assert sorted(switch.get_ydata()) == pytest.approx(sorted(ratios))


def test_strategies_that_merge_have_a_panel_of_their_own(made):
    records = [timed(made, f"c{context}", GRAPH, context=context) for context in (128, 512)]
    report = report_of(records, [("context_scan", f"context={n}", f"c{n}") for n in (128, 512)])
    above, below = drawn(report, "scan_context").axes
    assert len(lines_of(above)) == 1 and len(lines_of(below)) == 3
    assert min(next(iter(lines_of(above).values())).get_ydata()) > 1.9 > max(below.get_ylim())


@pytest.mark.parametrize("batches", [(1,)])
def test_one_point_is_no_scan(made, batches):
    assert not figures.plan(scan(made, batches))


def test_a_caption_says_what_all_share_and_nothing_that_the_axis_varies(made):
    own = planned(scan(made), "scan_batch")
    assert (
        "rank 16" in own.caption
        and "context 64" in own.caption
        and "batch" not in own.caption.split("experiment")[0]
    )
    assert own.title == "More sequences at a time: tiny on NVIDIA H200" and own.file == "scan_batch_h200.svg"


def test_several_cells_have_titles_and_names_that_tell_them_apart(made):
    experts = {"targets": ["q_proj", "v_proj"], "count": 8, "top_k": 2}
    records = [timed(made, f"r{rank}", TIMES, experts=experts | {"rank": rank}) for rank in (16, 64)]
    report = report_of(records, [("table6", f"experts.rank={rank}", f"r{rank}") for rank in (16, 64)])
    found = pd.DataFrame(map(vars, figures.plan(report)))
    assert list(found["file"]) == ["latency_paper_h200_r16.svg", "latency_paper_h200_r64.svg"]
    assert [title.split(", ")[-1] for title in found["title"]] == ["rank 16", "rank 64"]
    assert (
        not found["caption"].str.contains("rank").any()
        and found["caption"].str.endswith("experiment=table6").all()
    )


# -- accuracy


def vary(folder, name, values, experiment, pair=PAIR, **how):
    """One study more for each value; the accuracy rises by 1 point each time."""
    for number, value in enumerate(values):
        higher = {method: own + 0.01 * number for method, own in pair.items()}
        study.write_study(folder, higher, changes={name: value}, experiment=experiment, **how)


def test_accuracy_has_intervals_over_seeds_and_values_in_their_order(tmp_path):
    vary(tmp_path, "experts.rank", [2, 8, 64], "rank", spread=0.01)
    report = build(archive.load([tmp_path]).records)
    (axis,) = drawn(report, "accuracy_rank").axes
    methods = figures.look()["methods"]
    assert labels(axis.get_xticklabels()) == ["2", "8", "64"]
    lines = {colour: line for (colour, _), line in lines_of(axis).items()}
    assert lines[methods["adafuse"]["colour"]].get_ydata() == pytest.approx([70.0, 71.0, 72.0])
    heights = [segment[:, 1] for part in axis.collections for segment in part.get_segments()]
    # t of four degrees of freedom times the standard error of five seeds one point apart
    assert max(high - low for low, high in heights) / 2 == pytest.approx(2.776 * (2.5 / 5) ** 0.5, rel=1e-3)
    assert "rank" not in planned(report, "accuracy_rank").caption.split("experiment")[0]


def test_bypass_stands_at_the_measured_share_beside_no_bypass(tmp_path):
    study.write_study(tmp_path, {"adafuse": 0.70}, experiment="table2")
    for penalty, share, accuracy in ((0.0, 0.2, 0.70), (0.1, 0.6, 0.65)):
        changes = {"method.null_expert": True, "method.bypass_penalty": penalty}
        study.write_study(
            tmp_path, {"adafuse": accuracy}, bypassed=share, changes=changes, experiment="bypass"
        )
    (axis,) = drawn(build(archive.load([tmp_path]).records), "accuracy_bypass").axes
    (line,) = lines_of(axis).values()
    assert line.get_xdata() == pytest.approx([20.0, 60.0]) and line.get_ydata() == pytest.approx([70.0, 65.0])
    assert [text.get_text() for text in axis.texts] == ["0", "0.1"]
    (level,) = [one for one in axis.lines if "without bypass" in one.get_label()]
    assert level.get_ydata() == pytest.approx([70.0, 70.0])


def test_methods_without_a_gate_input_are_levels_in_colours_of_their_own(tmp_path):
    values = ["first_linear", "block0_output", "embedding"]
    vary(tmp_path, "method.router_input", values, "gate_input", {"adafuse": 0.7}, seeds=2)
    study.write_study(
        tmp_path, {"base": 0.3, "lora": 0.72, "adafuse_layerwise": 0.74}, seeds=2, experiment="same_tokens"
    )
    (axis,) = drawn(build(archive.load([tmp_path]).records), "accuracy_gate_input").axes
    names = labels(axis.get_xticklabels())
    assert names == ["first adapted linear", "embedding", "block 0's output"], "from the first layer on"
    levels = {line.get_label(): line for line in axis.lines if line.get_marker() == "None"}
    assert set(levels) == {"LoRA", "AdaFuse with a gate per layer"}, "the backbone would squeeze all else"
    assert levels["LoRA"].get_ydata()[0] == pytest.approx(72)
    ((colour, _),) = lines_of(axis)
    assert colour not in {to_hex(line.get_color()) for line in levels.values()}


# -- drift, loss, routers


def drift(made, key, dtype, last=0.1):
    lines = [
        {
            "kind": "drift",
            "strategy": strategy,
            "dtype": dtype,
            "switches": count,
            "identical": False,
            "delta_error": 1.0,
        }
        | {"weight_error": 0.01 * count**0.5, "logit_error": last if count == 100 else 0.1, "agreement": 1.0}
        for strategy in ("switch", "rebase")
        for count in SWITCHES
    ]
    return made(key, "drift", lines, drift={"dtype": dtype})


def test_drift_shows_every_strategy_and_dtype_on_log_axes_and_a_gap_where_a_value_was_not_finite(made):
    records = [drift(made, "a", "bfloat16", last=None), drift(made, "b", "float16")]
    report = report_of(records, [("drift", f"drift.dtype={key}", key) for key in "ab"])
    figure = drawn(report, "drift")
    for axis in figure.axes:
        assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log") and len(axis.lines) == 4
        assert len({(line.get_color(), line.get_linestyle()) for line in axis.lines}) == 4
    weights, logits = ({line.get_label(): line for line in axis.lines} for axis in figure.axes)
    assert len(figure.legends[0].get_texts()) == 4
    assert [len(line.get_xdata()) for line in figure.axes[1].lines].count(2) == 2, "without the last point"
    assert figure.axes[0].lines[0].get_ydata() == pytest.approx([0.01 * count**0.5 for count in SWITCHES])
    assert weights.keys() == logits.keys()


def test_every_backbone_has_its_loss_and_its_pre_training_beside_it(tmp_path):
    for steps in (100, 400):
        study.write_pretraining(tmp_path, steps=steps)
    for seed in range(2):
        study.write_fit(tmp_path, seed=seed, loss=0.8 + seed, changes={"pretrain.steps": 400})
    study.write_fit(
        tmp_path, "lora", machine=study.GPU | {"name": "cpu", "gpu": None}, changes={"model.name": "small"}
    )
    report = build(archive.load([tmp_path]).records)
    gpu, cpu = [own for own in figures.plan(report) if own.spec["kind"] == "loss"]
    assert "H200" in gpu.title and "CPU" in cpu.title
    under, fitted = figures.loss(gpu).axes
    assert under.lines[0].get_xdata() == pytest.approx([400]), "its own, not another one's"
    assert fitted.lines[0].get_ydata() == pytest.approx([2.3]), "the mean over seeds"
    assert len(figures.loss(cpu).axes) == 1


APART = {
    family: [0.5 * (index // 2 == number) for index in range(8)]
    for number, family in enumerate(study.FAMILIES)
}


def squares(axis):
    """The values of a map, row by row."""
    (mesh,) = axis.collections
    return np.ma.filled(mesh.get_array(), np.nan)


def test_the_load_of_the_first_seed_is_drawn_by_family(tmp_path):
    even = dict.fromkeys(study.FAMILIES, [0.125] * 8)
    for method, seed, loads in (("adafuse", 1, even), ("adafuse", 0, APART), ("adafuse_layerwise", 0, APART)):
        study.write_evaluation(tmp_path, method, seed=seed)
        study.write_fit(tmp_path, method, seed, loads=loads)
    left, right = drawn(build(archive.load([tmp_path]).records), "load").axes
    assert (
        labels(left.get_yticklabels()) == list(study.FAMILIES) and left.get_title("left") == "AdaFuse, seed 0"
    )
    expected = [[50.0 * (expert // 2 == row) for expert in range(8)] for row in range(len(study.FAMILIES))]
    assert squares(left) == pytest.approx(np.array(expected)), (
        "two experts of eight for each of four families"
    )
    assert labels(right.get_yticklabels()) == ["AdaFuse", "AdaFuse with a gate per layer"]
    # of AdaFuse's two seeds one tells all of the family, the other nothing
    assert [bar.get_width() for bar in right.patches] == pytest.approx([50, 100])


def test_agreement_is_the_mean_over_adapters_by_block(tmp_path):
    for seed, information in enumerate((0.2, 0.4)):
        study.write_evaluation(tmp_path, "adafuse_layerwise", seed=seed)
        study.write_fit(tmp_path, "adafuse_layerwise", seed, information=information)
    (axis,) = drawn(build(archive.load([tmp_path]).records), "agreement").axes
    assert axis.get_title("left").endswith("mean 0.30, 2 adapters")
    assert squares(axis) == pytest.approx(np.full((4, 4), 0.3)), "no router with itself"
    assert labels(axis.get_xticklabels()) == labels(axis.get_yticklabels()) == ["0", "1", "2", "3"]


def test_without_families_or_agreement_nothing_is_drawn(tmp_path):
    study.write_fit(tmp_path, "adafuse", loads={"copy": [0.125] * 8})
    study.write_fit(tmp_path, "adafuse_layerwise", loads={"copy": [0.125] * 8})
    assert {own.spec["kind"] for own in figures.plan(build(archive.load([tmp_path]).records))} == {"loss"}


# -- files


@pytest.fixture
def everything(made, tmp_path):
    """One report with a figure of most kinds."""
    folder = tmp_path / "studies"
    vary(folder, "experts.rank", [2, 8], "rank", seeds=2)
    study.write_study(folder, PAIR, seeds=2, information=0.3)
    records = [
        timed(made, "a", TIMES),
        timed(made, "b", GRAPH),
        timed(made, "c", GRAPH, batch=2),
        layer(made, "d"),
    ]
    records += [drift(made, "e", "bfloat16"), *archive.load([folder]).records]
    jobs = [("table6", "replicate=0", "a"), ("graph", "replicate=0", "b"), ("batch_scan", "batch=1", "b")]
    jobs += [
        ("batch_scan", "batch=2", "c"),
        ("figure2", "replicate=0", "d"),
        ("drift", "drift.dtype=bfloat16", "e"),
    ]
    return report_of(records, jobs)


def test_files_are_the_index_and_have_the_same_bytes_twice(everything, tmp_path):
    for name in ("one", "two"):
        found = pd.DataFrame(map(vars, figures.draw(everything, tmp_path / name)))
    files = {path.name: path for path in (tmp_path / "one").iterdir()}
    assert (
        set(files) == {*found["file"], figures.HEADLINE}
        and found["file"].is_unique
        and found["title"].is_unique
    )
    assert {"bars", "lines", "drift", "loss", "load", "agreement"} == {
        own.spec["kind"] for own in figures.plan(everything)
    }
    for name, path in files.items():
        assert path.read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    for own in found.itertuples():
        text = files[own.file].read_text()
        assert text.startswith("<svg") and "dc:date" not in text
        assert html.escape(own.title) in text.replace("&#39;", "&#x27;").replace("'", "&#x27;"), own.file
        assert len(text) < 60_000, own.file


def test_ids_in_a_file_are_only_those_that_are_used(paper, tmp_path):
    (own,) = figures.draw(paper, tmp_path)
    text = (tmp_path / own.file).read_text()
    used = set(re.findall(r"#([0-9a-z]+)[\")]", text))
    assert set(re.findall(r' id="([^"]+)"', text)) <= used


def test_a_number_in_a_text_keeps_its_digits(paper, tmp_path):
    (own,) = figures.draw(paper, tmp_path)
    ratio = paper.measurements.query("quantity == 'ratio' and row == 'adafuse_switch'")["value"].iloc[0]
    assert f">{ratio:.2f}<" in (tmp_path / own.file).read_text()
    assert figures.svg(drawn(paper, "latency_paper"), "0.12345", "a.svg").count("0.12345") == 2


def test_nothing_is_cut_off_and_no_legend_covers_a_panel(everything):
    for own in figures.plan(everything):
        with mpl.rc_context(figures.look()["style"]):
            figure = figures.DRAW[own.spec["kind"]](own)
            figure.draw_without_rendering()
        whole = figure.bbox
        boxes = [axis.get_tightbbox() for axis in figure.axes if axis.get_visible()]
        legends = [legend.get_window_extent() for legend in figure.legends]
        for box in [*boxes, *legends, *(text.get_window_extent() for text in figure.texts)]:
            assert box.x0 >= -1 and box.y0 >= -1 and box.x1 <= whole.x1 + 1 and box.y1 <= whole.y1 + 1, (
                own.file
            )
        for legend in legends:
            assert not any(legend.overlaps(box) for box in boxes), own.file
            assert not any(legend.overlaps(text.get_window_extent()) for text in figure.texts), own.file


# -- figures.yaml


def test_every_entry_says_only_what_is_known():
    known = {"name", "kind", "title", "experiments", *figures.look()["defaults"]}
    for entry in figures.look()["figures"]:
        assert set(entry) <= known, entry["name"]
        assert entry["kind"] in figures.DRAW
        assert {name for name in entry["experiments"] if name} <= {
            path.stem for path in (ROOT / "conf/experiment").glob("*.yaml")
        }
    names = [entry["name"] for entry in figures.look()["figures"]]
    titles = [entry["title"] for entry in figures.look()["figures"]]
    assert len(set(names)) == len(names) and len(set(titles)) == len(titles)


def test_colours_differ():
    for kind in ("routings", "methods", "parts"):
        colours = [own["colour"] for own in figures.look()[kind].values()]
        assert len(set(colours)) == len(colours), kind
    assert len(set(figures.look()["strategies"].values())) == len(figures.look()["strategies"])


def test_the_published_figures_are_small_and_one_is_a_picture():
    folder = ROOT / "results" / "figures"
    svgs = list(folder.glob("*.svg"))
    assert svgs and sum(path.stat().st_size for path in svgs) <= 3_000_000
    assert [path.name for path in folder.iterdir() if path.suffix != ".svg"] == [figures.HEADLINE]
