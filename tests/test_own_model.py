"""experiment=own_model on checkpoints of several families, with tokenizers that people bring: one command and table."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from adafuse import archive
from synthetic.checkpoints import declare, tiny_model
from synthetic.configurations import ROOT
from synthetic.scripts import ALWAYS_COUNTED
from synthetic.tokenizers import KINDS

FEW = [
    *("train.steps=4", "train.batch=4", "train.warmup_steps=1", "experts.count=4", "experts.rank=8"),
    *("latency.rounds=2", "latency.check_tokens=8", "context=24", "device=cpu", "method=base,lora,adafuse"),
    "arms.run=[base,base_again,lora_dense,adafuse_gather,adafuse_switch]",
]
ANSWERS = [
    {"prompt": f"Is {number} blue? Answer: ", "answer": "yes" if number % 3 else "no"} for number in range(40)
]
CHOICES = [
    {"prompt": row["prompt"], "choices": ["yes", "no"], "label": int(row["answer"] == "no")}
    for row in ANSWERS
]
# of each: sizes of its own, its tokenizer, what it is stored in, its rows, and their task
BROUGHT = {
    "Llama, tied, biases, no special tokens, bf16": (
        ("llama", {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True}),
        ("without special tokens", "bfloat16", CHOICES, "local_choices"),
    ),
    "Mistral, a window, no pad token": (
        ("mistral", {"sliding_window": 16, "head_dim": 16}),
        ("metaspace that appends its end", "float32", ANSWERS, "local_answers"),
    ),
    "Qwen3, windows in some blocks, fp16": (
        ("qwen3", {"head_dim": 8, "use_sliding_window": True, "sliding_window": 16, "max_window_layers": 2}),
        ("words", "float16", ANSWERS, "local_answers"),
    ),
}


def bring(folder: Path, name: str) -> tuple[Path, Path]:
    """A checkpoint folder and one of rows, in a place that needs quotes."""
    import torch

    (model_type, changes), (kind, dtype, rows, _) = BROUGHT[name]
    tokenizer = KINDS[kind]()
    own = tiny_model(model_type, vocab_size=len(tokenizer), pad_token_id=None, **changes)
    checkpoint, items = folder / "my models, all" / name, folder / "my items"
    own.to(getattr(torch, dtype)).save_pretrained(checkpoint)
    tokenizer.save_pretrained(checkpoint)
    declare(checkpoint, bos_token_id=None, eos_token_id=None)
    items.mkdir(parents=True)
    for number, split in enumerate(("train", "validation", "test")):
        own_rows = rows[number * 8 : number * 8 + 8]
        (items / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own_rows))
    return checkpoint, items


@pytest.mark.slow
@pytest.mark.parametrize("name", BROUGHT)
def test_a_model_that_nobody_here_made_is_trained_evaluated_and_timed(name: str, tmp_path: Path) -> None:
    checkpoint, items = bring(tmp_path, name)
    dtype, task = BROUGHT[name][1][1], BROUGHT[name][1][3]
    job = [
        "experiment=own_model",
        f"model.path={checkpoint}",
        f"data.path={items}",
        f"runs_dir={tmp_path / 'r, s'}",
    ]
    done = subprocess.run(
        [sys.executable, "-c", ALWAYS_COUNTED, *job, *FEW],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    said = done.stdout
    assert done.returncode == 0, said + done.stderr
    found = archive.load([tmp_path / "r, s" / "records"]).records
    assert all(record.status == "ok" for record in found)
    tasks = [record.run["task"] for record in found]
    assert (tasks.count("train"), tasks.count("evaluate"), tasks.count("latency")) == (2, 3, 1)
    config = found[0].run["config"]
    assert (config["suite"]["tasks"], config["data"]["families"]) == ([task], [])
    assert (config["model"]["dtype"], config["evaluate_dtype"]) == ("float32", "float32"), "on a CPU"
    assert {line["stored_in"] for record in found for line in record.of("checkpoint")} == {dtype}
    assert all(line["passed"] for record in found for line in record.of("check"))
    assert said.count("done already") == 0, "equal cells are no news"
    assert f"backbone: {checkpoint}, stored in {dtype}, computed in float32" in said
    assert f"{items}/train.jsonl: 8 rows" in said
    table = said[said.index("accuracy, % [95 %]") :]
    assert [
        word in table for word in ("my items", "Backbone (again)", "AdaFuse (switch)", "weights, MiB")
    ] == [True] * 4
    assert "adafuse: experts change at " in table and "left out" not in table
    page = tmp_path / "r, s" / "report" / "report.html"
    assert page.is_file() and f"page: {page}" in table


@pytest.mark.slow
def test_half_precision_is_trained_evaluated_and_timed_where_it_is_asked_for(tmp_path: Path) -> None:
    checkpoint, items = bring(tmp_path, next(iter(BROUGHT)))
    job = ["experiment=own_model", "model.dtype=bfloat16", f"model.path={checkpoint}", f"data.path={items}"]
    command = [sys.executable, "-c", ALWAYS_COUNTED, *job, f"runs_dir={tmp_path / 'runs'}", *FEW]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    found = archive.load([tmp_path / "runs" / "records"]).records
    assert {record.run["config"]["evaluate_dtype"] for record in found} == {"bfloat16"}
    from safetensors.torch import load_file

    factors = next(tmp_path.glob("runs/adapters/*adafuse*/expert_00/adapter_model.safetensors"))
    assert {str(tensor.dtype) for tensor in load_file(factors).values()} == {"torch.float32"}


def test_rows_that_are_not_there_are_one_line_though_the_task_is_named(tmp_path: Path) -> None:
    checkpoint, _ = bring(tmp_path, next(iter(BROUGHT)))
    job = ["experiment=own_model", f"model.path='{checkpoint}'", f"data.path={tmp_path}/none", *FEW]
    command = [
        sys.executable,
        "scripts/run.py",
        *job,
        "suite.tasks=[local_answers]",
        f"runs_dir={tmp_path}/runs",
    ]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=120)
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1 and "none is not a folder" in line
