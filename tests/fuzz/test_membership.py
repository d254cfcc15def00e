"""What experiments consist of, as runs append to it and as the report reads it."""

from pathlib import Path

from adafuse import membership
from adafuse.membership import Row
from adafuse.report import membership as of_report
from synthetic import hostile

ROWS = [
    Row("table2", "cpu", "train", "seed=0 method=lora", "0123456789ab"),
    Row("", "gpu", "latency", "'model.path=a b' batch=8", "ba9876543210"),
]


def read(folder: Path) -> None:
    file = folder / membership.FILE
    for row in of_report.read(file)["overrides"]:
        of_report.coordinates(row)
    membership.read(file)


def test_membership(room: Path) -> None:
    membership.append(room / "good" / membership.FILE, ROWS)
    hostile.attack("membership", room / "good", read, room)


def test_appending(room: Path) -> None:
    membership.append(room / "good" / membership.FILE, ROWS)
    own = Row("table3", "cpu", "train", "seed=1", "0123456789ac")
    hostile.attack(
        "appending", room / "good", lambda at: membership.append(at / membership.FILE, [own]), room
    )
