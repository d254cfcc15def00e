"""The task families that adapters learn: what one item is, and which split it belongs to.

In: a family's name, a split, a count and a seed. Out: the same items each time, of the same form for train, validation
and test, but never the same content. Real text comes from standard_library.py. Next: items.py, which writes the items.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from random import Random
from typing import Any

from adafuse.data import standard_library
from adafuse.data.splits import SPLITS, split_of

# A stubborn generator has run out of new items when this many draws in a row bring none.
PATIENCE = 20_000

# copy, reverse and sort: three orders of the same three symbols. All their prompts have the same token ids
# in the same numbers, so that a router that sees only the current token's id cannot tell them apart.
OPERATION = {"copy": "<|>", "reverse": "|><", "sort": "><|"}
COMPARISON = {"larger": "><", "smaller": "<>"}
# by level: how many letters there are, and how many a word has; how often each kind is in a crowd; rounds of a recital
ALPHABET = "abcdefghijklmnop"
WORDS = {1: (8, 4, 6), 2: (12, 7, 9), 3: (16, 10, 12)}
CROWDS = {
    1: ((4, 3, 2), (5, 4, 2), (5, 4, 3)),
    2: ((6, 5, 4, 3), (7, 6, 5, 2), (7, 6, 4, 4)),
    3: ((8, 7, 6, 5), (9, 8, 7, 4), (9, 8, 6, 6)),
}
ROUNDS = {1: 12, 2: 24, 3: 36}
LEVELS = tuple(WORDS)
# The families that had wrong answers for a time, and on which levels: whatever was made from those is withdrawn.
MENDED = {"comparison": (2, 3)}


@dataclass(frozen=True)
class Item:
    """One exercise. With `choices` it is scored by log-likelihood, else the answer is generated."""

    prompt: str
    answer: str
    choices: list[str] | None = None
    label: int | None = None


@dataclass(frozen=True)
class Family:
    """`draw` finds content of a level, `key` is the part that decides its split, `item` shows it as an exercise.

    `lesson` shows the same content in another form, for pre-training: the skill without the exercise.
    """

    draw: Callable[[Random, int], Any]
    key: Callable[[Any], str]
    item: Callable[[Any, Random], Item]
    lesson: Callable[[Any, Random], str]


def generate(name: str, split: str, count: int, seed: int, level: int = 1) -> list[Item]:
    """`count` items with different prompts. Raises ValueError for an unknown family or level, or one that runs out."""
    if name not in NAMES:
        raise ValueError(f"unknown family '{name}' in data.families: choose from {list(NAMES)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split '{split}': choose from {list(SPLITS)}")
    if level not in LEVELS:
        raise ValueError(f"data.level={level} is not there: choose from {list(LEVELS)}")
    rng = Random(f"{name}/{split}/{seed}")
    candidates = _cloze(split, rng) if name == "cloze" else _exercises(FAMILIES[name], split, rng, level)
    return collect(candidates, name, split, count)


def collect(candidates: Iterator[Item], name: str, split: str, count: int) -> list[Item]:
    """The first `count` items with different prompts. Raises ValueError if there are not so many."""
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


def before_mended(name: str, split: str, count: int, seed: int, level: int) -> list[Item]:
    """What `generate` gave while the family was wrong: it still names text, and is never learned from."""
    family = replace(FAMILIES[name], draw=_two_lengths)
    return collect(_exercises(family, split, Random(f"{name}/{split}/{seed}"), level), name, split, count)


def lessons(split: str, seed: int) -> Iterator[str]:
    """Endless lines for pre-training, from the content of a split, each family equally often, on the first level."""
    rng = Random(f"lessons/{split}/{seed}")
    while True:
        for family in FAMILIES.values():
            yield family.lesson(_content(family, split, rng, LEVELS[0]), rng)


def _exercises(family: Family, split: str, rng: Random, level: int) -> Iterator[Item]:
    while True:
        yield family.item(_content(family, split, rng, level), rng)


def _content(family: Family, split: str, rng: Random, level: int) -> Any:
    while True:
        content = family.draw(rng, level)
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


def _letters(rng: Random, level: int) -> str:
    letters, shortest, longest = WORDS[level]
    return "".join(rng.sample(ALPHABET[:letters], rng.randint(shortest, longest)))


def _rewriting(name: str, change: Callable[[str], str], words: str) -> Family:
    return Family(
        draw=_letters,
        key=lambda letters: f"letters {letters}",
        item=lambda letters, rng: Item(f"{OPERATION[name]} {letters}=", change(letters)),
        lesson=lambda letters, rng: f"{letters} {words}: {change(letters)}\n",
    )


# --- addition of two digits by turns, without carry ---


def _terms(rng: Random, level: int) -> tuple[str, str]:
    steps = rng.choice("1234") + rng.choice("1234")
    return "".join(rng.choices("12345", k=6 * level)), steps * (3 * level)


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


def _two_numbers(rng: Random, level: int) -> tuple[str, str]:
    """The higher the level, the more digits they may begin with alike: else the first would decide nearly always."""
    first = "".join(rng.sample("123456789" * level, 2 + 2 * level))
    # a draw more would change the items of level 1
    alike = rng.randrange(level) if level > 1 else 0
    while (second := first[:alike] + "".join(rng.sample(first[alike:], len(first) - alike))) == first:
        pass
    return first, second


def _two_lengths(rng: Random, level: int) -> tuple[str, str]:
    """Levels 2 and 3 as they were: the second number is shorter, and the order of strings that of a dictionary."""
    digits = rng.sample("123456789" * level, 2 + 2 * level)
    first = "".join(digits)
    while (second := "".join(rng.sample(digits, 4))) == first:
        pass
    return first, second


def _wanted(pair: tuple[str, str], which: str) -> str:
    # of equal length, so that strings are in the order of the numbers
    return max(pair) if which == "larger" else min(pair)


def _comparison_item(pair: tuple[str, str], rng: Random) -> Item:
    which = rng.choice(sorted(COMPARISON))
    answer = _wanted(pair, which)
    return Item(f"{COMPARISON[which]} {pair[0]} {pair[1]}=", answer, list(pair), pair.index(answer))


def _comparison_lesson(pair: tuple[str, str], rng: Random) -> str:
    which = rng.choice(sorted(COMPARISON))
    return f"{which} of {pair[0]} and {pair[1]}: {_wanted(pair, which)}\n"


# --- the most frequent letter ---


def _crowd(rng: Random, level: int) -> tuple[str, list[str]]:
    """Letters of three or four kinds, and the kinds, the most frequent one first."""
    times = rng.choice(CROWDS[level])
    kinds = rng.sample(ALPHABET[:8], len(times))
    letters = list("".join(kind * often for kind, often in zip(kinds, times, strict=True)))
    rng.shuffle(letters)
    return "".join(letters), kinds


def _majority_item(crowd: tuple[str, list[str]], rng: Random) -> Item:
    letters, kinds = crowd
    return _choice(f"{letters}*", kinds[0], kinds[1:], rng)


# --- a word again and again, each time turned by one letter: the long answer ---


def _recited(rng: Random, level: int) -> tuple[str, int]:
    return "".join(rng.sample(ALPHABET[:10], 5)), ROUNDS[level]


def _turned(word: str, rounds: int) -> str:
    return " ".join(word[i % len(word) :] + word[: i % len(word)] for i in range(rounds))


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
    "recital": Family(
        draw=_recited,
        key=lambda recited: f"word {recited[0]}",
        item=lambda recited, rng: Item(f"@ {recited[0]}=", _turned(*recited)),
        lesson=lambda recited, rng: f"{recited[0]} goes round: {_turned(recited[0], 4)}\n",
    ),
}
# cloze is its own lesson: the pre-training text is the same kind of text, from other files
NAMES = (*FAMILIES, "cloze")
