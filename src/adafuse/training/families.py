"""The task families that adapters learn: what one item is, and which split it belongs to.

In: a family's name, a split, a count and a seed. Out: the same items each time, of the same form for train, validation
and test, but never the same content. Real text comes from standard_library.py. Next: data.py, which writes the items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from random import Random
from typing import Any

from adafuse.training import standard_library
from adafuse.training.splits import SPLITS, split_of

# A stubborn generator has run out of new items when this many draws in a row bring none.
PATIENCE = 20_000

# copy, reverse and sort: three orders of the same three symbols. All their prompts have the same token ids
# in the same numbers, so that a router that sees only the current token's id cannot tell them apart.
OPERATION = {"copy": "<|>", "reverse": "|><", "sort": "><|"}
COMPARISON = {"larger": "><", "smaller": "<>"}
CROWDS = ((4, 3, 2), (5, 4, 2), (5, 4, 3))
LETTERS = "abcdefgh"


@dataclass(frozen=True)
class Item:
    """One exercise. With `choices` it is scored by log-likelihood, else the answer is generated."""

    prompt: str
    answer: str
    choices: list[str] | None = None
    label: int | None = None


@dataclass(frozen=True)
class Family:
    """`draw` finds content, `key` is the part that decides its split, `item` shows it as an exercise.

    `lesson` shows the same content in another form, for pre-training: the skill without the exercise.
    """

    draw: Callable[[Random], Any]
    key: Callable[[Any], str]
    item: Callable[[Any, Random], Item]
    lesson: Callable[[Any, Random], str]


def generate(name: str, split: str, count: int, seed: int) -> list[Item]:
    """`count` items with different prompts. Raises ValueError for an unknown family or one that runs out."""
    if name not in NAMES:
        raise ValueError(f"unknown family '{name}' in data.families: choose from {list(NAMES)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}': choose from {list(SPLITS)}")
    rng = Random(f"{name}/{split}/{seed}")
    candidates = _cloze(split, rng) if name == "cloze" else _exercises(FAMILIES[name], split, rng)
    items: dict[str, Item] = {}
    idle = 0
    while len(items) < count and idle < PATIENCE:
        item = next(candidates, None)
        if item is None:
            break
        idle = idle + 1 if item.prompt in items else 0
        items.setdefault(item.prompt, item)
    if len(items) < count:
        raise ValueError(
            f"family {name} has only {len(items)} {split} items: lower data.{split}_items={count}"
        )
    return list(items.values())


def lessons(seed: int) -> Iterator[str]:
    """Endless lines for pre-training, from training content only, each family equally often."""
    rng = Random(f"lessons/{seed}")
    while True:
        for family in FAMILIES.values():
            yield family.lesson(_content(family, "train", rng), rng)


def _exercises(family: Family, split: str, rng: Random) -> Iterator[Item]:
    while True:
        yield family.item(_content(family, split, rng), rng)


def _content(family: Family, split: str, rng: Random) -> Any:
    while True:
        content = family.draw(rng)
        if split_of(family.key(content)) == split:
            return content


def _cloze(split: str, rng: Random) -> Iterator[Item]:
    """How does this text go on? The true way among those of other places in the files of the same split."""
    passages = standard_library.passages(split)
    for passage in rng.sample(passages, len(passages)):
        others = {p.following for p in rng.sample(passages, 6)} - {passage.following}
        if len(others) >= 3:
            yield _choice(passage.before, passage.following, sorted(others), rng)


def _choice(prompt: str, answer: str, wrong: list[str], rng: Random) -> Item:
    choices = [answer, *rng.sample(wrong, min(3, len(wrong)))]
    rng.shuffle(choices)
    return Item(prompt, answer, choices, choices.index(answer))


# --- copy, reverse, sort ---


def _letters(rng: Random) -> str:
    return "".join(rng.sample(LETTERS, rng.randint(4, 6)))


def _rewriting(name: str, change: Callable[[str], str], words: str) -> Family:
    return Family(
        draw=_letters,
        key=lambda letters: f"letters {letters}",
        item=lambda letters, rng: Item(f"{OPERATION[name]} {letters}=", change(letters)),
        lesson=lambda letters, rng: f"{letters} {words}: {change(letters)}\n",
    )


# --- addition of two digits by turns, without carry ---


def _terms(rng: Random) -> tuple[str, str]:
    steps = rng.choice("1234") + rng.choice("1234")
    return "".join(rng.choices("12345", k=6)), steps * 3


def _sum(terms: tuple[str, str]) -> str:
    return "".join(str(int(a) + int(b)) for a, b in zip(*terms, strict=True))


def _sum_item(terms: tuple[str, str], rng: Random) -> Item:
    """Two places, each right or with another digit added: whoever knows neither is right one time in four."""
    total, wrong = _sum(terms), []
    first, second = sorted(rng.sample(range(len(total)), 2))
    slips = {place: _slip(terms, place, rng) for place in (first, second)}
    for places in ((first,), (second,), (first, second)):
        wrong.append("".join(slips[i] if i in places else digit for i, digit in enumerate(total)))
    return _choice(f"{terms[0]}+{terms[1]}=", total, wrong, rng)


def _slip(terms: tuple[str, str], place: int, rng: Random) -> str:
    digit, step = (int(term[place]) for term in terms)
    return str(digit + rng.choice([other for other in range(1, 5) if other != step]))


# --- comparison of two numbers that have the same digits ---


def _two_numbers(rng: Random) -> tuple[str, str]:
    digits = rng.sample("123456789", 4)
    first = "".join(digits)
    while (second := "".join(rng.sample(digits, 4))) == first:
        pass
    return first, second


def _wanted(pair: tuple[str, str], which: str) -> str:
    return max(pair) if which == "larger" else min(pair)


def _comparison_item(pair: tuple[str, str], rng: Random) -> Item:
    which = rng.choice(sorted(COMPARISON))
    answer = _wanted(pair, which)
    return Item(f"{COMPARISON[which]} {pair[0]} {pair[1]}=", answer, list(pair), pair.index(answer))


def _comparison_lesson(pair: tuple[str, str], rng: Random) -> str:
    which = rng.choice(sorted(COMPARISON))
    return f"{which} of {pair[0]} and {pair[1]}: {_wanted(pair, which)}\n"


# --- the most frequent letter ---


def _crowd(rng: Random) -> tuple[str, list[str]]:
    """Nine to twelve letters of three kinds, and the kinds, the most frequent one first."""
    kinds = rng.sample(LETTERS, 3)
    letters = list("".join(kind * times for kind, times in zip(kinds, rng.choice(CROWDS), strict=True)))
    rng.shuffle(letters)
    return "".join(letters), kinds


def _majority_item(crowd: tuple[str, list[str]], rng: Random) -> Item:
    letters, kinds = crowd
    return _choice(f"{letters}*", kinds[0], kinds[1:], rng)


FAMILIES = {
    "copy": _rewriting("copy", lambda letters: letters, "again"),
    "reverse": _rewriting("reverse", lambda letters: letters[::-1], "backwards"),
    "sort": _rewriting("sort", lambda letters: "".join(sorted(letters)), "in order"),
    "addition": Family(
        draw=_terms,
        key=lambda terms: f"sum {terms[0]}",
        item=_sum_item,
        lesson=lambda terms, rng: f"{terms[0]} and {terms[1][:2]} make {_sum(terms)}\n",
    ),
    "comparison": Family(
        draw=_two_numbers,
        key=lambda pair: "digits " + "".join(sorted(pair[0])),
        item=_comparison_item,
        lesson=_comparison_lesson,
    ),
    "majority": Family(
        draw=_crowd,
        key=lambda crowd: f"crowd {crowd[0]}",
        item=_majority_item,
        lesson=lambda crowd, rng: f"{crowd[0]} mostly {crowd[1][0]}\n",
    ),
}
# cloze is its own lesson: the pre-training text is the same kind of text, from other files
NAMES = (*FAMILIES, "cloze")
