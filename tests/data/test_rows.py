"""The user's own rows: what is read as it stands, and what is refused with its file, line, field and reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from adafuse.data import rows
from adafuse.data.families import Item

ASKED = {"prompt": "p", "answer": "a"}
CHOSEN = {"prompt": "p", "choices": ["a", "b"], "label": 1}


def folder_with(folder: Path, test: bytes, train: bytes = b'{"prompt": "t", "answer": "x"}') -> str:
    (folder / "train.jsonl").write_bytes(train)
    (folder / "validation.jsonl").write_bytes(b'{"prompt": "v", "answer": "x"}\n')
    (folder / "test.jsonl").write_bytes(test)
    return str(folder)


def line(row: object) -> bytes:
    return json.dumps(row).encode()


REFUSED: dict[str, tuple[bytes, str]] = {
    "label below": (
        line(CHOSEN | {"label": -1}),
        "line 1, label: is -1: the place of the right choice, 0 to 1",
    ),
    "label beyond": (line(CHOSEN | {"label": 2}), "line 1, label: is 2"),
    "label true": (line(CHOSEN | {"label": True}), "line 1, label: should be a valid integer, and is true"),
    "label as text": (line(CHOSEN | {"label": "1"}), 'line 1, label: should be a valid integer, and is "1"'),
    "label of half": (line(CHOSEN | {"label": 1.0}), "line 1, label: should be a valid integer, and is 1.0"),
    "label NaN": (line(CHOSEN | {"label": float("nan")}), "line 1: NaN is no JSON"),
    "label of 6000 digits": (line(CHOSEN).replace(b"1}", b"9" * 6000 + b"}"), "line 1: Exceeds the limit"),
    "no label": (line({"prompt": "p", "choices": ["a", "b"]}), "line 1, label: is missing"),
    "label alone": (line(ASKED | {"label": 0}), "line 1, label: stands without choices"),
    "answer null": (line(ASKED | {"answer": None}), "line 1, answer: is missing, and so are choices"),
    "answer a number": (line(ASKED | {"answer": 4}), "line 1, answer: should be a valid string, and is 4"),
    "answer blank": (line(ASKED | {"answer": " \t"}), "line 1, answer: is blank"),
    "answer without width": (line(ASKED | {"answer": "\u200b\u00a0"}), "line 1, answer: is blank"),
    "answer of two lines": (line(ASKED | {"answer": "a\nb"}), "line 1, answer: has a line break"),
    "answer another choice": (
        line(CHOSEN | {"answer": "a"}),
        "line 1, answer: is not the choice that label=1",
    ),
    "prompt a list": (
        line(ASKED | {"prompt": ["p"]}),
        "line 1, prompt: should be a valid string, and is ['p']",
    ),
    "prompt empty": (line(ASKED | {"prompt": ""}), "line 1, prompt: is blank"),
    "no prompt": (line({"answer": "a"}), "line 1, prompt: is missing"),
    "choices a text": (
        line(CHOSEN | {"choices": "ab"}),
        'line 1, choices: should be a valid list, and is "ab"',
    ),
    "choice a number": (line(CHOSEN | {"choices": ["a", 2]}), "line 1, choices[1]: should be a valid string"),
    "choice blank": (line(CHOSEN | {"choices": ["a", " "]}), "line 1, choices[1]: is blank"),
    "one choice": (
        line(CHOSEN | {"choices": ["a"], "label": 0}),
        "line 1, choices: has 1: give at least two",
    ),
    "choices the same": (
        line(CHOSEN | {"choices": ["a", "a "]}),
        "line 1, choices: has two that are the same",
    ),
    "choices the same, written otherwise": (
        line(CHOSEN | {"choices": ["é", "e\u0301"]}),
        "line 1, choices: has two that are the same",
    ),
    "kinds mixed": (line(ASKED) + b"\n" + line(CHOSEN), "line 2, choices: has some, and line 1 has none"),
    "misspelt": (line(ASKED | {"choice": ["a"]}), "line 1, choice: is no field: write choices"),
    "key twice": (b'{"prompt": "p", "answer": "a", "answer": "b"}', "line 1: names 'answer' twice"),
    "half a pair": (line(ASKED | {"prompt": "\ud800"}), "line 1, prompt: has half of a surrogate pair"),
    "latin-1": ('{"prompt": "é", "answer": "a"}'.encode("latin-1"), "line 1: byte 12 is not UTF-8"),
    "utf-16": (json.dumps(ASKED).encode("utf-16"), "line 1: byte 0 is not UTF-8"),
    "nested deep": (b'{"prompt": ' + b"[" * 100_000, "line 1: is nested too deep"),
    "huge": (line(ASKED | {"prompt": "p" * 2**20}), "bytes, and a row may have 1048576: shorten it"),
    "blank within": (line(ASKED) + b"\n\n" + line(ASKED), "line 2: is blank"),
    "an array": (line([ASKED]), "line 1: is no object: a row is one JSON object a line"),
    "no json": (b"p,a", "line 1: Expecting value"),
    "cut short": (line(ASKED)[:-1], "line 1: Expecting ',' delimiter"),
    "empty": (b"\n\n", "test.jsonl is empty: give it at least one row"),
    "trained on": (line({"prompt": " t ", "answer": "y"}), "line 1, prompt: stands in line 1 of train.jsonl"),
}


@pytest.mark.parametrize(("content", "reason"), REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_refused_in_one_line(content: bytes, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError) as refusal:
        rows.fingerprints(folder_with(tmp_path, content))
    assert reason in str(refusal.value) and str(tmp_path / "test.jsonl") in str(refusal.value)
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 400


READ: dict[str, tuple[bytes, list[Item]]] = {
    "separators that JSON allows": (
        '{"prompt": "p\u2028q\u0085r", "answer": "a"}'.encode(),
        [Item("p\u2028q\x85r", "a")],
    ),
    "byte order mark": (b"\xef\xbb\xbf" + line(ASKED), [Item("p", "a")]),
    "blank at the end": (line(ASKED) + b"\n\n \n", [Item("p", "a")]),
    "ends of Windows": (line(ASKED) + b"\r\n" + line(ASKED) + b"\r\n", [Item("p", "a"), Item("p", "a")]),
    "nulls": (line(ASKED | {"choices": None, "label": None}), [Item("p", "a")]),
    "a pair of surrogates": (b'{"prompt": "\\ud83d\\ude00", "answer": "a"}', [Item("\U0001f600", "a")]),
    "spaces kept": (line({"prompt": "p: ", "answer": " a "}), [Item("p: ", " a ")]),
    "choices with their answer": (line(CHOSEN | {"answer": "b"}), [Item("p", "b", ["a", "b"], 1)]),
    "another question with the same answer": (line({"prompt": "other", "answer": "x"}), [Item("other", "x")]),
}


@pytest.mark.parametrize(("content", "items"), READ.values(), ids=READ)
def test_what_is_right_is_read_as_it_stands(content: bytes, items: list[Item], tmp_path: Path) -> None:
    folder = folder_with(tmp_path, content)
    assert set(rows.fingerprints(folder)) == {"train", "validation", "test"}
    assert rows.items(folder, "test") == items


def test_a_question_with_choices_may_return_with_another_answer(tmp_path: Path) -> None:
    train = line({"prompt": "Which is a city?", "choices": ["Rome", "blue"], "label": 0})
    folder = folder_with(tmp_path, train.replace(b"Rome", b"Oslo"), train)
    assert rows.fingerprints(folder)
    folder_with(tmp_path, train.replace(b"blue", b"red"), train)
    with pytest.raises(ValueError, match="stands in line 1 of train.jsonl"):
        rows.fingerprints(folder)


def test_a_question_that_is_written_otherwise_is_the_same(tmp_path: Path) -> None:
    train, test = (line({"prompt": f"Caf{letter}?", "answer": "yes"}) for letter in ("e\u0301", "é"))
    with pytest.raises(ValueError, match="line 1, prompt: stands in line 1 of train.jsonl"):
        rows.fingerprints(folder_with(tmp_path, test, train))


def test_answers_of_many_lines_may_be_learnt(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, line(ASKED), line({"prompt": "poem", "answer": "roses\nviolets"}))
    assert rows.fingerprints(folder) and rows.items(folder, "train")[0].answer == "roses\nviolets"


def test_what_is_odd_and_allowed_is_said(tmp_path: Path) -> None:
    twice = line(ASKED | {"id": 7}) + b"\n" + line(ASKED)
    folder = folder_with(tmp_path, twice, line({"prompt": "v", "answer": "x", "source": "s"}))
    assert rows.fingerprints(folder)
    assert [notice.removeprefix(f"{folder}: ") for notice in rows.notices(folder)] == [
        "fields that are not used: id, source",
        "1 rows of validation.jsonl stand in train.jsonl: its loss is not that of unseen rows",
        "1 rows of test.jsonl repeat an earlier one and count again",
    ]
    assert not list(rows.notices(folder_with(tmp_path, line(ASKED))))


def test_files_that_are_none_are_named(tmp_path: Path) -> None:
    folder = folder_with(tmp_path, line(ASKED))
    (tmp_path / "validation.jsonl").unlink()
    with pytest.raises(ValueError, match="validation.jsonl is missing"):
        rows.fingerprints(folder)
    (tmp_path / "validation.jsonl").mkdir()
    with pytest.raises(ValueError, match="validation.jsonl is not a file"):
        rows.fingerprints(folder)
    with pytest.raises(ValueError, match="train.jsonl is not a folder"):
        rows.fingerprints(f"{folder}/train.jsonl")
