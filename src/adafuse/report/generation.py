"""What a strategy does to accuracy: the same adapters and the same items, evaluated through each of several strategies.

In: evaluate records. Out: `Generated` groups and the sheet `generation`. Next: why.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial

from adafuse.records import Record
from adafuse.report.accuracy import Seeds, by_seed, heading, paired, same_items, scores, tasks_of, trained
from adafuse.report.accuracy_table import score_row, score_text, tasks_note
from adafuse.report.cells import Cell, base_key, caption, cells, method_name, short_name
from adafuse.report.older import entry
from adafuse.report.sheet import Columns, Row, Section, Sheet, nothing
from adafuse.report.text import GAP, points_text
from adafuse.report.variants import rank, setting
from adafuse.stats import Difference

STRATEGY, DTYPE, RESTORE = "evaluate_strategy", "evaluate_dtype", "evaluate_restore"
DENSE, SWITCH = "dense", "switch"
# of the families of the suite, the one whose answers are long
LONG = "recital"
NEVER = "never put right"
# of an interval over seeds that do not vary, in a float's last digits
NO_WIDTH = 1e-9
ORDER = (DENSE, "gather", "fused", "rebase", SWITCH, f"{SWITCH}, {NEVER}")
ABOUT = (
    "The same adapters and the same items, generated through each strategy: accuracy in per cent ± one standard error, "
    "the difference to strategy dense in the same dtype, paired per item, with its 95 % interval, and how many items "
    "have another result; where seeds do not vary there is no interval, and the count stands alone. Merging in place "
    f"rounds anew with each token; here is what that does to answers. {LONG.capitalize()} is the one family of long "
    "answers (70 tokens at level 1, 215 at level 3), in which it has time to show, and is scored by how much of the "
    f"answer is right from its beginning (prefix). Strategy switch puts the weights right after each answer, or is "
    f"{NEVER}."
)


@dataclass(frozen=True)
class Gap:
    """What a strategy changed: the paired difference, and how many of how many items."""

    difference: Difference
    differing: int
    items: int

    @property
    def text(self) -> str:
        """The difference in points and the count; the count alone where an interval would have no width."""
        value, count = 100 * self.difference.value, f"{self.differing:,} of {self.items:,} items differ"
        if self.difference.high - self.difference.low > NO_WIDTH:
            return f"{points_text(self.difference)} points, {count}"
        return count if abs(value) < NO_WIDTH else f"{value:+.1f} points in every seed, {count}"


@dataclass(frozen=True)
class Generated:
    """One method: the records by strategy and dtype, and by seed."""

    method: str
    arms: dict[tuple[str, str], Seeds]
    tasks: list[str]

    @property
    def records(self) -> list[Record]:
        return [r for seeds in self.arms.values() for records in seeds.values() for r in records]

    @property
    def cell(self) -> Cell:
        """All of its records, by which it is called."""
        return Cell(tuple(self.records))

    def to_dense(self, arm: tuple[str, str]) -> Seeds:
        """The records that an arm is compared with."""
        return self.arms.get((DENSE, arm[1]), {})

    def gap(self, arm: tuple[str, str], tasks: list[str]) -> Gap | None:
        """An arm against dense of its dtype on some of the tasks; None without common items."""
        sides = self.arms[arm], self.to_dense(arm)
        found, count = paired(*sides, tasks), differing(*sides, tasks)
        return Gap(found, *count) if found and count else None


def generated(records: Iterable[Record]) -> list[Generated]:
    """Every method that was evaluated through more than one strategy."""
    own = [record for record in records if record.run.get("task") == "evaluate"]
    groups: dict[str, list[Record]] = {}
    for cell in cells(own, "evaluate"):
        for record in trained(cell.records):
            groups.setdefault(_key(record), []).append(record)
    found = [_group(group) for group in groups.values() if len({_arm(r)[0] for r in group}) > 1]
    return sorted(found, key=lambda group: (group.cell.is_cpu, rank(group.method)))


def generation_table(found: list[Generated]) -> Sheet:
    """A section for each method and backbone."""
    reason = "no adapter was evaluated through more than one strategy: experiment=generation"
    return Sheet(
        "generation", "Accuracy by strategy", ABOUT, [_section(g) for g in found] or [nothing(reason)]
    )


def differing(left: Seeds, right: Seeds, tasks: list[str]) -> tuple[int, int] | None:
    """How many of the common items have another result, and how many there are."""
    other: list[bool] = []
    for seed in sorted(set(left) & set(right)):
        one, two = scores(left[seed]), scores(right[seed])
        for task in tasks:
            if same_items(one, two, task):
                other += [a != b for a, b in zip(one[task]["correct"], two[task]["correct"], strict=True)]
    return (sum(other), len(other)) if other else None


def _section(group: Generated) -> Section:
    columns: Columns = {"strategy": lambda row: row["strategy"], "dtype": lambda row: row["dtype"]}
    for task in [*group.tasks, "average"]:
        columns[task] = partial(score_text, task=task)
    columns |= {
        "minus dense [95 %]": lambda row: _gap_text(row, ""),
        f"{LONG} minus dense [95 %]": lambda row: _gap_text(row, f"{LONG}_"),
        "seeds": lambda row: str(row["seeds"]),
    }
    if LONG not in group.tasks:
        del columns[f"{LONG} minus dense [95 %]"]
    rows = [_row(group, arm) for arm in group.arms]
    notes = tasks_note(group.cell.finished, group.tasks)
    return Section(f"{group.method}: {heading(group.cell)}", caption(group.cell), rows, columns, notes)


def _gap_text(row: Row, prefix: str) -> str:
    found = row[f"_{prefix}gap"]
    return GAP if found is None or row["strategy"] == DENSE else str(found.text)


def _row(group: Generated, arm: tuple[str, str]) -> Row:
    seeds = group.arms[arm]
    row: Row = {"method": group.method, "strategy": arm[0], "dtype": arm[1]} | score_row(seeds, group.tasks)
    for prefix, tasks in (("", group.tasks), (f"{LONG}_", [LONG])):
        found = group.gap(arm, tasks)
        row |= {f"_{prefix}gap": found, f"{prefix}to_dense": found and found.difference}
        row |= {f"{prefix}differing": found and found.differing, f"{prefix}items": found and found.items}
    return row | {"records": [short_name(record) for records in seeds.values() for record in records]}


def _group(records: list[Record]) -> Generated:
    arms: dict[tuple[str, str], list[Record]] = {}
    for record in sorted(records, key=_rank):
        arms.setdefault(_arm(record), []).append(record)
    finished = [record for record in records if record.status != "unfinished"]
    by_arm = {arm: by_seed(own) for arm, own in arms.items()}
    return Generated(method_name(records[0]), by_arm, tasks_of(finished))


def _arm(record: Record) -> tuple[str, str]:
    strategy, dtype, restored = (entry(record.run["config"], name) for name in (STRATEGY, DTYPE, RESTORE))
    return str(strategy if restored else f"{strategy}, {NEVER}"), str(dtype)


def _rank(record: Record) -> tuple[str, int, str, str]:
    strategy, dtype = _arm(record)
    return dtype, ORDER.index(strategy) if strategy in ORDER else len(ORDER), strategy, str(record.path)


def _key(record: Record) -> str:
    """What must agree apart from how it is evaluated: the adapter, the items, the machine."""
    same = json.loads(base_key(Cell((record,))))
    rest = {name: value for name, value in same.items() if name not in (STRATEGY, DTYPE, RESTORE)}
    return json.dumps([rest, setting(record)], sort_keys=True)
