"""lm-eval through our forward: per-item results, the strategy under test, refusals, and nothing left on the disk."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from adafuse import strategies
from adafuse.adapters.adapter import Adapter, randomise
from adafuse.config import Data, Experts, Method, Routing, StrategyName, Suite
from adafuse.data import items as training_data
from adafuse.data import real_tasks
from adafuse.data.families import NAMES
from adafuse.evaluation import adapted_lm, harness, suites
from adafuse.evaluation.harness import TaskResult, evaluate
from adafuse.evaluation.tasks.loader import before_the_first_error
from adafuse.model.backbone import byte_tokenizer
from synthetic.tokenizers import KINDS

DATA = Data(
    name="tiny", families=["copy", "majority", "cloze"], train_items=4, validation_items=4, test_items=6
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return training_data.write(DATA, tmp_path_factory.mktemp("data"), seed=0)


@pytest.fixture(autouse=True)
def no_inventory(monkeypatch: pytest.MonkeyPatch) -> None:
    """lm-eval asks pip for all that is installed, which takes most of a test's time and is not used."""
    monkeypatch.setattr("lm_eval.evaluator.add_env_info", lambda results: None)


def tiny(positions: int = 128, vocabulary: int = 260) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(
        LlamaConfig(vocab_size=vocabulary, max_position_embeddings=positions, **shape)
    ).eval()


def adapted(model: LlamaForCausalLM, strategy: StrategyName) -> Adapter:
    method = Method(name="adafuse", routing=Routing.token)
    adapter = Adapter(
        model, method, Experts(targets=["q_proj", "v_proj"], rank=2, count=4, top_k=2, alpha=64.0), 0
    )
    randomise(adapter, seed=0, scale=0.5)
    adapter.install(strategies.make(strategy))
    return adapter


def suite(*tasks: str, **changes: object) -> Suite:
    return Suite(name="test", tasks=list(tasks), batch=4, **changes)  # type: ignore[arg-type]


def test_each_item_is_kept_and_adds_up(folder: Path) -> None:
    results = evaluate(
        tiny(), byte_tokenizer(), None, suite("majority", "copy"), folder, merging=False, seed=0
    )
    assert [(r.suite_task, r.metric) for r in results] == [("majority", "acc"), ("copy", "exact_match")]
    for result in results:
        assert result.n == len(result.correct) == 6
        assert result.value == pytest.approx(sum(result.correct) / 6)
        assert result.version == "1.0" and len(result.task_hash) == 64
    assert results[0].stderr is not None


def test_a_choice_is_right_when_its_log_likelihood_is_largest(folder: Path) -> None:
    model, tokenizer = tiny(), byte_tokenizer()
    result = evaluate(model, tokenizer, None, suite("cloze"), folder, merging=False, seed=0)[0]
    expected = []
    for item in training_data.load_items(folder, "cloze", "test"):
        scores = []
        for choice in item.choices:
            ids = torch.tensor([tokenizer(item.prompt + choice)["input_ids"]])
            logs = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            scores.append(logs[-len(choice) :].sum().item())
        expected.append(float(scores.index(max(scores)) == item.label))
    assert result.correct == expected


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        # a window that sees nothing but padding, whose embedding is zero
        ("mistral", {"sliding_window": 4}),
        # frequencies of the longest sequence of a batch
        (
            "llama",
            {
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10_000.0,
                    "short_factor": [1.0] * 4,
                    "long_factor": [3.0] * 4,
                    "original_max_position_embeddings": 24,
                }
            },
        ),
    ],
)
def test_a_score_does_not_depend_on_what_else_is_in_its_batch(
    model_type: str, changes: dict, tiny_llama, folder: Path
) -> None:
    found = [
        evaluate(
            tiny_llama(model_type, **changes),
            byte_tokenizer(),
            None,
            Suite(name="test", tasks=["cloze"], batch=batch),
            folder,
            merging=False,
            seed=0,
        )[0].correct
        for batch in (1, 24)
    ]
    assert found[0] == found[1]


def test_generated_answers_come_from_the_model_under_test(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = [item.answer for item in training_data.load_items(folder, "copy", "test")]
    tokenizer, calls = byte_tokenizer(), []

    def parrot(model, adapter, ids, mask, max_new_tokens, stop):
        calls.append(ids.shape[0])
        prompts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        texts = [(p[4:-1] + "\n").ljust(max_new_tokens, "x") for p in prompts]
        return torch.cat([ids, torch.tensor([tokenizer(t)["input_ids"] for t in texts])], dim=1)

    monkeypatch.setattr(adapted_lm.decode, "generate", parrot)
    result = evaluate(tiny(), tokenizer, None, suite("copy"), folder, merging=False, seed=0)[0]
    assert result.correct == [1.0] * len(answers) and max(calls) > 1
    calls.clear()
    evaluate(tiny(), tokenizer, None, suite("copy"), folder, merging=True, seed=0)
    assert calls == [1] * len(answers)


def test_an_answer_is_over_at_its_end_token_whatever_its_batch_goes_on_with(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = byte_tokenizer()
    answers = {item.prompt: item.answer for item in training_data.load_items(folder, "copy", "test")}

    def know_all(model, adapter, ids, mask, max_new_tokens, stop):
        texts = [answers[prompt] for prompt in tokenizer.batch_decode(ids, skip_special_tokens=True)]
        new = [tokenizer(text)["input_ids"] + [tokenizer.eos_token_id] for text in texts]
        more = tokenizer("x" * max_new_tokens)["input_ids"]
        return torch.cat([ids, torch.tensor([(own + more)[:max_new_tokens] for own in new])], dim=1)

    monkeypatch.setattr(adapted_lm.decode, "generate", know_all)
    result = evaluate(tiny(), tokenizer, None, suite("copy"), folder, merging=False, seed=0)[0]
    assert result.correct == [1.0] * 6


def test_all_strategies_answer_alike_and_unlike_the_backbone(folder: Path) -> None:
    generated = {}
    for strategy in (None, StrategyName.gather, StrategyName.switch):
        model = tiny()
        adapter = None if strategy is None else adapted(model, strategy)
        lm = adapted_lm.AdaptedLM(
            model, byte_tokenizer(), adapter, 4, merging=strategy is StrategyName.switch
        )
        generated[strategy] = lm.generate_until(requests(folder), disable_tqdm=True)
    assert generated[StrategyName.gather] == generated[StrategyName.switch]
    assert generated[StrategyName.gather] != generated[None]


def requests(folder: Path) -> list:
    from lm_eval.api.instance import Instance

    how = {"until": ["\n"], "max_gen_toks": 6, "do_sample": False}
    items = training_data.load_items(folder, "copy", "test")
    return [Instance("generate_until", {}, (item.prompt, how), i) for i, item in enumerate(items)]


def test_generation_stops_at_the_text_and_remembers_it() -> None:
    tokenizer = byte_tokenizer()
    stop = adapted_lm.stop_at(tokenizer, ["\n", "END"], prompt_length=2)

    def ids(*rows: str) -> torch.Tensor:
        return torch.tensor([tokenizer(row)["input_ids"] for row in rows])

    assert stop(ids("\nab", "\nac")).tolist() == [False, False], "the prompt's own end of line does not count"
    assert stop(ids("\nab\n", "\nacE")).tolist() == [True, False]
    assert stop(ids("\nab\nabcEN", "\nacEacEND")).tolist() == [True, True]
    assert adapted_lm.stop_at(tokenizer, ["\n"], 1)(torch.tensor([[5, tokenizer.eos_token_id]])).all()


def test_limit_and_shots_reach_lm_eval(folder: Path) -> None:
    result = evaluate(
        tiny(), byte_tokenizer(), None, suite("majority", limit=3), folder, merging=False, seed=0
    )[0]
    shown, by_task = (
        evaluate(
            tiny(), byte_tokenizer(), None, suite("majority", limit=3, **shots), folder, merging=False, seed=0
        )[0]
        for shots in ({"shots": 2}, {"shots_by_task": {"majority": 2}})
    )
    assert result.n == shown.n == 3
    assert result.task_hash != shown.task_hash == by_task.task_hash


def test_items_are_in_the_order_of_the_data_whoever_answered_first() -> None:
    def sample(number: int, of: str) -> dict:
        hashes = dict.fromkeys(("doc_hash", "prompt_hash", "target_hash"), str(number))
        return {"doc_id": number, "acc": float(number), "filter": of} | hashes

    def found(*order: int) -> list[TaskResult]:
        samples = [sample(number, of) for number in order for of in ("none", "strict")]
        scores = {"acc,none": 1.0, "acc_stderr,none": 0.1, "acc,strict": 1.0, "acc_stderr,strict": "N/A"}
        results = {"results": {"t": scores}, "group_subtasks": {}, "versions": {"t": 1.0}}
        return harness._task_results("t", results | {"samples": {"t": samples}})

    assert found(2, 0, 1) == found(0, 1, 2)
    assert [(r.metric, r.correct, r.stderr) for r in found(1, 0)] == [
        ("acc", [0.0, 1.0], 0.1),
        ("acc,strict", [0.0, 1.0], None),
    ]


@pytest.mark.parametrize(
    ("task", "metric", "row"),
    [
        ("local_answers", "exact_match", '{{"prompt": "a{}", "answer": "b"}}\n'),
        ("local_choices", "acc", '{{"prompt": "c{}", "choices": ["d", "e"], "label": 0}}\n'),
    ],
)
def test_own_items_are_evaluated(task: str, metric: str, row: str, tmp_path: Path) -> None:
    own = tmp_path / "own"
    own.mkdir()
    for split in ("train", "validation", "test"):
        (own / f"{split}.jsonl").write_text(row.format(split) + row.format(split + "!"))
    data = Data(name="own", families=[], path=str(own), train_items=1, validation_items=1, test_items=1)
    folder = training_data.write(data, tmp_path / "data", seed=0)
    suites.check_suite(suite(task), data)
    results = evaluate(tiny(), byte_tokenizer(), None, suite(task), folder, merging=False, seed=0)
    assert [(r.suite_task, r.metric, r.n) for r in results] == [(task, metric, 2)]


def test_answers_that_the_tokenizer_cannot_write_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for split in ("train", "validation", "test"):
        rows = [{"prompt": f"{split} {answer}", "answer": answer} for answer in ("yes", "yes <eos>")]
        (tmp_path / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data = Data(name="own", families=[], path=str(tmp_path), train_items=1, validation_items=1, test_items=1)
    folder = training_data.write(data, tmp_path / "data", seed=0)
    evaluate(tiny(), byte_tokenizer(), None, suite("local_answers"), folder, merging=False, seed=0)
    assert "1 answers are none that the tokenizer can write" in capsys.readouterr().out


def test_as_much_is_generated_as_the_longest_of_the_users_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "own"
    own.mkdir()
    rows = "".join(json.dumps({"prompt": "{} " + a, "answer": a * 90}) + "\n" for a in "xy")
    for split in ("train", "validation", "test"):
        (own / f"{split}.jsonl").write_text(rows.replace("{}", split))
    data = Data(name="own", families=[], path=str(own), train_items=1, validation_items=1, test_items=1)
    folder, tokenizer, asked = training_data.write(data, tmp_path / "data", seed=0), byte_tokenizer(), []

    def know_all(model, adapter, ids, mask, max_new_tokens, stop):
        asked.append(max_new_tokens)
        texts = [(p[-1] * 90 + "\n").ljust(max_new_tokens, "x") for p in tokenizer.batch_decode(ids)]
        new = [tokenizer(text)["input_ids"][:max_new_tokens] for text in texts]
        return torch.cat([ids, torch.tensor(new)], dim=1)

    monkeypatch.setattr(adapted_lm.decode, "generate", know_all)
    for positions, right, said in ((256, 1.0, ""), (128, 0.0, "2 answers are longer than the 64 tokens")):
        results = evaluate(
            tiny(positions), tokenizer, None, suite("local_answers"), folder, merging=False, seed=0
        )
        assert results[0].correct == [right] * 2
        out = capsys.readouterr().out
        assert said in out and ("answers are longer" in out) is bool(said)
    assert asked == [91, 64], "and the end of a line"


@pytest.mark.parametrize("kind", ["appends its end", "metaspace", "without special tokens"])
def test_any_tokenizer_is_evaluated(kind: str, folder: Path) -> None:
    tokenizer = KINDS[kind]()
    model = tiny(vocabulary=len(tokenizer))
    results = evaluate(model, tokenizer, None, suite("majority", "copy"), folder, merging=False, seed=0)
    assert [r.n for r in results] == [6, 6]


def test_logits_that_are_no_numbers_are_an_error_that_names_the_item(folder: Path) -> None:
    model = tiny()
    model.model.norm.weight.data[3] = float("nan")
    for task, named in (
        ("majority", "task majority, item 0: the log-likelihood of '.' is nan"),
        ("copy", r"after the prompt '<\|> \w+=' logits are not finite"),
    ):
        with pytest.raises(ValueError, match=named):
            evaluate(model, byte_tokenizer(), None, suite(task), folder, merging=False, seed=0)


def test_a_score_that_is_no_number_is_an_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        harness, "_task_results", lambda name, _: [TaskResult(name, "acc", float("nan"), None, 0, [], "", "")]
    )
    with pytest.raises(ValueError, match="task copy: acc is nan over 0 items"):
        evaluate(tiny(), byte_tokenizer(), None, suite("copy", limit=1), folder, merging=False, seed=0)


def test_a_model_without_room_for_the_answer_is_refused(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(ValueError, match="generates up to 16 tokens, and the model has 16 positions"):
        evaluate(tiny(16), byte_tokenizer(), None, suite("copy"), folder, merging=False, seed=0)
    with pytest.raises(ValueError, match="task cloze, item 0: .* has 8 tokens and the model 7 positions"):
        evaluate(tiny(7), byte_tokenizer(), None, suite("cloze"), folder, merging=False, seed=0)
    capsys.readouterr()
    evaluate(tiny(20), byte_tokenizer(), None, suite("cloze", "copy"), folder, merging=False, seed=0)
    # 24 requests of four choices, six of generation
    assert "evaluate: 30 prompts lost their beginning to the model's 20 positions" in capsys.readouterr().out


def test_every_family_has_a_task_of_its_name() -> None:
    assert {*NAMES, *real_tasks.NAMES, *suites.LOCAL_TASKS} == set(suites.own_tasks())
    for path in suites.TASKS.glob("*.yaml"):
        text = path.read_text()
        task = yaml.safe_load(text.replace("!function ", ""))
        assert task["task"] == path.stem
        family = "local" if path.stem in suites.LOCAL_TASKS else path.stem
        assert task["dataset_kwargs"] == {"family": family}


@pytest.mark.parametrize(
    ("tasks", "data", "message"),
    [
        (["coppy"], None, "unknown task 'coppy' in suite.tasks: choose from"),
        (["sort"], DATA, "task 'sort' in suite.tasks has no data: add it to data.families"),
        (["local_choices"], DATA, "set data.path"),
    ],
)
def test_bad_suites_are_refused_before_anything_is_loaded(
    tasks: list[str], data: Data | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        suites.check_suite(suite(*tasks), data)
    assert "\n" not in str(refusal.value)


def test_rows_of_one_kind_are_not_asked_as_the_other(tmp_path: Path) -> None:
    (tmp_path / "test.jsonl").write_text('{"prompt": "p", "choices": ["a", "b"], "label": 0}\n')
    own = Data(name="own", families=[], path=str(tmp_path))
    suites.check_suite(suite("local_choices"), own)
    with pytest.raises(
        ValueError, match="'local_answers' .* does not fit the rows of .*: name local_choices"
    ):
        suites.check_suite(suite("local_answers"), own)


def test_a_task_without_data_is_refused_by_the_harness_too(folder: Path) -> None:
    with pytest.raises(ValueError, match="task 'sort' in suite.tasks has no data in"):
        evaluate(None, None, None, suite("sort"), folder, merging=False, seed=0)


def test_the_papers_suite_names_tasks_that_lm_eval_ships() -> None:
    shipped = yaml.safe_load((Path(__file__).parents[2] / "conf/suite/paper.yaml").read_text())
    suites.check_suite(Suite(**shipped))
    with pytest.raises(ValueError, match="neither ours"):
        suites.check_suite(suite("arc_chalenge", bundled=True))


def test_evaluation_leaves_no_files_and_stays_off_the_network(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import socket

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("a connection was attempted")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.chdir(tmp_path)
    before = sorted(os.listdir(folder))
    evaluate(tiny(), byte_tokenizer(), None, suite("majority"), folder, merging=False, seed=0)
    assert not list(tmp_path.iterdir()) and before == sorted(os.listdir(folder))


@pytest.mark.parametrize(
    ("changes", "offline"),
    [({}, True), ({"bundled": True}, False), ({"bundled": True, "path": "sets"}, True)],
    ids=["ours", "of lm-eval", "of lm-eval, fetched before"],
)
def test_nothing_is_fetched_unless_the_suite_needs_it(
    changes: dict, offline: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_DATASETS_OFFLINE")
    harness._prepare_libraries(suite("copy", **changes))
    assert ("HF_HUB_OFFLINE" in os.environ) is ("HF_DATASETS_OFFLINE" in os.environ) is offline


def test_data_that_cannot_be_fetched_are_one_line(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise ConnectionError("no route\nto the host")

    monkeypatch.setattr("lm_eval.simple_evaluate", refuse)
    with pytest.raises(ValueError, match=r"cannot fetch the data of suite test \(no route\): use suite=fam"):
        evaluate(tiny(), byte_tokenizer(), None, suite("copy"), folder, merging=False, seed=0)


@pytest.mark.parametrize(
    ("got", "prefix", "exact"), [("abcd", 1.0, 1.0), ("abxd", 0.5, 0.0), ("", 0.0, 0.0), ("abcde", 1.0, 0.0)]
)
def test_a_long_answer_is_right_up_to_its_first_error(got: str, prefix: float, exact: float) -> None:
    found = before_the_first_error({"answer": "abcd"}, [got])
    assert found == {"prefix": prefix, "exact_match": exact}


def test_a_recital_is_scored_by_both(tmp_path: Path) -> None:
    data = Data(name="long", families=["recital"], train_items=2, validation_items=2, test_items=2)
    source = training_data.write(data, tmp_path, seed=0)
    results = evaluate(tiny(256), byte_tokenizer(), None, suite("recital"), source, merging=False, seed=0)
    assert [(r.suite_task, r.metric) for r in results] == [("recital", "prefix"), ("recital", "exact_match")]


def sets(folder: Path, *tasks: str) -> str:
    """A folder as prepare.py leaves it, by what its manifest says."""
    folder.mkdir()
    (folder / "manifest.json").write_text(
        json.dumps({"sources": [], "tasks": dict.fromkeys(tasks, "OWNER/NAME")})
    )
    return str(folder)


def test_a_task_without_a_prepared_data_set_is_refused(tmp_path: Path) -> None:
    there = sets(tmp_path / "sets", "hellaswag", "winogrande")
    suites.check_sets(suite("hellaswag", "local_choices", bundled=True, path=there))
    with pytest.raises(
        ValueError, match=r"'mmlu' in suite.tasks has no data in .*\['hellaswag', 'winogrande'\]"
    ):
        suites.check_sets(suite("mmlu", bundled=True, path=there))
    for folder in (tmp_path, tmp_path / "absent"):
        with pytest.raises(ValueError, match=r"is not what scripts/prepare.py evaluation leaves"):
            suites.check_sets(suite("hellaswag", bundled=True, path=str(folder)))


def test_parts_of_groups_are_known_by_name() -> None:
    assert {"mmlu", "mmlu_anatomy", "arc_challenge"} <= suites.bundled_names()
