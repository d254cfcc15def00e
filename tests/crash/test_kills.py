"""A study that is killed at any moment goes on by the same command, and finds what one finds that was left alone."""

import random
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from synthetic import whole
from synthetic.hostile import SOAK

KILLS = 100 if SOAK else 6
# what a whole study has: changes to files, and seconds
CHANGES, SECONDS = 150, 10.0
pytestmark = pytest.mark.slow


def moments(seed: int) -> Iterator[whole.Fault]:
    """Half of them at a change to a file, where there is most to lose."""
    draw = random.Random(seed)
    for number in range(KILLS):
        yield whole.Changes(draw.randint(1, CHANGES)) if number % 2 else whole.Kill(draw.uniform(0, SECONDS))


def killed(folder: Path, fault: Any) -> bool:
    process = whole.start(folder, fault)
    process.join(getattr(fault, "seconds", 120))
    if isinstance(fault, whole.Kill):
        process.kill()
        process.join(60)
    if process.exitcode != 0:
        assert process.exitcode == -signal.SIGKILL, (vars(fault), (folder / "said").read_text())
        whole.nothing_outlives(process.pid)
    return process.exitcode != 0


def test_a_killed_study_goes_on_and_finds_the_same(undisturbed: dict[str, Any], tmp_path: Path) -> None:
    seed = random.randrange(2**32) if SOAK else 1
    met = whole.survives(tmp_path, moments(seed), killed, undisturbed)
    print(f"crash: {met} of {KILLS} SIGKILLs met a study at work, seed {seed}: none lost anything")
    assert met > KILLS / 2
