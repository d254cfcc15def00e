"""Tasks that nobody here wrote: items from the packages reasoning-gym and countryinfo, under the names of families.

In: a task's name, a split, a count and a seed. Out: the same items each time, split by content as those of families.py.
A question is plain text that ends in "Answer:". Settings are easier than the packages' own, so that a small model can
learn the tasks; conf/data/real.yaml holds those that experiment=real_pilot kept. Next: items.py, which asks for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from random import Random
from typing import Any

from adafuse.data.families import Item, collect
from adafuse.data.splits import split_of

ASKED = "\nAnswer:"
OPTIONS = 4
# a dataset of reasoning-gym makes item i from its seed plus i: this far apart, the items of two seeds never meet
STRIDE = 10_000_000
TRUE_FALSE = ("True", "False")


def _one_has_it(row: dict[str, Any]) -> bool:
    """Whoever is asked for stands in one statement: in some questions two people share it."""
    statements, asked = row["question"].strip().rsplit("\n", 1)
    shared = asked.removeprefix("Who ").split("?")[0]
    return f"{statements.strip()} ".count(f" {shared}. ") == 1


def _quarter_turn(row: dict[str, Any]) -> bool:
    """No half turn: which of two axes it goes round is not said."""
    pairs = ({"top", "bottom"}, {"left", "right"}, {"front", "back"})
    return set(re.findall(r"before at the (\w+) is now at the (\w+)", row["question"])[0]) not in pairs


@dataclass(frozen=True)
class Gym:
    """A dataset of reasoning-gym with the settings that differ from its defaults; `choices` if its answers are few, and
    which rows to `keep`, where the others have no answer or a wrong one.
    """

    dataset: str
    settings: dict[str, Any] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    keep: Callable[[dict[str, Any]], bool] = lambda row: True


@dataclass(frozen=True, order=True)
class Country:
    """What is asked of a country."""

    name: str
    capital: str
    region: str
    code: str
    borders: frozenset[str]


GYM = {
    "sum_two": Gym("chain_sum", {"max_terms": 2, "max_digits": 2}),
    "spell_backward": Gym("spell_backward", {"max_word_len": 5}),
    "gcd": Gym("gcd", {"max_value": 100}),
    "lcm": Gym("lcm", {"max_value": 60}),
    "product": Gym("products", {"max_digits": 2}),
    "count_bits": Gym("count_bits", {"max_n": 4095}),
    "leg_counting": Gym("leg_counting", {"min_animals": 1, "max_animals": 2, "max_instances": 6}),
    "letter_counting": Gym("letter_counting", {"min_words": 3, "max_words": 6}),
    "number_filtering": Gym(
        "number_filtering", {"max_numbers": 5, "max_decimals": 0, "min_value": 0, "max_value": 100}
    ),
    "number_sorting": Gym(
        "number_sorting", {"max_numbers": 5, "max_decimals": 0, "min_value": 0, "max_value": 100}
    ),
    "word_sorting": Gym("word_sorting", {"max_words": 4, "max_word_length": 7}),
    "word_reversal": Gym("word_sequence_reversal", {"max_words": 5}),
    "time_intervals": Gym("time_intervals", {"task_types": ["time"]}),
    "calendar": Gym("calendar_arithmetic", {"tasks": ["weekday_offset", "weekday_of_date"]}),
    "needle_haystack": Gym(
        "needle_haystack", {"min_num_statements": 5, "max_num_statements": 12}, keep=_one_has_it
    ),
    # its relations by marriage are keyed the wrong way round
    "family_relationships": Gym("family_relationships", keep=lambda row: "in-law" not in row["answer"]),
    "siblings": Gym("aiw"),
    "cube_rotation": Gym("color_cube_rotation", {"max_rotations": 1}, keep=_quarter_turn),
    "course_schedule": Gym("course_schedule", {"min_num_courses": 3, "max_num_courses": 5}, TRUE_FALSE),
}
COUNTRIES = ("country_capital", "country_neighbour")
# one list of words, three orders: every prompt holds the same words of ours, in another order. To copy or to
# reverse is too easy: plain LoRA soon makes no mistake
ORDERS: dict[str, tuple[str, Callable[[str], str], bool]] = {
    "words_up": ("Sort from A to Z, not from Z to A or by last letters, this list: ", str, False),
    "words_down": ("Sort from Z to A, not from A to Z or by last letters, this list: ", str, True),
    "words_ends": (
        "Sort by last letters, not from A to Z or from Z to A, this list: ",
        lambda w: w[-1],
        False,
    ),
}
NAMES = (*GYM, *COUNTRIES, *ORDERS)


def generate(name: str, split: str, count: int, seed: int, level: int = 1) -> list[Item]:
    """`count` items with different prompts. Raises ValueError for a task that runs out, or whose package is missing."""
    if level != 1:
        raise ValueError(f"data.level={level} is of generated families: {name} has one, use data.level=1")
    rng = Random(f"{name}/{split}/{seed}")
    if name in GYM:
        candidates = _gym_items(GYM[name], split, rng)
    elif name in ORDERS:
        candidates = _ordered_words(name, split, rng)
    else:
        candidates = _country_items(name, split, rng)
    return collect(candidates, name, split, count)


def _gym_items(task: Gym, split: str, rng: Random) -> Iterator[Item]:
    for row in _rows(task.dataset, task.settings, rng):
        question, answer = row["question"].strip(), row["answer"].strip()
        if split_of(question) != split or not task.keep(row):
            continue
        if task.choices:
            yield _choice(question, answer, list(task.choices))
        else:
            yield Item(question + ASKED, f" {answer}")


def _rows(dataset: str, settings: dict[str, Any], rng: Random) -> Iterator[dict[str, Any]]:
    """Endless items of reasoning-gym."""
    try:
        import reasoning_gym
    except ImportError:
        raise ValueError(
            "the real tasks need two packages: pip install 'adafuse[real]' (or make install)"
        ) from None
    yield from reasoning_gym.create_dataset(
        dataset, size=STRIDE, seed=STRIDE * rng.randrange(200), **settings
    )


def _choice(question: str, answer: str, options: list[str]) -> Item:
    return Item(question + ASKED, f" {answer}", [f" {option}" for option in options], options.index(answer))


# --- lists of words: reasoning-gym's words, three instructions ---


def _ordered_words(name: str, split: str, rng: Random) -> Iterator[Item]:
    instruction, key, falls = ORDERS[name]
    for row in _rows("word_sequence_reversal", {"min_words": 3, "max_words": 4}, rng):
        words = [word.lower() for word in row["metadata"]["words"]]
        # in all three tasks, so that their lists are of one kind
        if len({word[-1] for word in words}) < len(words):
            continue
        answer = ", ".join(sorted(words, key=key, reverse=falls))
        # sorted words are one key, so that no order of them stands in two splits; the answer is no copy
        if split_of(" ".join(sorted(words))) == split and answer != ", ".join(words):
            yield Item(f"{instruction}{', '.join(words)}{ASKED}", f" {answer}")


# --- countries: what a pre-trained model partly knows ---


def _country_items(name: str, split: str, rng: Random) -> Iterator[Item]:
    countries = _countries()
    ask: Callable[[Country, Random], Item | None] = _capital if name == "country_capital" else _neighbour
    asked = [country for country in countries if split_of(country.name) == split]
    while True:
        item = ask(rng.choice(asked), rng)
        if item is not None:
            yield item


def _capital(country: Country, rng: Random) -> Item | None:
    others = [c.capital for c in _countries() if c.region == country.region and c is not country]
    return _options(f"Which city is the capital of {country.name}", country.capital, others, rng)


def _neighbour(country: Country, rng: Random) -> Item | None:
    region = [c for c in _countries() if c.region == country.region and c is not country]
    neighbours = [c.name for c in region if c.code in country.borders]
    if not neighbours:
        return None
    others = [c.name for c in region if c.code not in country.borders]
    return _options(f"Which country shares a border with {country.name}", rng.choice(neighbours), others, rng)


def _options(question: str, answer: str, others: list[str], rng: Random) -> Item | None:
    if len(others) < OPTIONS - 1:
        return None
    options = [answer, *rng.sample(others, OPTIONS - 1)]
    rng.shuffle(options)
    return _choice(f"{question}: {', '.join(options[:-1])} or {options[-1]}?", answer, options)


@cache
def _countries() -> tuple[Country, ...]:
    """Countries with one capital that neither shares nor betrays a name. Former and doubled entries share theirs."""
    try:
        from countryinfo import all_countries
    except ImportError:
        raise ValueError(
            "the real tasks need two packages: pip install 'adafuse[real]' (or make install)"
        ) from None
    facts = [country.info() for country in all_countries()]
    capitals = [fact.get("capital") for fact in facts]
    return tuple(
        sorted(
            Country(
                fact["name"],
                fact["capital"],
                fact["region"],
                fact["ISO"]["alpha3"],
                frozenset(fact.get("borders", ())),
            )
            for fact in facts
            if isinstance(fact.get("capital"), str)
            and fact["capital"]
            and capitals.count(fact["capital"]) == 1
            and "/" not in fact["capital"]
            and fact["capital"] not in fact["name"]
            and fact["name"] not in fact["capital"]
            and fact.get("region")
            and fact.get("population", 0) >= 100_000
        )
    )
