"""Records of any status as frames: nothing is hidden, nothing is guessed."""

import dataclasses

import pandas as pd
import pytest

from adafuse.report.frames import frames, host_id, method_settings
from adafuse.report.membership import COLUMNS
from synthetic.report import GPU

METRIC = {"kind": "metric", "suite_task": "copy", "metric": "acc", "value": 0.5, "stderr": 0.1, "n": 4}


def test_a_run_is_a_row(made):
    run = frames([made("aaaaaaaaaaaa")]).runs.loc["aaaaaaaaaaaa"]
    assert (run["name"], run["machine"], run["folder"]) == (
        "latency/tiny-aaaaaaaaaaaa.jsonl",
        "NVIDIA H200",
        "h200",
    )
    assert (run["targets"], run["rank"], run["batch"]) == ("q, k, v, o, gate, up, down", 16, 1)
    assert run["host"] == "Xeon, 16 cores, 125.9 GiB"


@pytest.mark.parametrize(
    ("one", "two", "same"),
    [
        ({"machine": {"gpu_id": "a"}, "commit": "1"}, {"machine": {"gpu_id": "a"}, "commit": "2"}, True),
        ({"machine": {"gpu_id": "a"}}, {"machine": {"gpu_id": "b"}}, False),
        ({"machine": {"cores": 4}, "commit": "1"}, {"machine": {"cores": 4}, "commit": "1"}, True),
        ({"machine": {"cores": 4}, "commit": "1"}, {"machine": {"cores": 4}, "commit": "2"}, False),
        ({"machine": {"cores": 4}}, {"machine": {"cores": 8}}, False),
        ({"machine": {"gpu_id": "a", "cores": 4}}, {"machine": {"cores": 4}}, False),
    ],
)
def test_a_host_is_a_card_and_before_those_were_told_a_kind_of_machine_at_one_commit(one, two, same):
    assert (host_id(one) == host_id(two)) is same


def test_settings_that_an_older_record_lacks_have_the_value_it_was_made_with(made):
    older = made("aaaaaaaaaaaa", "evaluate")
    newer = made("bbbbbbbbbbbb", "evaluate", evaluate_dtype="float16", budget="equal", evaluate_restore=False)
    runs = frames([older, newer]).runs
    columns = [
        "strategy",
        "evaluate_dtype",
        "restored",
        "budget",
        "gates",
        "bypass_share",
        "queries",
        "level",
    ]
    assert list(runs.loc["aaaaaaaaaaaa", columns]) == [
        "dense",
        "float32",
        True,
        "published",
        "router",
        0.0,
        False,
        1,
    ]
    assert list(runs.loc["bbbbbbbbbbbb", columns[1:4]]) == ["float16", False, "equal"]


def test_method_settings_of_an_older_record_equal_those_of_a_newer_one():
    assert (
        method_settings({"rank": 8, "router_norm": False})
        == {"rank": 8}
        != method_settings({"router_norm": True})
    )


def test_lines_are_of_finished_records_alone(made):
    records = [
        made("aaaaaaaaaaaa", "evaluate", [METRIC]),
        made("bbbbbbbbbbbb", "evaluate", [METRIC], status="unfinished"),
        made("cccccccccccc", "evaluate", [METRIC], status="error"),
    ]
    found = frames(records)
    assert list(found.lines("metric")["record"]) == ["aaaaaaaaaaaa", "cccccccccccc"]
    assert list(found.runs["status"]) == ["ok", "unfinished", "error"]
    expected = {name: value for name, value in METRIC.items() if name != "kind"}
    assert found.lines("metric").drop(columns="record").to_dict("records") == [expected] * 2


def test_a_kind_without_lines_has_its_columns(made):
    assert list(frames([made("aaaaaaaaaaaa")]).lines("layer"))[:3] == ["record", "sequence_length", "rank"]


def test_a_record_may_serve_several_experiments(made):
    rows = [[name, "gpu", "latency", "replicate=0", "aaaaaaaaaaaa"] for name in ("table6", "table1")]
    found = frames([made("aaaaaaaaaaaa")], pd.DataFrame(rows, columns=COLUMNS))
    assert list(found.members["experiment"]) == ["table1", "table6"]
    assert list(found.members["model"]) == ["tiny", "tiny"] and found.unlisted == []


def test_a_record_without_a_row_is_listed_and_serves_the_experiment_of_its_header(made):
    listed = pd.DataFrame([["rank", "gpu", "latency", "", "aaaaaaaaaaaa"]], columns=COLUMNS)
    found = frames([made("aaaaaaaaaaaa"), made("bbbbbbbbbbbb")], listed)
    assert found.unlisted == ["bbbbbbbbbbbb"]
    assert dict(zip(found.members["record"], found.members["experiment"], strict=True)) == {
        "aaaaaaaaaaaa": "rank",
        "bbbbbbbbbbbb": "table1",
    }


def test_what_is_no_record_is_named_and_left_out(made):
    sound = made("aaaaaaaaaaaa")
    empty = dataclasses.replace(made("bbbbbbbbbbbb"), run={})
    headless = made("cccccccccccc", header={"config": {"model": None}})
    again = made("aaaaaaaaaaaa", "memory")
    found = frames([sound, empty, headless, again])
    assert list(found.runs.index) == ["aaaaaaaaaaaa"]
    assert sorted(found.left_out) == sorted(
        ["memory/tiny-aaaaaaaaaaaa.jsonl", *(f"latency/tiny-{letter * 12}.jsonl" for letter in "bc")]
    )
    assert "a second record" in found.left_out["memory/tiny-aaaaaaaaaaaa.jsonl"]


def test_nothing_to_report_is_said_in_one_line(made):
    damaged = dataclasses.replace(made("bbbbbbbbbbbb"), run={})
    for records in ([], [damaged]):
        with pytest.raises(ValueError, match="no records found") as raised:
            frames(records)
        assert "\n" not in str(raised.value)


def test_two_processors_under_one_name_are_two_machines(made):
    machine = {"name": "cpu", "cores": 2, "memory_gib": 8.0, "gpu": None}
    records = [made(key * 12, header={"machine": machine | {"cpu": key}}) for key in "abb"[:2]]
    assert list(frames(records).runs["folder"]) == ["cpu/a", "cpu/b"]


def test_a_row_of_the_membership_names_the_record_of_each_card(made):
    cards = [{"machine": {**GPU, "gpu_id": key * 12}} for key in "12"]
    records = [
        made("aaaaaaaaaaaa"),
        *(made("aaaaaaaaaaaa", header=own) for own in cards),
        made("bbbbbbbbbbbb"),
    ]
    rows = pd.DataFrame([["table1", "gpu", "latency", "", "aaaaaaaaaaaa"]], columns=COLUMNS)
    found = frames(records, rows)
    keys = ["aaaaaaaaaaaa", "aaaaaaaaaaaa.111111111111", "aaaaaaaaaaaa.222222222222"]
    assert list(found.runs.index) == [*keys, "bbbbbbbbbbbb"] and found.unlisted == ["bbbbbbbbbbbb"]
    assert list(found.members["record"]) == [*keys, "bbbbbbbbbbbb"]
    assert not found.left_out
