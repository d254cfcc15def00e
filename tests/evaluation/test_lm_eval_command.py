"""python -m adafuse.lm_eval: lm-eval's own command line finds the same as our harness, item by item."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import lm_eval
import pytest
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerFast

from adafuse import lm_eval as command
from adafuse import strategies
from adafuse.adapters import store
from adafuse.config import Data, StrategyName, Suite
from adafuse.data import items
from adafuse.evaluation import suites
from adafuse.evaluation.adapted_lm import AdaptedLM
from adafuse.evaluation.harness import evaluate
from adafuse.model.backbone import byte_tokenizer
from synthetic.adapters import adapted
from synthetic.checkpoints import save, tiny_model
from synthetic.configurations import GEOMETRY, ROOT, compose

FAMILIES = ["cloze", "copy"]
Samples = dict[str, list[dict[str, Any]]]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """backbone/, adafuse/, pesc/ and data/."""
    folder = tmp_path_factory.mktemp("made")
    save(tiny_model(), folder / "backbone")
    for name in ("adafuse", "pesc"):
        adapter = adapted(tiny_model(), compose(*GEOMETRY, f"method={name}"))
        store.save(adapter, folder / name, base_name="backbone")
    few = Data(name="few", families=FAMILIES, train_items=2, validation_items=2, test_items=5)
    items.write(few, folder / "data", seed=0)
    return folder


def arguments(made: Path, out: Path, model_args: str) -> list[str]:
    return [
        *("--model", "adafuse", "--model_args", model_args, "--tasks", ",".join(FAMILIES)),
        *("--include_path", str(suites.TASKS), "--metadata", f"data_folder={made / 'data'}"),
        *("--batch_size", "4", "--log_samples", "--output_path", str(out), "--device", "cpu"),
    ]


def samples(out: Path) -> Samples:
    """What lm-eval's command has written down of every item, in the order of the items."""
    found = {}
    for family in FAMILIES:
        (file,) = out.rglob(f"samples_{family}_*.jsonl")
        lines = [json.loads(line) for line in file.read_text().splitlines()]
        found[family] = sorted(lines, key=lambda line: line["doc_id"])
    return found


def harness(
    made: Path, adapter: str | None, strategy: StrategyName, monkeypatch: pytest.MonkeyPatch
) -> Samples:
    """The same of our own harness, from a model that no file was between."""
    kept: list[Samples] = []
    plain = lm_eval.simple_evaluate

    def keeping(**how: Any) -> Any:
        results = plain(**how)
        kept.append(results["samples"])
        return results

    monkeypatch.setattr(lm_eval, "simple_evaluate", keeping)
    model, merging = tiny_model(), False
    ours = None if adapter is None else adapted(model, compose(*GEOMETRY, f"method={adapter}"))
    if ours is not None:
        ours.install(strategies.make(strategy))
        merging = ours.merging
    suite = Suite(name="test", tasks=FAMILIES, batch=4)
    evaluate(model, byte_tokenizer(), ours, suite, made / "data", merging=merging, seed=0)
    return kept[0]


def call(monkeypatch: pytest.MonkeyPatch, *given: str) -> int:
    """The command in this process, without an index of lm-eval's thousands of tasks."""
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)
    monkeypatch.setattr(sys, "argv", ["lm_eval", *given])
    return command.main()


def assert_alike(ours: Samples, theirs: Samples) -> None:
    for family in FAMILIES:
        assert len(ours[family]) == len(theirs[family]) == 5
        for one, other in zip(ours[family], theirs[family], strict=True):
            assert one["doc_id"] == other["doc_id"] and one["prompt_hash"] == other["prompt_hash"]
    for one, other in zip(ours["cloze"], theirs["cloze"], strict=True):
        for (value, greedy), (expected, was) in zip(
            one["filtered_resps"], other["filtered_resps"], strict=True
        ):
            assert float(value) == pytest.approx(float(expected), abs=1e-4)
            assert str(greedy) == str(was)
    generated = [[sample["filtered_resps"] for sample in found["copy"]] for found in (ours, theirs)]
    assert generated[0] == generated[1] and len(set(map(str, generated[0]))) > 1


@pytest.mark.parametrize(
    ("adapter", "strategy"), [(None, "dense"), ("adafuse", "gather"), ("adafuse", "switch"), ("pesc", "loop")]
)
def test_every_item_is_what_our_harness_finds(
    adapter: str | None, strategy: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    model_args = f"pretrained={made / 'backbone'},strategy={strategy}"
    model_args += f",adapter={made / adapter}" if adapter else ""
    assert call(monkeypatch, *arguments(made, tmp_path, model_args)) == 0
    assert "|cloze|" in capsys.readouterr().out, "lm-eval's own table"
    expected = harness(made, adapter, StrategyName[strategy], monkeypatch)
    assert_alike(samples(tmp_path), expected)
    if adapter:
        plain = harness(made, None, StrategyName.dense, monkeypatch)
        with pytest.raises(AssertionError):
            assert_alike(expected, plain)


@pytest.mark.slow
def test_two_processes_find_what_one_finds(made: Path, tmp_path: Path, monkeypatch) -> None:
    given = arguments(made, tmp_path, f"pretrained={made / 'backbone'},adapter={made / 'adafuse'}")
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "-m", "adafuse.lm_eval"]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "src")}
    done = subprocess.run([*launch, *given], capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "on rank 1" in done.stderr, "items were shared"
    assert_alike(samples(tmp_path), harness(made, "adafuse", StrategyName.dense, monkeypatch))


@pytest.mark.parametrize(
    ("model_args", "message"),
    [
        ("adapter=/a", "--model_args lacks pretrained=FOLDER"),
        ("pretrained=/nonesuch", "/nonesuch is not a folder"),
        (
            "pretrained=.,peft=/a",
            "--model_args has no peft: choose from pretrained, adapter, strategy, dtype",
        ),
        ("pretrained=.,device_map=auto", "device_map: a backbone lies on one device (docs/running.md)"),
        ("pretrained=.,strategy=fast", "strategy='fast' is none of ['loop', 'masked_loop', 'dense'"),
        ("pretrained=.,strategy=peft", "strategy='peft' is none of"),
        ("pretrained=MADE/backbone,dtype=int8", "dtype='int8' is none of ['float32', 'bfloat16', 'float16']"),
        ("pretrained=MADE", "MADE has no config.json"),
        ("pretrained=MADE/backbone,adapter=MADE/data", "MADE/data has no router_config.json"),
        ("pretrained=MADE/backbone,adapter=MADE/pesc,strategy=switch", "pesc cannot use strategy switch"),
    ],
)
def test_a_bad_argument_is_one_line(
    model_args: str, message: str, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys
) -> None:
    given = arguments(made, tmp_path, model_args.replace("MADE", str(made)))
    assert call(monkeypatch, *given) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("error: ") and message.replace("MADE", str(made)) in line
    assert not list(tmp_path.iterdir())


def test_a_task_that_samples_is_refused(made: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    given = arguments(made, tmp_path, f"pretrained={made / 'backbone'}")
    assert call(monkeypatch, *given, "--gen_kwargs", "do_sample=True,temperature=0.5") == 2
    assert "only greedy decoding is evaluated" in capsys.readouterr().err


def test_a_chat_begins_once(tiny_llama) -> None:
    """Templates write the token that begins a text, and so do tokenizers."""
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{{ bos_token }}{% for m in messages %}{{ m['content'] }}{% endfor %}"
    said = [{"role": "user", "content": "ab"}]
    for begins, expected in ((False, "<bos>ab"), (True, "ab")):
        if begins:
            tokenizer = _beginning(tokenizer)
        lm = AdaptedLM(tiny_llama(), tokenizer, None, 1, merging=False)
        text = lm.apply_chat_template(said)
        assert text == expected
        assert lm.tok_encode(text).count(tokenizer.bos_token_id) == 1


def _beginning(tokenizer: PreTrainedTokenizerFast) -> PreTrainedTokenizerFast:
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    return tokenizer
