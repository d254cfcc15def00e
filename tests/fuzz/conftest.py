"""What `make soak` prints at its end, and where it goes on when it was interrupted: done kinds are skipped."""

import json
import os
from pathlib import Path

import pytest

from synthetic import hostile

DONE = Path(os.environ.get("ADAFUSE_SOAK_DONE", ".soak.json"))


def done() -> dict[str, list[int]]:
    return json.loads(DONE.read_text()) if hostile.SOAK and DONE.exists() else {}


@pytest.fixture
def room(tmp_path: Path, request: pytest.FixtureRequest) -> Path:
    """A folder for the inputs of the kind that a test is named after."""
    kind = request.node.name.removeprefix("test_")
    if kind in done():
        pytest.skip(f"{kind} was soaked already")
    if hostile.SOAK:
        request.addfinalizer(lambda: note(kind))
    return tmp_path


def note(kind: str) -> None:
    DONE.write_text(json.dumps(done() | {kind: [hostile.TRIED[kind], hostile.FAILED[kind]]}))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not hostile.SOAK:
        return
    found = done()
    for line in dict.fromkeys(hostile.SAID):
        terminalreporter.write_line(line)
    for kind, (tried, failed) in found.items():
        terminalreporter.write_line(f"{kind:12} {tried:8} tried {failed:6} failed")
    if found.keys() >= hostile.SHARES.keys():
        # the next soak begins anew
        DONE.unlink()
