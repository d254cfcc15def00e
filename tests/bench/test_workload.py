"""What arms read while they are timed: seeded ids, or the text of test items where their routers are trained."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from adafuse import cell
from adafuse.bench.workload import prompter, prompts
from adafuse.config import Task
from adafuse.model.backbone import byte_tokenizer
from synthetic.checkpoints import save, tiny_model
from synthetic.configurations import compose

DATA = ["data.families=[copy,majority]", "data.train_items=4", "data.validation_items=2", "data.test_items=5"]


def test_trained_routers_read_the_text_of_test_items(tmp_path: Path) -> None:
    folder = save(tiny_model(), tmp_path / "checkpoint")
    cell_of = [
        "task=latency",
        f"model.path={folder}",
        f"runs_dir={tmp_path}",
        "batch=2",
        "context=200",
        *DATA,
    ]
    config = compose(*cell_of, "latency.trained_adapters=true")
    ask = prompter(config, tiny_model(), "cpu")
    rows = torch.cat([ask(0), ask(1)])
    assert rows.shape == (4, 200) and torch.equal(ask(0), prompts(config, tiny_model(), "cpu"))
    texts = byte_tokenizer().batch_decode(rows)
    items = [line for file in tmp_path.glob("data/*/*.test.jsonl") for line in file.read_text().splitlines()]
    assert len(items) == 10 and len(set(texts)) == 4, "a stretch of its own for each row and query"
    for text in texts:
        whole = text.split("\n")[1:]
        assert len(whole) > 2
        assert not byte_tokenizer().decode(rows[0]).endswith("\n"), "the last waits for its answer"
    other = prompts(dataclasses.replace(config, seed=1), tiny_model(), "cpu")
    assert not torch.equal(other, rows[:2])


def test_random_factors_read_seeded_ids(tmp_path: Path) -> None:
    config = compose("task=latency", "latency.trained_adapters=false", f"runs_dir={tmp_path}", "context=32")
    ids = prompts(config, tiny_model(), "cpu")
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(ids, torch.randint(4, 260, (1, 32), generator=generator)), (
        "as published ones were timed"
    )
    assert not (tmp_path / "data").exists()


def test_what_is_read_is_part_of_the_cell_where_routers_are_trained() -> None:
    def known(*overrides: str) -> dict[str, str]:
        config = compose("model.weights=random", "arms.run=[base]", *DATA, *overrides)
        tasks = (Task.latency, Task.trace, Task.drift)
        return {task.name: cell.cell_hash(dataclasses.replace(config, task=task)) for task in tasks}

    more = "data.test_items=6"
    for trained, same in (("true", False), ("false", True)):
        job = f"latency.trained_adapters={trained}"
        one, two = known(job), known(job, more)
        assert [one[task] == two[task] for task in one] == [same] * 3


def written(folder: Path, *texts: str) -> Path:
    file = folder / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    return file


def test_a_file_of_prompts_is_read_one_by_one(tmp_path: Path) -> None:
    file = written(tmp_path, "first" * 9, "second", "third")
    folder = save(tiny_model(), tmp_path / "checkpoint")
    config = compose(
        "task=latency", f"model.path={folder}", "context=20", "batch=2", f"latency.prompts={file}"
    )
    ask = prompter(config, tiny_model(), "cpu")
    read = [byte_tokenizer().batch_decode(ask(query)) for query in range(3)]
    # a long one is cut at its beginning, a short one has the ones before it in front
    assert all(len(text) == 20 for texts in read for text in texts)
    assert [text.rsplit("\n")[-1][-5:] for texts in read for text in texts] == [
        "first",
        "econd",
        "third",
        "first",
        "econd",
        "third",
    ]
    assert read[0][1].endswith("first\nsecond") and read[1][0].endswith("second\nthird")


def test_what_a_file_of_prompts_holds_is_part_of_the_cell(tmp_path: Path) -> None:
    def known(*overrides: str) -> str:
        return cell.cell_hash(compose("task=latency", "model.weights=random", "arms.run=[base]", *overrides))

    (tmp_path / "b").mkdir()
    one, same = written(tmp_path, "one"), written(tmp_path / "b", "one")
    asked = known(f"latency.prompts={one}")
    assert asked == known(f"latency.prompts={same}") != known()
    written(tmp_path / "b", "two")
    assert asked != known(f"latency.prompts={same}")


@pytest.mark.parametrize(
    ("line", "why"), [(None, "prepare.py sharegpt"), ("", "is empty"), ('{"text": "x"}', "line 1, prompt")]
)
def test_a_wrong_file_of_prompts_is_named(tmp_path: Path, line: str | None, why: str) -> None:
    file = tmp_path / "prompts.jsonl"
    if line is not None:
        file.write_text(line)
    with pytest.raises(ValueError, match=why) as caught:
        cell.cell_hash(compose("task=latency", "model.weights=random", f"latency.prompts={file}"))
    assert str(file) in str(caught.value) and "\n" not in str(caught.value)
