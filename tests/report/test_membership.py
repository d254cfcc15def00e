"""Which experiment a record belongs to, as runs have written it down."""

import shlex

import pytest

from adafuse import membership as written
from adafuse.report import membership

HEAD = "experiment,profile,task,overrides,record\n"


def test_a_file_is_read_once_a_row_with_overrides_in_one_order(tmp_path):
    path = tmp_path / "membership.csv"
    row = "rank,cpu,evaluate,seed=0 method=adafuse,f2ffe3127139\n"
    path.write_text(HEAD + row + row + ",cpu,pretrain,task=pretrain,59b790d79c78\n")
    found = membership.read(path)
    assert found.to_numpy().tolist() == [
        ["rank", "cpu", "evaluate", "method=adafuse seed=0", "f2ffe3127139"],
        ["", "cpu", "pretrain", "task=pretrain", "59b790d79c78"],
    ]


@pytest.mark.parametrize("text", ["", "experiment,record\nrank,f2ffe3127139\n", HEAD + "a,b,c,d,e,f,g\n"])
def test_a_file_that_is_none_is_refused_in_one_line(tmp_path, text):
    path = tmp_path / "membership.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=r"membership\.csv") as raised:
        membership.read(path)
    assert "\n" not in str(raised.value)


def test_without_a_file_a_record_has_what_its_command_says(made):
    command = (
        "scripts/run.py -m experiment=rank profile=gpu runs_dir='a b' tracker=off seed=1 +experts.rank=8"
    )
    record = made("aaaaaaaaaaaa", "train", header={"experiment": "rank", "command": command})
    assert membership.of_headers([record]).to_numpy().tolist() == [
        ["rank", "gpu", "train", "+experts.rank=8 seed=1", "aaaaaaaaaaaa"]
    ]


def test_coordinates_leave_out_which_repeat_it_is():
    assert membership.coordinates("+batch=8 replicate=2 seed=1 latency.gates=zipf") == {
        "batch": "8",
        "latency.gates": "zipf",
    }


def test_paths_with_blanks_stay_whole(tmp_path, made):
    path = tmp_path / "membership.csv"
    words = "method=lora " + shlex.quote("model.path='/a, b/c'")
    row = ["own_model", "cpu", "train", words, "f2ffe3127139"]
    path.write_bytes(HEAD.encode() + written.as_csv([row]))
    (overrides,) = membership.read(path)["overrides"]
    assert membership.coordinates(overrides) == {"method": "lora", "model.path": "'/a, b/c'"}
    record = made("aaaaaaaaaaaa", "train", header={"command": f"python scripts/run.py {words}"})
    assert membership.of_headers([record])["overrides"].tolist() == [overrides]
