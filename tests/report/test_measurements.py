"""The frame of measurements: the same bytes for the same records, and the same numbers as ever."""

import math
import random
from pathlib import Path

import pandas as pd
import pytest

from adafuse import report
from adafuse.report import latency
from adafuse.report.frames import frames
from adafuse.report.measurements import COLUMNS, is_behind, load_measurements, write
from adafuse.report.naming import KEYS
from synthetic.board import Measurement, frame_of

ROOT = Path(__file__).resolve().parents[2]
KEY = ["experiment", "cell", "row", "quantity"]
VALUES = [
    Measurement("b", "cell", "arm", "ratio", 1.23456789, 1.1, 1.3, 3, "t over 3 processes", ("aaaa", "bbbb")),
    Measurement("a", "cell", "arm", "ms_per_token", reason="check failed: logits 0.5, bound 0.1"),
    Measurement("", "", "aaaa", "seconds", 12345678.0, records=("aaaa",)),
]


def test_a_written_frame_is_read_back_with_six_digits(tmp_path):
    path = tmp_path / "own" / "measurements.csv"
    write(frame_of(VALUES), path)
    found = load_measurements(path)
    assert list(found.columns) == COLUMNS and list(found["experiment"]) == ["", "a", "b"]
    ratio = found.iloc[2]
    assert (ratio["value"], ratio["low"], ratio["n"], ratio["records"]) == (1.23457, 1.1, 3, "aaaa bbbb")
    assert found["value"].isna().tolist() == [False, True, False]
    assert found.iloc[1]["reason"] == "check failed: logits 0.5, bound 0.1" and pd.isna(found.iloc[1]["n"])


def test_a_check_is_one_line_whose_high_is_its_bound_and_has_no_words_where_it_was_met(tmp_path):
    checks = [("check.logits", 0.1, "detail"), ("check.whole", math.nan, ""), ("check", 0.1, "logits")]
    values = [Measurement("a", "b", "arm", name, value, high=0.2, reason=why) for name, value, why in checks]
    write(frame_of(values), tmp_path / "measurements.csv")
    assert (
        "a,b,arm,check.logits,0.1,,0.2,,,,,,,,," in (tmp_path / "measurements.csv").read_text().splitlines()
    )
    read, written = (
        found.assign(reason=found["reason"].mask(found["quantity"] == "check.logits", ""))
        .set_index(KEY)
        .sort_index()
        for found in (load_measurements(tmp_path / "measurements.csv"), frame_of(values))
    )
    pd.testing.assert_frame_equal(read, written, check_dtype=False)


@pytest.mark.parametrize(
    ("hashes", "written"),
    [
        ("a1b2c3d4e5f6 a1b2c3ffffff", "a1b2c3d a1b2c3f"),
        ("00000000a000 00000000b000", "00000000a 00000000b"),
        ("00000000a000.11111111a111 00000000a000.22222222a222", "0000000.1111111 0000000.2222222"),
    ],
)
def test_records_are_written_by_the_digits_that_tell_them_apart(tmp_path, hashes, written):
    number = Measurement("a", "b", "arm", "ratio", 1.0, records=tuple(hashes.split()))
    write(frame_of([number]), tmp_path / "measurements.csv")
    assert load_measurements(tmp_path / "measurements.csv")["records"].tolist() == [written]
    assert all(is_behind(key, written) for key in hashes.split())
    assert not is_behind("b" * 12, written) and not is_behind("00000000a000.33333333a333", written)


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", ",".join(COLUMNS) + "\na,b,c,d,much,,,,,\n"])
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "measurements.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"measurements\.csv") as raised:
        load_measurements(path)
    assert "\n" not in str(raised.value)


def test_the_order_of_the_records_does_not_matter(made, tmp_path):
    words = {"position": 0, "tokens": 64, "block_ms": 64.0, "excluded": None, "state": {}}
    lines = [{"kind": "block", "arm": "base", "round": number, **words} for number in range(3)]
    records = [
        made(key * 12, lines=lines, batch=batch)
        for key, batch in zip("abcdef", (1, 1, 1, 2, 2, 8), strict=True)
    ]
    texts = set()
    for number in range(3):
        write(latency.measure(frames(records)).values, tmp_path / f"{number}.csv")
        texts.add((tmp_path / f"{number}.csv").read_text())
        random.Random(number).shuffle(records)
    assert len(texts) == 1


@pytest.mark.parametrize("task", KEYS)
def test_a_record_without_what_it_was_run_for_stops_nothing(made, task):
    found = report.build([made("a" * 12, task)]).measurements
    assert not found.duplicated(KEY).any() and len(found) > 0


@pytest.mark.parametrize("status", ["error", "unfinished"])
def test_records_that_failed_before_they_measured_stop_nothing(made, status):
    error = {"kind": "error", "where": "arm base", "message": "no room", "traceback": ""}
    records = [made(f"{i:012}", task, [error] * (status == "error"), status) for i, task in enumerate(KEYS)]
    found = report.build(records).measurements
    assert not found.duplicated(KEY).any() and len(found) > 0


def test_every_number_has_a_name_of_its_own(made):
    found = report.build([made("a" * 12), made("b" * 12, "memory")]).measurements
    assert len(found) and not found.duplicated(KEY).any()


@pytest.fixture(scope="module")
def golden():
    """Numbers of the tables of commit d45f24b, which pooled records by another rule: some of each table. Those of
    ratios over two hosts are as they are since hosts are the units of an interval.
    """
    return pd.read_csv(
        Path(__file__).parent / "golden.csv", keep_default_na=False, na_values={"low": "", "high": ""}
    )


def assert_same(found: pd.DataFrame, golden: pd.DataFrame) -> None:
    # bounds, and whether a check passed, had lines of their own
    checks = found[found["quantity"].str.startswith("check.")].assign(high=math.nan)
    name, bound = checks["quantity"].str.removeprefix("check"), found.loc[checks.index, "high"]
    passed = checks.assign(quantity="passed" + name, value=(checks["value"] <= bound).astype(float))
    found = pd.concat([found, checks.assign(quantity="bound" + name, value=bound), passed])
    ours = golden.merge(found, on=KEY, how="left", suffixes=("_then", ""))
    assert len(ours) == len(golden)
    for name in ("value", "low", "high"):
        known = ours[f"{name}_then"].notna()
        # the last of six digits may be rounded either way
        near = (ours[name] - ours[f"{name}_then"]).abs() <= 1e-5 * ours[f"{name}_then"].abs()
        assert near[known].all(), ours.loc[known & ~near, [*KEY, f"{name}_then", name]].to_string()


def test_no_number_has_changed_since(golden):
    assert len(golden) >= 150 and golden["table"].nunique() >= 20
    assert_same(report.read(ROOT / "results" / "reference").measurements, golden)


def test_the_committed_measurements_hold_the_same_numbers(golden):
    assert_same(load_measurements(ROOT / "results" / "measurements.csv.gz"), golden)


def test_a_changed_number_is_seen(golden):
    found = golden.drop(columns="table")
    with pytest.raises(AssertionError):
        assert_same(found.assign(value=found["value"] * 1.0001), golden)
