"""One's own run beside the published one: same, different, missing."""

import pytest

from adafuse.report import compare, page
from synthetic.board import Measurement, frame_of

PUBLISHED = [
    Measurement("table1", "h200 llama b1 paper", "mola_loop", "ratio", 11.0, 9.6, 12.7, 5),
    Measurement("table1", "h200 llama b1 paper", "mola_loop", "ms_per_token", 230.0, n=5),
    Measurement("table1", "h200 llama b1 paper", "mola_loop", "params", 7.07e9),
    Measurement("table1", "h200 llama b1 paper", "pesc_loop", "ratio", 2.7, 2.5, 2.9, 5),
    Measurement("table2", "h200 small mixture", "adafuse", "accuracy.average", 0.7, 0.68, 0.72, 5),
    Measurement("graph", "h200 llama b1 graph", "adafuse_gather_graph", "ratio", 1.06, 1.05, 1.07, 5),
]


def outcomes(*own):
    found = compare.compare(frame_of(own), frame_of(PUBLISHED))
    text = page.rendered("compare.md", found=found, outcomes=compare.OUTCOMES)
    return {(row.row, row.quantity): row.outcome for row in found.itertuples()}, text


@pytest.mark.parametrize(
    ("ends", "outcome"),
    [((10.0, 14.0), compare.SAME), ((13.0, 16.0), compare.DIFFERENT), ((12.7, 13.0), compare.SAME)],
)
def test_intervals_that_overlap_are_the_same_on_any_machine(ends, outcome):
    own = Measurement("table1", "h100 llama b1 paper", "mola_loop", "ratio", sum(ends) / 2, *ends, 3)
    found, text = outcomes(own)
    assert found["mola_loop", "ratio"] == outcome
    assert ("11.00 [9.60, 12.70]" in text) == (outcome == compare.DIFFERENT)


def test_counts_have_to_be_equal_and_times_are_not_compared():
    at = ("table1", "h100 llama b1 paper", "mola_loop")
    found, _ = outcomes(Measurement(*at, "params", 7.07e9), Measurement(*at, "ms_per_token", 1.0))
    assert found["mola_loop", "params"] == compare.SAME and ("mola_loop", "ms_per_token") not in found
    assert outcomes(Measurement(*at, "params", 7.2e9))[0]["mola_loop", "params"] == compare.DIFFERENT


def test_what_one_side_lacks_is_named():
    found, text = outcomes(Measurement("table1", "h100 llama b1 paper", "new_arm", "ratio", 2.0, 1.9, 2.1, 3))
    assert found["pesc_loop", "ratio"] == compare.NOT_HERE and found["new_arm", "ratio"] == compare.NOT_THERE
    assert ("adafuse", "accuracy.average") not in found, "an experiment that was not run is not missing"
    assert "## Missing in your run" in text and "2.70 [2.50, 2.90]" in text and "2.00 [1.90, 2.10]" in text


def test_accuracies_are_points():
    found, text = outcomes(
        Measurement("table2", "cpu small mixture", "adafuse", "accuracy.average", 0.6, 0.58, 0.62, 5)
    )
    assert found["adafuse", "accuracy.average"] == compare.DIFFERENT and "+60.0 [+58.0, +62.0]" in text


def test_another_cell_has_nothing_in_common():
    found, text = outcomes(
        Measurement("table1", "h100 llama b8 paper", "mola_loop", "ratio", 2.0, 1.9, 2.1, 3)
    )
    assert not found and "No experiment and cell is in both" in text


def test_a_published_ratio_over_hosts_is_compared_with_what_it_says_of_the_next():
    own = Measurement("graph", "h100 llama b1 graph", "adafuse_gather_graph", "ratio", 1.09, 1.089, 1.091, 3)
    published = frame_of(PUBLISHED)
    assert compare.compare(frame_of([own]), published)["outcome"].tolist() == [compare.DIFFERENT]
    wider = published.assign(
        hosts=4, predict_low=published["low"] - 0.02, predict_high=published["high"] + 0.02
    )
    found = compare.compare(frame_of([own]), wider)
    assert found["outcome"].tolist() == [compare.SAME] and "next host 1.03–1.09" in found["text_published"][0]
