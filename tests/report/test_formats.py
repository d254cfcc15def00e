"""Numbers are printed as finely as they are known."""

import math

import pytest

from adafuse.report import formats
from adafuse.report.rules import Difference, Number


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (Number(1.2917, 1.2512, 1.3333), "1.29 [1.25, 1.33]"),
        (Number(11.05, 9.64, 12.67), "11.05 [9.64, 12.67]"),
        (Number(1.0602, 1.05805, 1.06236), "1.060 [1.058, 1.062]"),
        (Number(1.16, 1.159999, 1.160001), "1.1600 [1.1600, 1.1600]"),
        (Number(1.04741, 1.04741, 1.04741, 1, "one process each"), "1.0474 (one process each)"),
        (Number(2.0), "2.00 (no interval)"),
    ],
)
def test_a_ratio_has_the_decimals_that_its_interval_deserves(number, said):
    assert formats.ratio_text(number) == said


def test_an_interval_says_of_how_many_hosts_it_is():
    own = {"predict_low": 1.2, "predict_high": 1.4, "within_low": 1.28, "within_high": 1.3}
    one, several = (Number(1.29, 1.25, 1.33, 5, hosts=hosts, **own) for hosts in (1, 4))
    assert formats.ours_text(one) == "1.29 [1.25, 1.33; one host]"
    assert formats.ours_text(several) == "1.29 [1.25, 1.33; next host 1.20–1.40]"
    assert formats.ours_text(Number(1.29, 1.25, 1.33)) == "1.29 [1.25, 1.33]"
    told = [
        [formats.shown(form, own) for form in ("predicted", "within", "hosts")]
        for own in (several, Number(1.0))
    ]
    assert told == [["[1.20, 1.40]", "[1.28, 1.30]", "4"], ["–", "–", ""]]
    alone = Number(1.29, 1.25, 1.33, 5, hosts=1)
    assert [formats.shown(form, alone) for form in ("predicted", "within")] == ["–", "[1.25, 1.33]"]


def test_what_is_missing_says_so():
    assert formats.ours_text(Number()) == "–" and formats.ours_text("2 of 4 steps") == "2 of 4 steps"


def test_differences_are_points_and_losses_nats():
    own = Difference(0.005, -0.01, 0.02, 5, "t over 5 seeds", (), 0.0, 0.01, 0.3, 0.01)
    assert (
        formats.points_text(own) == "+0.5 [-1.0, +2.0]"
        and formats.ours_text(own) == "+0.5 [-1.0, +2.0] points"
    )
    assert formats.points_text(Number(-0.01)) == "-1.0 (no interval)"
    assert formats.judged_text(own) == "+0.5 [-1.0, +2.0] not worse"
    assert formats.judged_text(Difference(0.5, 0.4, 0.6, 4)) == "–", "four seeds decide nothing"
    assert formats.nats_text(Number(0.11, 0.085, 0.136)) == "+0.110 [+0.085, +0.136]"


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (0.0312, "0.0312"),
        (1.29, "1.29"),
        (12.9, "12.9"),
        (1290.4, "1290"),
        (0.0, "0"),
        (math.nan, "–"),
        (None, "–"),
    ],
)
def test_three_digits(value, said):
    assert formats.digits(value) == said


def test_counts_shares_and_percentages():
    assert [formats.count(value) for value in (7.07e9, 4.74e6, 12e3, 3)] == [
        "7.07 G",
        "4.74 M",
        "12.0 k",
        "3.00",
    ]
    assert [formats.percent_text(ratio) for ratio in (1.29, 1.0061, 0.9)] == ["+29 %", "+0.61 %", "-10 %"]
    printed = {
        "share": "53 %",
        "tenths": "53.1 %",
        "resolution": "± 53 %",
        "score": "53.1",
        "yes": "yes",
        "short": "0.531",
    }
    assert {form: formats.plain(form, 0.531) for form in printed} == printed
    assert (formats.plain("whole", 2000), formats.plain("printed", 3e-05)) == ("2,000", "3e-05")
