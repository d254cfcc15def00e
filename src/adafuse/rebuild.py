"""Membership found again: every job of every experiment is composed, and its records are looked for by their hashes.

In: records, profiles. Out: the rows of membership.csv, with the machine of each record. A record that no sweep asks for
keeps a row from its own header: what its command said beyond the defaults. Next: report/.

    python -m adafuse.rebuild results/reference --profiles cpu gpu --out results/membership.csv
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import shlex
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import hydra
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adafuse import archive, cell, compose, membership
from adafuse.config import Config
from adafuse.files import put
from adafuse.machine import ROOT
from adafuse.membership import COLUMNS, Row
from adafuse.records import Record

CONF = ROOT / "conf"
# what a row says even where it is the default
ALWAYS = ("seed", "replicate", "method", "task")
# what no other setting is made from, so that it can be put into a composed configuration
COUNTED = ("seed=", "replicate=")
# how a job that cannot be composed says so: a choice that a profile does not have, a combination that is refused
REFUSALS = (HydraException, OmegaConfBaseException, ValueError)

# a record's task and hash
Key = tuple[str, str]


def rebuild(records: Iterable[Record], profiles: Sequence[str], experiments: Sequence[str] = ()) -> list[Row]:
    """The rows of all experiments (or of those named) in these profiles that have a record, in the order of sweeps."""
    there = {_key(record): record for record in records}
    names = experiments or sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
    rows: list[Row] = []
    compose.register()
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        for name, profile in itertools.product(names, profiles):
            rows += _swept(name, profile, there.keys())
        listed = {(row.experiment, row.task, row.record) for row in rows}
        for key, record in there.items():
            if (record.run["experiment"] or "", *key) not in listed:
                rows.append(_own_row(key, record))
    return list(membership.once(rows).values())


def _swept(experiment: str, profile: str, there: Collection[Key]) -> list[Row]:
    """The rows of a sweep's jobs; none if no job ran, even if cells that they would stand on did for others."""
    rows, ran = [], False
    for overrides in _jobs(experiment, profile):
        keys = _keys(experiment, profile, overrides)
        found = [key for key in keys if key in there]
        ran |= any(task == keys[0][0] for task, _ in found)
        rows += [Row(experiment, profile, task, membership.joined(overrides), known) for task, known in found]
    return rows if ran else []


def _jobs(experiment: str, profile: str) -> Iterator[list[str]]:
    """The overrides of every job of a sweep, as Hydra would give them; none where the profile has no such sweep."""
    chosen = [f"experiment={experiment}", f"profile={profile}"]
    try:
        composed = hydra.compose("config", overrides=chosen, return_hydra_config=True)
    except REFUSALS:
        return
    params = OmegaConf.to_container(composed.hydra.sweeper).get("params") or {}  # type: ignore[union-attr]
    parsed = OverridesParser.create().parse_overrides([f"{key}={value}" for key, value in params.items()])
    yield from itertools.chain(*BasicSweeper.split_arguments(parsed, None))


def _keys(experiment: str, profile: str, overrides: Sequence[str]) -> list[Key]:
    """What the records of a job, and of the cells that it stands on, may be called, withdrawn and outdated ones last;
    none for a job that is refused.
    """
    try:
        config = _config(experiment, profile, overrides)
    except REFUSALS:
        return []
    return [
        (one.task.name, known)
        for one in cell.with_needs(config)
        for names in (cell.known_records(one).values(), cell.withdrawn_hashes(one), cell.outdated_hashes(one))
        for known in names
    ]


def _config(experiment: str, profile: str, overrides: Sequence[str]) -> Config:
    """The job's configuration; seeds and replicates of one choice are composed once, which takes half a second."""
    words = [one.partition("=")[::2] for one in overrides if one.startswith(COUNTED)]
    config = _composed(experiment, profile, tuple(one for one in overrides if not one.startswith(COUNTED)))
    counted: dict[str, Any] = {name: int(number) for name, number in words}
    return dataclasses.replace(config, **counted)


@cache
def _composed(experiment: str, profile: str, overrides: tuple[str, ...]) -> Config:
    chosen = [*([f"experiment={experiment}"] if experiment else []), f"profile={profile}", *overrides]
    return compose.build(hydra.compose("config", overrides=chosen), chosen)


def _own_row(key: Key, record: Record) -> Row:
    """The row that a record's own header gives, without what today's defaults say as well."""
    experiment, profile = record.run["experiment"] or "", record.run["profile"]
    overrides = shlex.split(membership.job_overrides(record.run["command"]))
    if key in _keys(experiment, profile, overrides):
        for one in overrides.copy():
            less = [other for other in overrides if other != one]
            if one.partition("=")[0] not in ALWAYS and key in _keys(experiment, profile, less):
                overrides = less
    return Row(experiment, profile, key[0], membership.joined(overrides), key[1])


def _key(record: Record) -> Key:
    return record.run["task"], record.run["config_hash"]


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m adafuse.rebuild", description="Membership, found again.")
    parser.add_argument("records", nargs="+", type=Path, help="folders of records, or archives")
    parser.add_argument("--profiles", nargs="+", default=["cpu", "gpu"])
    parser.add_argument("--experiments", nargs="+", default=[], help="all, if none is named")
    parser.add_argument("--out", type=Path, required=True, help="the file to write")
    options = parser.parse_args(arguments)
    try:
        found = archive.load(options.records)
        rows = rebuild(found.records, options.profiles, options.experiments)
        write(options.out, rows, found.records)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for line in [
        *found.left_out,
        *(f"without a row: {r.path}" for r in membership.unlisted(found.records, rows)),
    ]:
        print(line)
    print(f"{len(rows)} rows for {len(found.records)} records in {options.out}")
    return 0


def write(path: Path, rows: Iterable[Row], records: Iterable[Record]) -> None:
    """The rows with the machine of each record; one of two machines has a row for each."""
    machines: dict[Key, dict[str, None]] = {}
    for record in records:
        machines.setdefault(_key(record), {})[str(record.run["machine"].get("name"))] = None
    lines = [(*COLUMNS, "machine")]
    lines += [
        (row.experiment, row.profile, row.task, row.overrides, row.record, machine)
        for row in rows
        for machine in machines[row.task, row.record]
    ]
    put(path, membership.as_csv(lines))


if __name__ == "__main__":
    sys.exit(main())
