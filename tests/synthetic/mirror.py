"""A folder of repositories as the hub has them: a few made-up rows in the published columns, and tiny checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

Row = dict[str, Any]

THINGS = ["stone", "river", "cloud", "apple", "horse", "candle", "window", "bridge", "violin", "garden"]
COLOURS = ["red", "blue", "green", "white", "black"]


def mirror(folder: Path, subjects: list[str], rows: int = 12) -> Path:
    """Every repository of profile paper; `subjects` are MMLU's."""
    _checkpoint(folder / "meta-llama/Llama-2-7b-hf", "llama")
    _checkpoint(folder / "mistralai/Mistral-7B-v0.1", "mistral")
    _mixture(folder, rows)
    _questionnaires(folder, rows)
    _evaluation(folder, subjects, rows)
    talk = [
        {"id": str(i), "conversations": [_said("human", f"Tell me of a {_thing(i)} {i}")]} for i in range(60)
    ]
    file = "anon8231489123/ShareGPT_Vicuna_unfiltered/ShareGPT_V3_unfiltered_cleaned_split.json"
    _json(folder / file, talk)
    return folder


def _mixture(folder: Path, rows: int) -> None:
    turns = [
        [_said("system", "You are short."), _said("human", f"Name thing {i}"), _said("gpt", _thing(i))]
        for i in range(rows)
    ]
    turns += [[_said("human", "Hello"), _said("gpt", "Hi"), _said("human", "Bye"), _said("gpt", "Bye")]]
    orca = [{"conversations": [turn | {"weight": None} for turn in talk]} for talk in turns]
    _json_lines(folder / "Open-Orca/SlimOrca/oo-labeled_correct.gpt4.sharegpt.jsonl", orca)
    code = {"lang": "python", "raw_index": 1, "index": 1, "seed": "x", "openai_fingerprint": "fp"}
    oss = [code | {"problem": f"Print {i}", "solution": f"```python\nprint({i})\n```"} for i in range(rows)]
    _json_lines(folder / "ise-uiuc/Magicoder-OSS-Instruct-75K/data-oss_instruct-decontaminated.jsonl", oss)
    evol = [{"instruction": f"Return {i}", "response": f"return {i}"} for i in range(rows)]
    _json_lines(
        folder / "ise-uiuc/Magicoder-Evol-Instruct-110K/data-evol_instruct-decontaminated.jsonl", evol
    )
    sums = [
        {
            "type": "GSM_AnsAug",
            "query": f"{i}+1?",
            "original_question": f"{i}+1?",
            "response": f"The answer is: {i + 1}",
        }
        for i in range(rows)
    ]
    _json(folder / "meta-math/MetaMathQA/MetaMathQA-395K.json", sums)


def _questionnaires(folder: Path, rows: int) -> None:
    for first, (split, name) in enumerate({"train": "0a", "validation": "0b", "test": "0c"}.items()):
        science = [
            {
                "image": {"bytes": b"png", "path": "image.png"} if i == 1 else None,
                "question": f"Which is {_colour(i)}? {split} {i}",
                "choices": [_thing(i), _thing(i + 1)],
                "answer": i % 2,
                "hint": "Look." if i % 3 else "",
                **dict.fromkeys(("task", "grade", "subject", "topic", "category", "skill"), "x"),
                "lecture": "",
                "solution": "",
            }
            for i in range(rows)
        ]
        _parquet(folder / f"derek-thomas/ScienceQA/data/{split}-00000-of-00001-{name}.parquet", science)
        common = [
            {
                "id": f"{split}{i}",
                "question": f"What is a {_thing(i + first)} for? {split} {i}",
                "question_concept": _thing(i),
                "choices": {"label": list("ABCDE"), "text": [_thing(i + n) for n in range(5)]},
                "answerKey": "" if split == "test" else "ABCDE"[i % 5],
            }
            for i in range(rows)
        ]
        _parquet(folder / f"tau/commonsense_qa/data/{split}-00000-of-00001.parquet", common)
        book = [
            {
                "id": f"{split}{i}",
                "question_stem": f"A {_thing(i)} is {split} {i}",
                "choices": {"text": [_colour(i + n) for n in range(4)], "label": list("ABCD")},
                "answerKey": "ABCD"[i % 4],
            }
            for i in range(rows)
        ]
        _parquet(folder / f"allenai/openbookqa/main/{split}-00000-of-00001.parquet", book)


def _evaluation(folder: Path, subjects: list[str], rows: int) -> None:
    arc, swag, mmlu = folder / "allenai/ai2_arc", folder / "Rowan/hellaswag", folder / "cais/mmlu"
    truth, wino = folder / "truthfulqa/truthful_qa", folder / "allenai/winogrande"
    for split in ("train", "validation", "test"):
        name = f"{split}-00000-of-00001.parquet"
        _parquet(
            arc / "ARC-Challenge" / name,
            [
                {
                    "id": str(i),
                    "question": f"Which is a {_thing(i)}? {split}",
                    "choices": {"text": [_thing(i + n) for n in range(4)], "label": list("ABCD")},
                    "answerKey": "ABCD"[i % 4],
                }
                for i in range(rows)
            ],
        )
        _parquet(
            swag / "data" / name,
            [
                {
                    "ind": i,
                    "activity_label": "Walking",
                    "ctx_a": f"A man sees a {_thing(i)}.",
                    "ctx_b": "he",
                    "ctx": f"A man sees a {_thing(i)}. he",
                    "endings": [f"takes the {_thing(i + n)}." for n in range(4)],
                    "source_id": f"activitynet~{i}",
                    "split": split,
                    "split_type": "indomain",
                    "label": "" if split == "test" else str(i % 4),
                }
                for i in range(rows)
            ],
        )
        _parquet(
            wino / "winogrande_xl" / name,
            [
                {
                    "sentence": f"The {_thing(i)} beat the {_thing(i + 1)} because _ was big.",
                    "option1": _thing(i),
                    "option2": _thing(i + 1),
                    "answer": "" if split == "test" else str(1 + i % 2),
                }
                for i in range(rows)
            ],
        )
    for subject in subjects:
        for split in ("dev", "validation", "test"):
            _parquet(
                mmlu / subject / f"{split}-00000-of-00001.parquet",
                [
                    {
                        "question": f"Which {_thing(i)}?",
                        "subject": subject,
                        "choices": [_colour(i + n) for n in range(4)],
                        "answer": i % 4,
                    }
                    for i in range(5 if split == "dev" else 2)
                ],
            )
    asked = [
        {
            "question": f"What is a {_thing(i)}?",
            "mc1_targets": {"choices": [_thing(i), _thing(i + 1)], "labels": [1, 0]},
            "mc2_targets": {"choices": [_thing(i), _thing(i + 1), _thing(i + 2)], "labels": [1, 0, 0]},
        }
        for i in range(rows)
    ]
    _parquet(truth / "multiple_choice/validation-00000-of-00001.parquet", asked)


def _checkpoint(folder: Path, model_type: str) -> None:
    """Two layers in shards with an index, and a byte-pair tokenizer that begins texts with <s>."""
    words = [f"{thing} {colour}" for thing in THINGS for colour in COLOURS]
    pieces = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own = Tokenizer(models.BPE())
    own.pre_tokenizer, own.decoder = pieces, decoders.ByteLevel()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special, initial_alphabet=pieces.alphabet())
    own.train_from_iterator(words, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=own, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": len(tokenizer)}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2 if model_type == "mistral" else 4}
    ends = {"bos_token_id": 1, "eos_token_id": 2, "max_position_embeddings": 4096}
    config = AutoConfig.for_model(model_type, **sizes, **heads, **ends)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
    model.half().save_pretrained(folder, max_shard_size="40KB")
    tokenizer.save_pretrained(folder)


def _thing(i: int) -> str:
    return THINGS[i % len(THINGS)]


def _colour(i: int) -> str:
    return COLOURS[i % len(COLOURS)]


def _said(speaker: str, text: str) -> Row:
    return {"from": speaker, "value": text}


def _parquet(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def _json(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(rows))


def _json_lines(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
