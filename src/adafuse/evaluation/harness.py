"""Accuracy: lm-eval's tasks through the model under test, with the result of every single item kept.

In: a backbone with an adapter installed (or none), a `Suite` and a data folder. Out: one `TaskResult` per task and
metric. Next: tasks/ (what is asked), adapted_lm.py (how lm-eval calls the model), records.py (where results go).
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adafuse.config import Suite
from adafuse.data.items import LOCAL, load_items
from adafuse.data.tokens import END, cut_answers, unwritten
from adafuse.distributed import join
from adafuse.evaluation.suites import LOCAL_TASKS, TASKS, check_sets, check_suite, own_tasks, prepared_sets

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager
    from torch import nn
    from transformers import PreTrainedTokenizerBase

    from adafuse.adapters.adapter import Adapter
    from adafuse.evaluation.adapted_lm import AdaptedLM

# Standard errors of means have a closed form; only bundled metrics without one need resampling.
BOOTSTRAPS = 1000
# what is generated at least where the user's own answers are asked for (tasks/local_answers.yaml)
LOCAL_ANSWERS, LOCAL_TOKENS = LOCAL_TASKS[0], 64


@dataclass(frozen=True)
class TaskResult:
    """One metric of one task. `correct` is per item, in the order of the data; `task_hash` covers items and prompts."""

    suite_task: str
    metric: str
    value: float
    stderr: float | None
    n: int
    correct: list[float]
    task_hash: str
    version: str


def evaluate(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    adapter: Adapter | None,
    suite: Suite,
    data_folder: Path,
    merging: bool,
    seed: int,
    own: str | None = None,
) -> list[TaskResult]:
    """Run `suite` on the test items in `data_folder`; `merging` decodes one sequence at a time, `own` is the folder of
    local items.

    Raises ValueError, one line, for an unknown task, one without data, and a number that is not finite.
    """
    check_suite(suite)
    check_sets(suite)
    _check_data(suite, data_folder)
    _prepare_libraries(suite)
    # heavy, and it reads its environment when it is imported
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from adafuse.evaluation.adapted_lm import AdaptedLM

    manager = TaskManager(
        include_path=str(TASKS), include_defaults=suite.bundled, metadata={"data_folder": str(data_folder)}
    )
    lm = AdaptedLM(model, tokenizer, adapter, suite.batch, merging, own)
    lm.take_share(join(lm.device.type))
    try:
        results = simple_evaluate(
            model=lm,
            tasks=_tasks(suite, manager, _own_settings(suite, data_folder, lm)),
            task_manager=manager,
            num_fewshot=None if suite.shots_by_task else suite.shots,
            limit=suite.limit,
            bootstrap_iters=BOOTSTRAPS,
            log_samples=True,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
        )
    except ConnectionError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(
            f"cannot fetch the data of suite {suite.name} ({reason}): use suite=families"
        ) from None
    lm.say_shortened()
    if results is None:
        # the main process has all of them
        return []
    found = [result for name in suite.tasks for result in _task_results(name, results)]
    for result in found:
        if not math.isfinite(result.value):
            raise ValueError(
                f"task {result.suite_task}: {result.metric} is {result.value} over {result.n} items"
            )
    return found


def _own_settings(suite: Suite, data_folder: Path, lm: AdaptedLM) -> dict[str, dict[str, Any]]:
    """What a task's YAML file cannot know: how long the user's answers are."""
    if LOCAL_ANSWERS not in suite.tasks:
        return {}
    items = load_items(data_folder, LOCAL, "test")
    answers = cut_answers(items, lm.tokenizer)
    longest = max((len(cut.ids) - cut.first for cut in answers.values()), default=0)
    tokens = max(LOCAL_TOKENS, min(longest, lm.max_length // 2))
    beyond = sum(len(cut.ids) - cut.first > tokens for cut in answers.values())
    if beyond:
        print(
            f"evaluate: {beyond} answers are longer than the {tokens} tokens that are generated, and count as wrong"
        )
    if strange := unwritten(items, answers, lm.tokenizer):
        print(f"evaluate: {strange} answers are none that the tokenizer can write, and count as wrong")
    return {
        LOCAL_ANSWERS: {"generation_kwargs": {"until": [END], "max_gen_toks": tokens, "do_sample": False}}
    }


def _tasks(suite: Suite, manager: TaskManager, settings: dict[str, dict[str, Any]]) -> list[Any]:
    """lm-eval's tasks and groups as it defines them, with `settings` and the suite's data folders and shots."""
    if suite.path is None and not suite.shots_by_task and not settings:
        return list(suite.tasks)
    sets = prepared_sets(suite.path) if suite.path is not None else {}
    built = []
    for name in suite.tasks:
        own = settings.get(name, {}) | ({"dataset_path": str(sets[name])} if name in sets else {})
        if suite.shots_by_task:
            own["num_fewshot"] = suite.shots_by_task.get(name, suite.shots)
        # manager.load takes a task's settings only without what its file says, and a group's not at all
        built.append(
            manager._factory.build(manager.task_index[name], overrides=own, registry=manager.task_index)
        )
    return built


def _check_data(suite: Suite, data_folder: Path) -> None:
    for name in set(suite.tasks) & set(own_tasks()):
        family = LOCAL if name in LOCAL_TASKS else name
        if not (data_folder / f"{family}.test.jsonl").is_file():
            raise ValueError(
                f"task '{name}' in suite.tasks has no data in {data_folder}: add it to data.families"
            )


def _prepare_libraries(suite: Suite) -> None:
    """Before lm-eval is imported: no network unless its own tasks need one, and no pages of advice."""
    if not suite.bundled or suite.path is not None:
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        os.environ.setdefault("HF_HUB_OFFLINE", "1")
    # MMLU alone has a bar for each of 171 files
    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
    # it warns about every ready-made model and every custom data set; both are what we want
    logging.getLogger("lm_eval").setLevel(logging.ERROR)


def _task_results(name: str, results: Mapping[str, Any]) -> list[TaskResult]:
    """One result per metric of a task, or of a group over all items of its tasks, or those of a plain collection."""
    scores = results["results"].get(name, {})
    metrics = [key for key in scores if "," in key and "_stderr," not in key]
    # the first one stands in tables: where choices differ in length it is the one that others print
    metrics.sort(key=lambda key: not key.startswith("acc_norm,"))
    children = results["group_subtasks"].get(name, [])
    if not metrics:
        return [result for child in children for result in _task_results(child, results)]
    return [_task_result(name, key, scores, results) for key in metrics]


def _task_result(name: str, key: str, scores: Mapping[str, Any], results: Mapping[str, Any]) -> TaskResult:
    metric, _, wanted_filter = key.partition(",")
    leaves = _leaves(name, results)
    samples = [sample for leaf in leaves for sample in _samples(leaf, wanted_filter, results)]
    stderr = scores.get(f"{metric}_stderr,{wanted_filter}")
    return TaskResult(
        suite_task=name,
        metric=metric if wanted_filter == "none" else key,
        value=float(scores[key]),
        stderr=float(stderr) if isinstance(stderr, int | float) else None,
        n=len(samples),
        correct=[float(s[metric]) for s in samples if isinstance(s.get(metric), int | float)],
        task_hash=_task_hash(samples),
        version=str(results["versions"].get(leaves[0])),
    )


def _leaves(name: str, results: Mapping[str, Any]) -> list[str]:
    children = results["group_subtasks"].get(name)
    return [leaf for child in children for leaf in _leaves(child, results)] if children else [name]


def _samples(task: str, wanted_filter: str, results: Mapping[str, Any]) -> list[dict[str, Any]]:
    samples = [s for s in results["samples"][task] if s["filter"] == wanted_filter]
    return sorted(samples, key=itemgetter("doc_id"))


def _task_hash(samples: list[dict[str, Any]]) -> str:
    """Equal if documents, prompts and targets are: only then may two results be compared item by item."""
    from lm_eval.utils import hash_string  # heavy

    return hash_string("".join(s["doc_hash"] + s["prompt_hash"] + s["target_hash"] for s in samples))
