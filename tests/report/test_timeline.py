"""Timelines: of several records the token of median length, lanes that show what the spans say."""

import matplotlib as mpl
import numpy as np
import pandas as pd
import pytest
from matplotlib.patches import StepPatch

from adafuse.bench.trace_parts import PARTS
from adafuse.report import build, figures, timeline
from adafuse.report.membership import COLUMNS

# arm: launches, how long each takes and how long it waits for the next, in us
PACE = {
    "base": (40, 5.0, 5.0),
    "base_again": (40, 5.0, 5.0),
    "mola_loop": (4000, 3.0, 7.0),
    "adafuse_switch": (41, 5.0, 5.0),
}


def spans_of(arm):
    """Products and the rest by turns; mola_loop's are mostly adapters; a switch comes first and is long."""
    count, length, gap = PACE[arm]
    turns = ["base_gemm", "other"] if arm != "mola_loop" else ["adapters", "routing", "base_gemm", "adapters"]
    spans = [[n * (length + gap), length, turns[n % len(turns)]] for n in range(count)]
    if arm != "adafuse_switch":
        return spans
    return [[0.0, 2000.0, "switch"], *([2000 + start, own, part] for start, own, part in spans[1:])]


def traced(made, key, slower=1.0, failed=(), **header):
    """One trace record; `slower` stretches every time."""
    lines = []
    for arm, (_, _, gap) in PACE.items():
        spans = [[slower * start, slower * length, part] for start, length, part in spans_of(arm)]
        parts = {part: sum(own[1] for own in spans if own[2] == part) / 1e3 for part in PARTS}
        gap_ms = (spans[-1][0] + spans[-1][1] + slower * gap) / 1e3 - sum(parts.values())
        words = {
            "tokens": 5,
            "launches": len(spans),
            "graph_nodes": None,
            "parts_ms": parts,
            "gap_ms": gap_ms,
        }
        if arm not in failed:
            lines += [{"kind": "trace", "arm": arm, **words}, {"kind": "spans", "arm": arm, "spans": spans}]
    return made(key, "trace", lines, arms=PACE, header=header)


def planned(records):
    rows = [["trace", "gpu", "trace", f"replicate={own.path.stem[-1]}", own.path.stem[-1]] for own in records]
    (own,) = figures.plan(build(records, pd.DataFrame(rows, columns=COLUMNS)))
    return own


def lanes_of(own):
    return timeline.lanes(own.report.frames, own.shown)


@pytest.fixture
def own(made):
    return planned([traced(made, "a")])


@pytest.fixture
def axis(own):
    with mpl.rc_context(figures.look()["style"]):
        return figures.launches(own).axes[0]


def test_parts_are_those_that_are_traced():
    assert tuple(figures.look()["parts"]) == PARTS


def test_the_backbone_stands_on_top_and_once_its_twin_where_there_is_one(own):
    assert [lane.arm for lane in lanes_of(own)] == ["base_again", "mola_loop", "adafuse_switch"]


def test_of_several_records_the_token_of_median_length(made):
    own = planned([traced(made, key, slower) for key, slower in (("a", 1.0), ("b", 3.0), ("c", 1.5))])
    assert [lane.token_ms for lane in lanes_of(own)] == pytest.approx([0.6, 60.0, 3.615])


def test_the_token_of_a_mended_arm_is_of_its_newest_code(made):
    mended = {"arm_versions": {"mola_loop": 2}}
    own = planned([traced(made, "a", 1.5), traced(made, "b", 1.0), traced(made, "c", 3.0, **mended)])
    assert [lane.token_ms for lane in lanes_of(own)] == pytest.approx([0.6, 120.0, 3.615])


def test_an_arm_that_failed_has_no_lane(made):
    own = planned([traced(made, "a", failed=("mola_loop", "base_again"))])
    assert [lane.arm for lane in lanes_of(own)] == ["base", "adafuse_switch"]


def test_columns_hold_the_time_of_the_spans(own):
    for lane in lanes_of(own):
        edges, shares = timeline.columns(lane, 0.1, PARTS)
        assert edges[0] == 0 and edges[-1] == pytest.approx(lane.token_ms) and (np.diff(edges) > 0).all()
        for part, share in shares.items():
            assert (share >= 0).all() and (share <= 1 + 1e-9).all()
            length = sum(span[1] for span in lane.spans if span[2] == part) / 1e3
            assert (share * np.diff(edges)).sum() == pytest.approx(length)
        assert (sum(shares.values()) <= 1 + 1e-9).all()
    edges, shares = timeline.columns(lanes_of(own)[-1], 0.1, PARTS)
    assert shares["switch"][:20] == pytest.approx(1.0) and not shares["switch"][20:].any()


def boxes(patch):
    """The rectangles of a part of a lane: width and height of each."""
    tops, edges, bottoms = patch.get_data()
    found = np.stack([np.diff(edges), bottoms - tops], axis=1)
    return found[~np.isnan(tops)]


def test_a_lane_shows_what_its_spans_say(own, axis):
    assert [tick.get_text() for tick in axis.get_yticklabels()] == [
        "Backbone (again)",
        "MoLA",
        "AdaFuse (switch)",
    ]
    assert axis.get_ylim()[0] > axis.get_ylim()[1], "the backbone on top"
    drawn = {patch.get_label(): patch for patch in axis.get_children() if isinstance(patch, StepPatch)}
    expected = {f"{lane.arm} {span[2]}" for lane in lanes_of(own) for span in lane.spans}
    assert set(drawn) == expected
    for lane in lanes_of(own):
        for part in {span[2] for span in lane.spans}:
            patch = drawn[f"{lane.arm} {part}"]
            length = sum(span[1] for span in lane.spans if span[2] == part) / 1e3
            assert boxes(patch).prod(axis=1).sum() / timeline.LANE == pytest.approx(length, rel=0.02), (
                lane.arm,
                part,
            )
            assert mpl.colors.to_hex(patch.get_facecolor()) == figures.look()["parts"][part]["colour"]
    count = sum(len(boxes(patch)) for patch in drawn.values())
    assert count < 3 * timeline.COLUMNS * len(lanes_of(own)), "however many launches a token has"
    texts = [text.get_text() for text in axis.texts]
    assert texts == ["0.400 ms, 50 % gap", "40.0 ms, 70 % gap", "2.41 ms, 9 % gap"]


def test_colours_are_named_and_so_is_white(own):
    (legend,) = figures.launches(own).legends
    assert [text.get_text() for text in legend.get_texts()] == [
        "base GEMM",
        "adapters",
        "routing",
        "switch",
        "other",
        "gap",
    ]


def test_nothing_overlaps_and_bytes_are_stable(own):
    with mpl.rc_context(figures.look()["style"]):
        first, second = (figures.svg(figures.launches(own), own.title, own.file) for _ in range(2))
        assert first == second and len(first) < 20_000
        figure = figures.launches(own)
        figure.draw_without_rendering()
    (legend,), (axis,) = figure.legends, figure.axes
    assert not legend.get_window_extent().overlaps(axis.get_tightbbox())
    for artist in (*axis.texts, *axis.get_yticklabels(), legend):
        box = artist.get_window_extent()
        assert box.x0 >= 0 and box.x1 <= figure.bbox.x1, artist
