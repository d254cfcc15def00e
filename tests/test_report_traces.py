"""Traces: a row for every arm, of several records the token of median length, lanes that show what the spans say."""

from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import pytest

import synthetic
from adafuse.bench.trace_parts import PARTS as TRACED_PARTS
from adafuse.records import load, open_record
from adafuse.report import draw, figures, find, sheet, traces, traces_figure
from adafuse.report.cells import Cell
from synthetic import config, run_fields
from synthetic_gpu import GPU

# arm: launches, how long each takes and how long it waits for the next, in us
PACE = {"base": (40, 5.0, 5.0), "base_again": (40, 5.0, 5.0), "mola_loop": (4000, 3.0, 7.0)}
PACE["adafuse_switch"] = (41, 5.0, 5.0)


def spans_of(arm: str) -> list[list[Any]]:
    """Products and the rest by turns; mola_loop's are mostly adapters; a switch comes first and is long."""
    count, length, gap = PACE[arm]
    turns = ["base_gemm", "other"] if arm != "mola_loop" else ["adapters", "routing", "base_gemm", "adapters"]
    spans = [[n * (length + gap), length, turns[n % len(turns)]] for n in range(count)]
    if arm != "adafuse_switch":
        return spans
    return [[0.0, 2000.0, "switch"], *([2000 + start, own, part] for start, own, part in spans[1:])]


def write_trace(
    folder: Path,
    replicate: int = 0,
    failed: tuple[str, ...] = (),
    slower: float = 1.0,
    odd: dict[str, Any] | None = None,
    **changes: Any,
) -> Path:
    """One trace record of some of the paper's arms; `slower` stretches every time."""
    plain = config(**changes.pop("plain", {}))
    plain["arms"] = plain["arms"] | {"run": list(PACE)}
    name = f"{plain['arms']['name']}-b{plain['batch']}-r{replicate}"
    path = folder / "trace" / f"{name}.jsonl"
    with open_record(path, run_fields("trace", name, plain, replicate=replicate, **changes)) as record:
        for arm, (_, _, gap) in PACE.items():
            if arm in failed:
                record.fail(f"arm {arm}", RuntimeError("out of memory"))
                continue
            spans = [[slower * start, slower * length, part] for start, length, part in spans_of(arm)]
            parts = dict.fromkeys(traces.PARTS, 0.0)
            for _, length, part in spans:
                parts[part] += length / 1e3
            token_ms = (spans[-1][0] + spans[-1][1] + slower * gap) / 1e3
            record.write(
                "trace",
                arm=arm,
                tokens=5,
                launches=len(spans),
                host_launches=len(spans),
                graph_nodes=None,
                parts_ms=parts,
                gap_ms=token_ms - sum(parts.values()),
                untraced_ms=0.6 * token_ms,
                **({"attributed_by": "scopes", "disagreement": None, "unlinked": 0} | (odd or {})),
            )
            record.write("spans", arm=arm, spans=spans)
    return path


@pytest.fixture
def cell(tmp_path) -> Cell:
    write_trace(tmp_path)
    (found,) = find(load([tmp_path])).traces
    return found


def shown(section: sheet.Section) -> dict[str, dict[str, str]]:
    return {row["arm"]: {name: show(row) for name, show in section.columns.items()} for row in section.rows}


def test_parts_are_those_that_are_traced():
    assert tuple(traces.PARTS) == TRACED_PARTS == tuple(traces_figure.COLOURS)
    assert len(set(traces_figure.COLOURS.values())) == len(TRACED_PARTS)


def test_the_table(cell):
    (section,) = traces.trace_table([cell]).sections
    assert section.heading.endswith("batch 1 · context 64 · arms=paper")
    rows = shown(section)
    assert list(rows) == list(PACE)
    base = rows["base"]
    assert (base["arm"], base["ms"], base["ms untraced"]) == ("Backbone", "0.400", "0.240")
    assert (base["launches"], base["host launches"], base["graph nodes"]) == ("40", "40", "–")
    assert (base["base GEMM ms"], base["other ms"], base["adapters ms"]) == ("0.100", "0.100", "0")
    assert (base["gap ms"], base["gap"], base["attributed by"]) == ("0.200", "50 %", "scopes")
    assert rows["mola_loop"]["gap"] == "70 %" and rows["adafuse_switch"]["switch ms"] == "2.00"
    assert {row["records"][0] for row in section.rows} == {"trace/paper-b1-r0.jsonl"}


def test_of_several_records_the_token_of_median_length(tmp_path):
    for replicate, slower in enumerate((1.0, 3.0, 1.5)):
        write_trace(tmp_path, replicate, slower=slower)
    (cell,) = find(load([tmp_path])).traces
    assert [own.file for own in traces.timelines(cell)] == ["trace/paper-b1-r2.jsonl"] * len(PACE)
    assert traces.timelines(cell)[0].token_ms == pytest.approx(0.6)


def test_an_arm_that_failed_says_why(tmp_path):
    write_trace(tmp_path, failed=("mola_loop",))
    (cell,) = find(load([tmp_path])).traces
    (section,) = traces.trace_table([cell]).sections
    row = shown(section)["mola_loop"]
    assert row["ms"] == "error: RuntimeError: out of memory" and row["launches"] == row["gap"] == "–"
    assert [own.arm for own in traces_figure.shown(cell)] == ["base_again", "adafuse_switch"]


def test_what_is_less_sure_is_noted(tmp_path):
    odd = {"attributed_by": "names", "disagreement": "3 launches in a replay, 4 one by one", "unlinked": 2}
    write_trace(tmp_path, odd=odd)
    text = sheet.markdown(traces.trace_table(find(load([tmp_path])).traces))
    assert (
        "Backbone: by names, because its launches are not those of a step launched one by one: 3 launches"
        in text
    )
    assert "MoLA: 2 launches had no call of the host, and are left out." in text


def test_without_records_the_table_says_how_to_get_them():
    assert "experiment=trace" in sheet.markdown(traces.trace_table([]))


def test_other_workloads_arms_and_machines_are_other_cells(tmp_path):
    write_trace(tmp_path)
    write_trace(tmp_path, 1, plain={"batch": 4})
    write_trace(tmp_path / "gpu", machine=GPU)
    synthetic.write_latency(tmp_path)
    found = find(load([tmp_path]))
    assert len(found.traces) == 3 and len(found.latency) == 1


def test_columns_hold_the_time_of_the_spans(cell):
    for lane in traces.timelines(cell):
        edges, shares = traces_figure.columns(lane, 0.1)
        assert edges[0] == 0 and edges[-1] == pytest.approx(lane.token_ms) and (np.diff(edges) > 0).all()
        for part, share in shares.items():
            assert (share >= 0).all() and (share <= 1 + 1e-9).all()
            assert (share * np.diff(edges)).sum() == pytest.approx(lane.line["parts_ms"][part])
        assert (sum(shares.values()) <= 1 + 1e-9).all()
    (switch,) = (lane for lane in traces.timelines(cell) if lane.arm == "adafuse_switch")
    edges, shares = traces_figure.columns(switch, 0.1)
    assert shares["switch"][:20] == pytest.approx(1.0) and not shares["switch"][20:].any()


def test_the_figure_shows_what_the_spans_say(cell):
    figure = figures.all_figures([], [], [], {}, [], [cell])["timeline_paper"]
    (axis,) = figure.axes
    labels = [label.get_text() for label in axis.get_yticklabels()]
    assert labels == ["Backbone (again)", "MoLA", "AdaFuse (switch)"], "the first arm is the table's"
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "the backbone on top"
    drawn = {own.get_label(): own for own in axis.collections}
    assert set(drawn) == {
        *(f"base_again {part}" for part in ("base_gemm", "other")),
        *(f"mola_loop {part}" for part in ("base_gemm", "adapters", "routing")),
        *(f"adafuse_switch {part}" for part in ("base_gemm", "switch", "other")),
    }
    for lane in traces_figure.shown(cell):
        for part, ms in lane.line["parts_ms"].items():
            if ms:
                own = drawn[f"{lane.arm} {part}"]
                boxes = [path.get_extents() for path in own.get_paths()]
                area = sum(box.width * box.height for box in boxes) / traces_figure.LANE
                assert area == pytest.approx(ms, rel=0.02), (lane.arm, part)
                assert mpl.colors.to_hex(own.get_facecolor()[0]) == traces_figure.COLOURS[part]
    paths = sum(len(own.get_paths()) for own in axis.collections)
    assert paths < 3 * traces_figure.COLUMNS * len(labels), "however many launches a token has"
    lengths = [patch.get_width() for patch in axis.patches]
    assert lengths == pytest.approx([lane.token_ms for lane in traces_figure.shown(cell)])
    assert [text.get_text() for text in axis.texts] == [
        "0.400 ms, 50 % gap",
        "40.0 ms, 70 % gap",
        "2.41 ms, 9 % gap",
    ]


def test_nothing_overlaps(cell):
    figure = traces_figure.timeline_figure(cell)
    figure.draw_without_rendering()
    (legend,), (axis,) = figure.legends, figure.axes
    whole = figure.bbox
    assert not legend.get_window_extent().overlaps(axis.get_tightbbox())
    assert [text.get_text() for text in legend.get_texts()][-1] == "gap"
    for artist in (*axis.texts, *axis.get_yticklabels(), legend):
        box = artist.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= whole.x1, artist


def test_it_is_drawn_with_stable_bytes_and_stale_ones_go(cell, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name / "figures").mkdir(parents=True)
        (tmp_path / name / "figures" / "timeline_old.svg").write_text("old")
        draw(find(list(cell.records)), tmp_path / name)
    names = (
        "figures/timeline_paper.svg",
        "figures/timeline_paper.png",
        "tables/traces.md",
        "tables/traces.csv",
    )
    for name in names:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes(), name
    assert not (tmp_path / "one/figures/timeline_old.svg").exists()
