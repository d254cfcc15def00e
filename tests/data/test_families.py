"""The generated families: the same each time, no content in two splits, and the properties that they exist for."""

from __future__ import annotations

import itertools
from collections import Counter
from functools import cache
from itertools import islice

import pytest

from adafuse.data import families, standard_library
from adafuse.data.families import FAMILIES, LEVELS, NAMES, OPERATION, Item, generate, lessons
from adafuse.data.splits import SPLITS, split_of

NUMBER_OF_CHOICES = {"addition": 4, "comparison": 2, "majority": 3, "cloze": 4}
REWRITTEN = {"copy": lambda s: s, "reverse": lambda s: s[::-1], "sort": lambda s: "".join(sorted(s))}


@pytest.fixture(scope="module")
def items() -> dict[tuple[str, str], list[Item]]:
    counts = {"train": 600, "validation": 60, "test": 60}
    return {(name, split): generate(name, split, counts[split], seed=0) for name in NAMES for split in SPLITS}


@pytest.mark.parametrize("name", NAMES)
def test_the_same_seed_gives_the_same_items_and_another_seed_others(name: str) -> None:
    assert generate(name, "test", 20, seed=3) == generate(name, "test", 20, seed=3)
    assert generate(name, "test", 20, seed=3) != generate(name, "test", 20, seed=4)


@pytest.mark.parametrize("name", NAMES)
def test_no_prompt_is_in_two_splits_or_twice_in_one(name: str, items: dict) -> None:
    prompts = [item.prompt for split in SPLITS for item in items[name, split]]
    assert len(set(prompts)) == len(prompts)


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_short_printable_and_end_without_blank(name: str, items: dict) -> None:
    for split in SPLITS:
        for item in items[name, split]:
            whole = item.prompt + item.answer
            assert whole.isascii() and len(whole) <= 90
            # lm-eval would move blanks from the prompt to the answer; generation stops at the end of the line
            assert item.prompt == item.prompt.rstrip() and item.prompt
            assert item.choices or "\n" not in item.answer


def test_content_is_disjoint_across_the_families_that_share_it() -> None:
    letters = {s: {i.prompt[4:-1] for n in REWRITTEN for i in generate(n, s, 300, seed=1)} for s in SPLITS}
    assert not letters["train"] & letters["test"]
    digits = {s: {"".join(sorted(i.answer)) for i in generate("comparison", s, 300, seed=1)} for s in SPLITS}
    assert not digits["train"] & digits["test"] and not digits["validation"] & digits["test"]
    sums = {s: {i.prompt.split("+")[0] for i in generate("addition", s, 300, seed=1)} for s in SPLITS}
    assert not sums["train"] & sums["test"]


@pytest.mark.parametrize("level", LEVELS)
def test_copy_reverse_and_sort_have_the_same_tokens_and_different_answers(level: int) -> None:
    """What same_tokens exists for: the same words, told apart by the order of three symbols alone."""
    for item in generate("copy", "test", 50, 0, level):
        word = item.prompt[4:-1]
        shown = {name: FAMILIES[name].item(word, None) for name in REWRITTEN}
        assert shown["copy"] == item
        assert len({one.prompt for one in shown.values()}) == 3
        assert len({"".join(sorted(one.prompt)) for one in shown.values()}) == 1
        assert {one.prompt[3:] for one in shown.values()} == {f" {word}="}
        assert {name: one.answer for name, one in shown.items()} == {k: f(word) for k, f in REWRITTEN.items()}
    assert len({frozenset(code) for code in OPERATION.values()}) == 1


@cache
def library() -> str:
    """All text, of all splits, with one kind of line end."""
    return "\n".join(line for split in SPLITS for line in standard_library.text(split).splitlines())


def is_right(name: str, prompt: str, answer: str, level: int) -> bool:
    """Whether an answer is right, from the text of the exercise alone."""
    asked = prompt[:-1]
    if name in REWRITTEN:
        code, word = asked.split()
        return answer == REWRITTEN[{"<|>": "copy", "|><": "reverse", "><|": "sort"}[code]](word)
    if name == "addition":
        first, second = asked.split("+")
        return int(answer) == int(first) + int(second)
    if name == "comparison":
        code, *numbers = asked.split()
        others = [int(number) for number in numbers]
        others.remove(int(answer))
        return (int(answer) > others[0]) == (code == "><") and int(answer) != others[0]
    if name == "majority":
        return all(asked.count(answer) > asked.count(other) for other in set(asked) - {answer})
    if name == "recital":
        word = asked.removeprefix("@ ")
        turns = [word[k:] + word[:k] for k in range(5)]
        return answer.split(" ") == [turns[k % 5] for k in range(12 * level)]
    return prompt + answer in library()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", LEVELS)
def test_the_keyed_answer_is_the_only_right_one(name: str, level: int) -> None:
    for split, seed in (("train", 0), ("test", 1)):
        for item in generate(name, split, 20 if name == "cloze" else 300, seed, level):
            right = [choice for choice in item.choices or [] if is_right(name, item.prompt, choice, level)]
            assert right == ([item.answer] if item.choices else []), item
            assert item.choices or is_right(name, item.prompt, item.answer, level), item


@pytest.mark.parametrize("level", LEVELS)
def test_two_numbers_have_the_same_digits_and_the_first_decides_less_often_on_higher_levels(
    level: int,
) -> None:
    pairs = [item.prompt[3:-1].split() for item in generate("comparison", "train", 900, 0, level)]
    assert all(sorted(one) == sorted(two) and len(one) == 2 + 2 * level for one, two in pairs)
    by_first = sum(one[0] != two[0] for one, two in pairs) / len(pairs)
    assert abs(by_first - {1: 0.79, 2: 0.42, 3: 0.28}[level]) < 0.05


def test_a_recital_turns_its_word_by_one_letter_a_round(items: dict) -> None:
    for item in items["recital", "test"]:
        word, rounds = item.prompt[2:-1], item.answer.split()
        assert len(rounds) == 12 and rounds[0] == word == rounds[5]
        assert all(after == before[1:] + before[0] for before, after in itertools.pairwise(rounds))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("level", LEVELS)
def test_every_level_has_enough_items_that_fit_and_are_harder(name: str, level: int) -> None:
    found = {
        split: generate(name, split, count, 0, level) for split, count in (("train", 500), ("test", 300))
    }
    assert not {i.prompt for i in found["train"]} & {i.prompt for i in found["test"]}
    assert max(len(i.prompt + i.answer) for i in found["train"]) < 240
    easier = max(len(i.prompt + i.answer) for i in generate(name, "test", 100, 0, 1))
    if name != "cloze":
        assert level == 1 or min(len(i.prompt + i.answer) for i in found["test"]) > easier


@pytest.mark.parametrize("name", ["addition", "comparison", "majority", "cloze"])
@pytest.mark.parametrize("level", LEVELS)
def test_choices_hold_the_answer_once_in_no_preferred_place(name: str, level: int) -> None:
    sample = generate(name, "train", 900, 0, level)
    number = 4 if name == "majority" and level > 1 else NUMBER_OF_CHOICES[name]
    for item in sample:
        assert item.choices[item.label] == item.answer
        assert len(set(item.choices)) == len(item.choices) == number
        # none is likelier by being shorter
        assert len({len(choice) for choice in item.choices}) == 1
    places = Counter(item.label for item in sample)
    assert len(places) == number and max(places.values()) / len(sample) < 1.2 / number
    if name != "cloze":
        # nor by what it looks like: in the order of choices the right one stands anywhere (in addition a little more
        # often first or last, as both places may have one step)
        ranks = Counter(sorted(item.choices).index(item.answer) for item in sample)
        assert max(ranks.values()) / len(sample) < (1.4 if name == "addition" else 1.25) / number


def test_cloze_is_real_text_of_its_own_split(items: dict) -> None:
    for split in SPLITS:
        text = "\n".join(standard_library.text(split).splitlines())
        for item in items["cloze", split][:50]:
            assert item.prompt + item.answer in text
            assert all(choice in text for choice in item.choices)
    pretraining = "\n".join(standard_library.text("train").splitlines())
    assert not any(item.prompt + item.answer in pretraining for item in items["cloze", "test"])


def test_lessons_use_training_content_in_another_form() -> None:
    spoken = list(islice(lessons("train", seed=0), 700))
    exercises = {item.prompt for name in FAMILIES for item in generate(name, "train", 50, 0)}
    assert not any(prompt in line for prompt in exercises for line in spoken)
    copied = [line.split()[0] for line in spoken if " again: " in line]
    assert len(copied) == 100
    assert {split_of(f"letters {letters}") for letters in copied} == {"train"}


def test_splits_have_their_shares() -> None:
    counts = Counter(split_of(str(i)) for i in range(20_000))
    assert {s: round(counts[s] / 20_000, 2) for s in SPLITS} == {
        "train": 0.70,
        "validation": 0.15,
        "test": 0.15,
    }


@pytest.mark.parametrize(
    ("name", "split", "count", "message"),
    [
        ("coyp", "test", 1, "unknown family 'coyp' in data.families"),
        ("copy", "tset", 1, "unknown split 'tset'"),
        ("addition", "test", 10**5, "lower data.test_items=100000"),
        ("cloze", "test", 10**6, "lower data.test_items=1000000"),
    ],
)
def test_impossible_requests_are_refused_in_one_line(
    name: str, split: str, count: int, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # ten draws in a row that bring nothing new: most of the items are there
    monkeypatch.setattr(families, "PATIENCE", 10)
    with pytest.raises(ValueError, match=message) as refusal:
        generate(name, split, count, seed=0)
    assert "\n" not in str(refusal.value)
