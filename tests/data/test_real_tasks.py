"""Items of the real tasks: the keyed answer is the only right one, by computations of its own; splits never meet.

The packages' generators are not trusted: one of them (syllogism) has wrong keys, and is not used for that.
"""

from __future__ import annotations

import ast
import math
import os
import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from omegaconf import OmegaConf

from adafuse.data import real_tasks
from adafuse.data.families import Item
from adafuse.data.real_tasks import ASKED

COUNT = 150
USED = tuple(OmegaConf.load("conf/data/real.yaml").families) + tuple(
    OmegaConf.load("conf/data/real_same_tokens.yaml").families
)


def question(item: Item) -> str:
    return item.prompt.removesuffix(ASKED)


def added(item: Item) -> str:
    left, sign, right = re.search(r": (\d+) ([+-]) (\d+) =$", question(item)).groups()  # type: ignore[union-attr]
    return str(int(left) + int(right) if sign == "+" else int(left) - int(right))


def greatest_divisor(item: Item) -> str:
    numbers = re.search(r": (\d+), (\d+)\.", question(item)).groups()  # type: ignore[union-attr]
    return str(math.gcd(*map(int, numbers)))


def sorted_numbers(item: Item) -> str:
    order, listed = re.match(r"Sort these numbers in (\w+) order: (.+)\n", question(item)).groups()  # type: ignore[union-attr]
    numbers = sorted(ast.literal_eval(f"[{listed}]"), reverse=order == "descending")
    return str([str(number) for number in numbers])


def who_said(item: Item) -> str:
    statements, asked = question(item).rsplit("\n", 1)
    wanted = re.match(r"Who (.+)\? Reply", asked)[1]  # type: ignore[index]
    people = [
        s.split(" ", 1)[0] for s in statements.split(". ") if s.split(" ", 1)[-1].rstrip(". ") == wanted
    ]
    assert len(people) == 1
    return people[0]


def finished_courses(item: Item) -> str:
    courses = set(range(int(re.search(r"total of (\d+)", question(item))[1])))  # type: ignore[index]
    pairs = ast.literal_eval(re.search(r":\n(\[.*\])", question(item))[1])  # type: ignore[index]
    taken: set[int] = set()
    while free := {c for c in courses - taken if all(b in taken for a, b in pairs if a == c)}:
        taken |= free
    return str(taken == courses)


def turned_cube(item: Item) -> str:
    """Where the four sides of a turn go round, the one that comes to lie where the asked side is."""
    sides = {side: colour for colour, side in re.findall(r"- an? (\w+) (\w+) side", question(item))}
    start, end = re.search(r"before at the (\w+) is now at the (\w+)\.", question(item)).groups()  # type: ignore[union-attr]
    asked = re.search(r"color of the (\w+) side", question(item))[1]  # type: ignore[index]
    opposite = {"top": "bottom", "left": "right", "front": "back"}
    opposite |= {b: a for a, b in opposite.items()}
    came_from = {end: start, opposite[start]: end, opposite[end]: opposite[start], start: opposite[end]}
    return sides[came_from.get(asked, asked)]


def relation(item: Item) -> str:
    """One's relation to the other, from marriages and children alone; the sex from what the keyed word says of it."""
    story, asked = question(item).split("\n\n")
    spouse: dict[str, str] = {}
    parents: dict[str, set[str]] = {}
    for sentence in re.findall(r"[^.]+\.", story):
        if married := re.search(r"(\w+) is married to (\w+)", sentence):
            couple = (married[1], married[2])
            spouse |= {couple[0]: couple[1], couple[1]: couple[0]}
        else:
            for child in re.findall(r"[A-Z]\w+", sentence.split("called ")[1]):
                parents[child] = set(couple)
    named = [name for name in re.findall(r"[A-Z]\w+", asked) if name in story]
    one, other = named[0], named[1]
    if spouse.get(one) == other:
        return "husband/wife"
    if one in parents.get(other, ()):
        return "father/mother"
    if other in parents.get(one, ()):
        return "son/daughter"
    if parents.get(one) and parents.get(one) == parents.get(other):
        return "brother/sister"
    if any(one in parents.get(parent, ()) for parent in parents.get(other, ())):
        return "grandfather/grandmother"
    raise AssertionError(question(item))


def ordered(order: Callable[[list[str]], list[str]]) -> Callable[[Item], str]:
    return lambda item: ", ".join(order(question(item).split(": ", 1)[1].split(", ")))


COMPUTED = {
    "sum_two": added,
    "gcd": greatest_divisor,
    "number_sorting": sorted_numbers,
    "needle_haystack": who_said,
    "family_relationships": relation,
    "cube_rotation": turned_cube,
    "course_schedule": finished_courses,
    "words_up": ordered(sorted),
    "words_down": ordered(lambda words: sorted(words)[::-1]),
    "words_ends": ordered(lambda words: [w[::-1] for w in sorted(w[::-1] for w in words)]),
}


@pytest.mark.parametrize("name", COMPUTED)
def test_the_keyed_answer_is_the_computed_one(name: str) -> None:
    for item in real_tasks.generate(name, "test", COUNT, 0):
        assert item.answer.strip() in COMPUTED[name](item).split("/"), item


def test_the_named_capital_and_neighbour_are_the_only_right_choice() -> None:
    facts = {country.name: country for country in real_tasks._countries()}
    for item in real_tasks.generate("country_capital", "test", COUNT, 0):
        country = re.search(r"capital of (.+?):", item.prompt)[1]  # type: ignore[index]
        assert [c for c in item.choices or [] if c.strip() == facts[country].capital] == [item.answer]
    for item in real_tasks.generate("country_neighbour", "test", COUNT, 0):
        country = re.search(r"border with (.+?):", item.prompt)[1]  # type: ignore[index]
        bordering = [c for c in item.choices or [] if facts[c.strip()].code in facts[country].borders]
        assert bordering == [item.answer]


@pytest.mark.parametrize("name", USED)
def test_items_are_the_same_each_time_and_in_one_split_only(name: str) -> None:
    train = real_tasks.generate(name, "train", COUNT, 0)
    assert train == real_tasks.generate(name, "train", COUNT, 0)
    prompts = {item.prompt for item in train}
    assert len(prompts) == COUNT
    for split in ("validation", "test"):
        for seed in (0, 1):
            assert not prompts & {item.prompt for item in real_tasks.generate(name, split, COUNT // 2, seed)}


def test_items_are_the_same_in_every_process() -> None:
    """Some generators draw from sets, whose order is another one in each."""
    code = (
        "from adafuse.data import real_tasks as t\n"
        "print([i for n in t.NAMES for s in ('train', 'test') for i in t.generate(n, s, 20, 0)])"
    )
    said = [
        subprocess.run(
            [sys.executable, "-W", "ignore", "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1] and said[0].count("Item(") == 40 * len(real_tasks.NAMES)


def test_every_task_that_the_study_uses_has_its_answer_computed_here() -> None:
    assert set(USED) == set(COMPUTED) | set(real_tasks.COUNTRIES)


def test_choices_are_where_the_label_says() -> None:
    for name in (*real_tasks.COUNTRIES, "course_schedule"):
        items = real_tasks.generate(name, "test", COUNT, 0)
        assert all((item.choices or [])[item.label or 0] == item.answer for item in items)
        assert all(len(set(item.choices or [])) == len(item.choices or []) for item in items)


def test_prompts_of_the_word_lists_hold_the_same_words_of_ours() -> None:
    instructions = [instruction for instruction, *_ in real_tasks.ORDERS.values()]
    assert len({tuple(sorted(re.findall(r"\w+", text.lower()))) for text in instructions}) == 1
    assert len(set(instructions)) == len(instructions)


def test_a_level_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.level=2 is of generated families"):
        real_tasks.generate("gcd", "test", 1, 0, 2)


def test_a_task_that_runs_out_says_so() -> None:
    with pytest.raises(ValueError, match="has only"):
        real_tasks.generate("lcm", "test", 100_000, 0)
