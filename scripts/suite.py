"""Which experiments a command runs: python scripts/suite.py SUITE PROFILE prints their names, for the Makefile.

In: conf/suites.yaml. Out: names of files in conf/experiment, in order. Exit status 2 and one line if a name is wrong.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import yaml

from adafuse.files import refuse_irregular

CONF = Path(__file__).resolve().parents[1] / "conf"

Suites = dict[str, list[str] | dict[str, list[str]]]


def experiments(suite: str, profile: str, conf: Path = CONF) -> list[str]:
    """The experiments of `suite`, those of the suites that it names in their places. Raises ValueError or OSError."""
    refuse_irregular(conf)
    profiles = sorted(path.stem for path in (conf / "profile").glob("*.yaml"))
    if profile not in profiles:
        raise ValueError(f"there is no profile {profile}: choose from {profiles}")
    suites = yaml.safe_load((conf / "suites.yaml").read_text())
    if suite not in suites:
        raise ValueError(f"there is no suite {suite}: choose from {list(suites)}")
    return list(_expanded(suite, profile, suites, conf))


def _expanded(suite: str, profile: str, suites: Suites, conf: Path) -> Iterator[str]:
    entries = suites[suite]
    for name in entries.get(profile, []) if isinstance(entries, dict) else entries:
        if name in suites:
            yield from _expanded(name, profile, suites, conf)
        elif (conf / f"experiment/{name}.yaml").is_file():
            yield name
        else:
            raise ValueError(f"conf/suites.yaml: {suite} names {name}, which is no experiment and no suite")


def main(arguments: list[str]) -> int:
    """Print the names; returns the exit status."""
    try:
        if len(arguments) != 2:
            raise ValueError("name a suite and a profile: python scripts/suite.py paper cpu")
        suite, profile = arguments
        print(*experiments(suite, profile))
    except (ValueError, OSError, yaml.YAMLError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
