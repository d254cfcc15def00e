"""What the paper's experiments take from the hub: repositories at fixed revisions, and how their rows are asked.

In: a folder that holds a repository's files (parquet, JSON or JSON lines). Out: rows as data.path takes them, prompt
and answer, or prompt, choices and label. Next: prepare.py, which fetches the files and writes the rows.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from typing import Any

Row = dict[str, Any]
Splits = dict[str, list[Row]]

LETTERS = "ABCDE"
# MoLA trains on Alpaca's form, its README: the question in it, and "Answer: The answer is B." after it
ASKED = (
    "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
    "### Instruction:\n{}\n\n### Response:\n"
)
# PESC's own shares, IDAE-500K in its paper; how many of its rows there are in all is --rows
SHARES = {"slimorca": 3, "magicoder": 1, "metamathqa": 1}
MIXTURE_ROWS = 128_000  # 1,000 steps of 128 rows (conf/profile/paper.yaml); paper: unstated
HELD_OUT = 200
PROMPTS = 50  # paper: 50 queries of ShareGPT, which ones is unstated


@dataclass(frozen=True)
class Source:
    """A repository on the hub. `files` are patterns of those that are taken, `megabytes` what they come to."""

    repo: str
    revision: str
    files: tuple[str, ...]
    megabytes: int
    licence: str
    kind: str = "dataset"


WEIGHTS = ("config.json", "generation_config.json", "model*.safetensors*", "tokenizer*", "special_tokens*")
LLAMA = Source(
    "meta-llama/Llama-2-7b-hf",
    "01c7f73d771dfac7d292323805ebc428287df4f9",
    WEIGHTS,
    13_480,
    "Llama 2 Community License, to be accepted on the hub",
    "model",
)
MISTRAL = Source(
    "mistralai/Mistral-7B-v0.1",
    "27d67f1b5f57dc0953326b2601d68371d40ea8da",
    WEIGHTS,
    14_490,
    "Apache-2.0",
    "model",
)
SLIMORCA = Source("Open-Orca/SlimOrca", "ce9ed009ef3292bac33d3520afaf5ec804066120", ("*.jsonl",), 986, "MIT")
MAGICODER_OSS = Source(
    "ise-uiuc/Magicoder-OSS-Instruct-75K",
    "5f839b1f368a76b161028bb9edff055db34022b2",
    ("*.jsonl",),
    194,
    "MIT",
)
MAGICODER_EVOL = Source(
    "ise-uiuc/Magicoder-Evol-Instruct-110K",
    "b0079beaa0361d82412520b873715bee59cc7dd4",
    ("*.jsonl",),
    250,
    "Apache-2.0",
)
METAMATHQA = Source(
    "meta-math/MetaMathQA",
    "aa4f34d3d2d3231299b5b03d9b3e5a20da45aa18",
    ("MetaMathQA-395K.json",),
    396,
    "MIT",
)
SCIENCEQA = Source(
    "derek-thomas/ScienceQA",
    "f18b0a70359ebfb41f658fd564208d0355b013f4",
    ("data/*",),
    630,
    "CC-BY-NC-SA-4.0",
)
COMMONSENSE_QA = Source(
    "tau/commonsense_qa", "94630fe30dad47192a8546eb75f094926d47e155", ("data/*",), 2, "MIT"
)
OPENBOOKQA = Source(
    "allenai/openbookqa",
    "388097ea7776314e93a529163e0fea805b8a6454",
    ("main/*",),
    1,
    "unknown on its card",
)
SHAREGPT = Source(
    "anon8231489123/ShareGPT_Vicuna_unfiltered",
    "192ab2185289094fc556ec8ce5ce1e8e587154ca",
    ("ShareGPT_V3_unfiltered_cleaned_split.json",),
    673,
    "Apache-2.0 on its card; people's conversations with ChatGPT",
)
# by the task of lm-eval that reads it
EVALUATION = {
    "arc_challenge": Source(
        "allenai/ai2_arc",
        "210d026faf9955653af8916fad021475a3f00453",
        ("ARC-Challenge/*",),
        1,
        "CC-BY-SA-4.0",
    ),
    "hellaswag": Source(
        "Rowan/hellaswag",
        "218ec52e09a7e7462a5400043bb9a69a41d06b76",
        ("data/*",),
        36,
        "MIT in its authors' repository",
    ),
    "mmlu": Source(
        "cais/mmlu",
        "c30699e8356da336a370243923dbaf21066bb9fe",
        ("*/dev-*", "*/validation-*", "*/test-*"),
        15,
        "MIT",
    ),
    "truthfulqa_mc2": Source(
        "truthfulqa/truthful_qa",
        "741b8276f2d1982aa3d5b832d3ee81ed3b896490",
        ("multiple_choice/*",),
        1,
        "Apache-2.0",
    ),
    "winogrande": Source(
        "allenai/winogrande",
        "01e74176c63542e6b0bcb004dcdea22d94fb67b5",
        ("winogrande_xl/*",),
        3,
        "CC-BY in its authors' repository",
    ),
    "commonsense_qa": COMMONSENSE_QA,
    "openbookqa": OPENBOOKQA,
}


@dataclass(frozen=True)
class Data:
    """A folder for data.path: where its rows come from, and what makes its splits of them, by repository."""

    sources: tuple[Source, ...]
    splits: Callable[[dict[str, Path], int], Splits]


def apart(splits: Splits) -> Splits:
    """Without rows of train that stand in another split, and of validation that stand in test."""
    test = {_question(row) for row in splits["test"]}
    validation = [row for row in splits["validation"] if _question(row) not in test]
    others = test | {_question(row) for row in validation}
    train = [row for row in splits["train"] if _question(row) not in others]
    return {"train": train, "validation": validation, "test": splits["test"]}


def taken(source: Source, name: str) -> bool:
    """Whether a file of the repository is among those that are taken."""
    return any(fnmatch(name, pattern) for pattern in source.files)


# --- three questionnaires, each the domain of an adapter: MoLA's recipe ---


def scienceqa(folders: dict[str, Path], rows: int) -> Splits:
    """The questions without an image, as MoLA has them."""

    def asked(row: Row) -> Row | None:
        if row["image"] is not None:
            return None
        context = f"Context: {row['hint'].strip() or 'N/A'}\n"
        return _choice(context, row["question"], row["choices"], row["answer"])

    read = _by_split(folders[SCIENCEQA.repo])
    return {split: list(filter(None, map(asked, found))) for split, found in read.items()}


def commonsense_qa(folders: dict[str, Path], rows: int) -> Splits:
    """Its test split has no answers: as in MoLA validation is the test, and some of train is held out in its place."""
    read = _by_split(folders[COMMONSENSE_QA.repo])
    found = {split: [_lettered(row, "question") for row in read[split]] for split in ("train", "validation")}
    train = sorted(found["train"], key=_digest)
    held = _held_out(len(train))
    return {"train": train[held:], "validation": train[:held], "test": found["validation"]}


def openbookqa(folders: dict[str, Path], rows: int) -> Splits:
    """The questions without the book's facts, in the splits that were published."""
    read = _by_split(folders[OPENBOOKQA.repo])
    return {split: [_lettered(row, "question_stem") for row in found] for split, found in read.items()}


def _lettered(row: Row, question: str) -> Row:
    """A row whose choices are text and label; MoLA shows ScienceQA's form alone, these have no context in it."""
    place = list(row["choices"]["label"]).index(row["answerKey"].strip())
    return _choice("", row[question], row["choices"]["text"], place)


def _choice(context: str, question: str, options: list[str], label: int) -> Row:
    shown = " ".join(f"({letter}) {text}" for letter, text in zip(LETTERS, options, strict=False))
    letters = [f"Answer: The answer is {letter}." for letter, _ in zip(LETTERS, options, strict=False)]
    prompt = ASKED.format(f"{context}Question: {question}\nOptions: {shown}\n")
    return {"prompt": prompt, "choices": letters, "label": int(label)}


# --- the mixture for general ability: PESC's ---


def pesc(folders: dict[str, Path], rows: int) -> Splits:
    """Three sources by their shares, `rows` in all, chosen by hash; held-out rows by their shares as well."""
    readers = {
        "slimorca": [(_first_turn(row) for row in _rows(folders[SLIMORCA.repo]))],
        "magicoder": [
            (_turn("", row["problem"], row["solution"]) for row in _rows(folders[MAGICODER_OSS.repo])),
            (_turn("", row["instruction"], row["response"]) for row in _rows(folders[MAGICODER_EVOL.repo])),
        ],
        "metamathqa": [(_turn("", row["query"], row["response"]) for row in _rows(folders[METAMATHQA.repo]))],
    }
    splits: Splits = {"train": [], "validation": [], "test": []}
    for name, parts in readers.items():
        share = rows * SHARES[name] // sum(SHARES.values())
        found = _first_by_hash((row for part in parts for row in part if row), share + 2 * HELD_OUT)
        held = _held_out(len(found))
        # an answer that is scored is one line: generation stops at its end
        test = list(islice((row for row in found if "\n" not in row["answer"]), held))
        kept = {_digest(row) for row in test}
        rest = [row for row in found if _digest(row) not in kept]
        splits["test"] += test
        splits["validation"] += rest[:held]
        splits["train"] += rest[held : held + share]
    return splits


def _first_turn(row: Row) -> Row | None:
    """SlimOrca's conversation, if it is one question and its answer."""
    said = [(turn["from"], turn["value"]) for turn in row["conversations"]]
    system = said.pop(0)[1] if said and said[0][0] == "system" else ""
    if [speaker for speaker, _ in said] != ["human", "gpt"]:
        return None
    return _turn(system, said[0][1], said[1][1])


def _turn(system: str, question: str, answer: str) -> Row | None:
    """PESC's template, its train_moe.py. None for what is blank."""
    if not question.strip() or not answer.strip():
        return None
    opening = f"### System:\n{system}\n" if system.strip() else ""
    return {"prompt": f"{opening}### Human:\n{question}\n### Assistant:\n", "answer": answer}


# --- prompts to be timed with ---


def sharegpt(folder: Path) -> list[Row]:
    """The first words of 50 conversations, chosen by hash."""
    opened = (row["conversations"][0] for row in _rows(folder) if row["conversations"])
    said = (turn["value"] for turn in opened if turn["from"] == "human" and turn["value"].strip())
    return _first_by_hash(({"prompt": text} for text in said), PROMPTS)


# --- rows ---


def _by_split(folder: Path) -> dict[str, list[Row]]:
    """Rows by split, which a file's name begins with: train-00000-of-00001.parquet."""
    return {split: list(_rows(folder, split)) for split in ("train", "validation", "test")}


def _rows(folder: Path, split: str = "") -> Iterator[Row]:
    """All rows of a repository's files, or of those of a split. Raises ValueError if there is no such file."""
    files = sorted(path for path in folder.rglob(f"{split}*") if path.suffix in READERS and path.is_file())
    if not files:
        raise ValueError(f"{folder} has no {split or 'data'} file: {', '.join(READERS)}")
    for path in files:
        yield from READERS[path.suffix](path)


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=256):
            yield from batch.to_pylist()


def _lines(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        yield from (json.loads(line) for line in file if line.strip())


def _list(path: Path) -> Iterator[Row]:
    with path.open("rb") as file:
        opening = file.read(1)
    yield from json.loads(path.read_bytes()) if opening == b"[" else _lines(path)


READERS: dict[str, Callable[[Path], Iterator[Row]]] = {
    ".parquet": _parquet,
    ".jsonl": _lines,
    ".json": _list,
}


def _first_by_hash(rows: Iterator[Row], count: int) -> list[Row]:
    """The `count` rows whose hashes are the smallest, none twice: the same ones whatever their order."""
    return heapq.nsmallest(count, _once(rows), key=_digest)


def _once(rows: Iterator[Row]) -> Iterator[Row]:
    seen = set()
    for row in rows:
        if (known := _digest(row)) not in seen:
            seen.add(known)
            yield row


def card(folder: Path) -> str:
    """A dataset card for what is there: a folder loads only if the first configuration that its card names does."""
    configs: dict[str, dict[str, list[str]]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.suffix in READERS and path.is_file()):
        name, split = path.parent.name, re.split("[-.]", path.name)[0]
        files = configs.setdefault("default" if name == "data" else name, {}).setdefault(split, [])
        files.append(str(path.relative_to(folder)))
    held = [
        {"config_name": name, "data_files": [{"split": split, "path": files} for split, files in its.items()]}
        for name, its in configs.items()
    ]
    return f"---\n{json.dumps({'configs': held})}\n---\n"


def _digest(row: Row) -> str:
    return hashlib.sha256(json.dumps(row).encode()).hexdigest()


def _held_out(there: int) -> int:
    return min(HELD_OUT, there // 10 or 1)


def _question(row: Row) -> tuple[str, int | None]:
    """What makes two rows one exercise, whatever the spaces: the prompt, and where it has choices the right one."""
    return " ".join(row["prompt"].split()), row.get("label")


DATA = {
    "pesc": Data((SLIMORCA, MAGICODER_OSS, MAGICODER_EVOL, METAMATHQA), pesc),
    "scienceqa": Data((SCIENCEQA,), scienceqa),
    "commonsense_qa": Data((COMMONSENSE_QA,), commonsense_qa),
    "openbookqa": Data((OPENBOOKQA,), openbookqa),
}
