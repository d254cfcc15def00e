"""The parsers under a fuzzer that follows coverage: python tests/fuzz/guided.py rows --seconds 60

In: a kind, whose specimen's bytes the fuzzer starts from. Out: how many inputs it tried; exit status 77 at
the first that fails as hostile.py judges, which is left in KIND-crash-*. Needs atheris: `make soak` installs it, and
runs every kind.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import atheris

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
with atheris.instrument_imports(include=["adafuse"]):
    import test_archives
    import test_models
    import test_rows

    import test_membership
    import test_records
    from adafuse import archive, membership
    from synthetic import hostile
    from synthetic.checkpoints import save, tiny_model
    from synthetic.records import write_one


class Kind(NamedTuple):
    """How a specimen is made, which of its files is replaced, and who reads the folder."""

    make: Callable[[Path], object]
    file: str
    read: Callable[[Path], object]


def rows(folder: Path) -> None:
    for name, own in (("answered", test_rows.ANSWERED), ("chosen", test_rows.CHOSEN)):
        test_rows.write(folder / name, own)


def archives(folder: Path) -> None:
    write_one(folder / "of/latency/one.jsonl", cell_id="one")
    archive.pack([folder / "of"], folder / "packed")


def checkpoint(folder: Path) -> None:
    save(tiny_model(num_hidden_layers=1), folder / "whole")


def prompts(folder: Path) -> None:
    folder.mkdir(parents=True)
    (folder / "prompts.jsonl").write_text('{"prompt": "one"}\n{"prompt": "two", "of": 1}\n')


def check(folder: Path) -> None:
    model = test_models.Model(name="mine", path=str(folder / "whole"))
    test_models.backbone.check_source(model)


KINDS = {
    "records": Kind(test_records.specimen, "evaluate/one.jsonl", test_records.read),
    "membership": Kind(
        lambda folder: membership.append(folder / membership.FILE, test_membership.ROWS),
        membership.FILE,
        test_membership.read,
    ),
    "answers": Kind(rows, "answered/train.jsonl", test_rows.read),
    "choices": Kind(rows, "chosen/train.jsonl", test_rows.read),
    "prompts": Kind(
        prompts, "prompts.jsonl", lambda folder: test_rows.rows.prompts(str(folder / "prompts.jsonl"))
    ),
    "archives": Kind(archives, "packed/cpu/latency.parquet", test_archives.read),
    "config": Kind(checkpoint, "whole/config.json", check),
    "header": Kind(checkpoint, "whole/model.safetensors", check),
    "tokenizer": Kind(checkpoint, "whole/tokenizer.json", check),
}


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kinds", nargs="*", metavar="kind", help=f"of {', '.join(KINDS)}; all unless told")
    parser.add_argument("--seconds", type=int, default=60, help="for each kind")
    given = parser.parse_args(arguments)
    status = 0
    for name in given.kinds or KINDS:
        with tempfile.TemporaryDirectory() as room:
            status = fuzz(KINDS[name], name, Path(room), given.seconds) or status
    return status


def fuzz(kind: Kind, name: str, room: Path, seconds: int) -> int:
    """In a process of its own: libFuzzer ends the one that it is in."""
    folder, corpus = room / "input" / "room", room / "corpus"
    kind.make(folder)
    corpus.mkdir()
    shutil.copy(folder / kind.file, corpus / "good")
    # what libraries keep for good is no input's
    kind.read(folder)

    def once(data: bytes) -> None:
        (folder / kind.file).write_bytes(data)
        hostile.judge(name, lambda: kind.read(folder), folder, data.hex())

    if not (child := os.fork()):
        flags = [f"-max_total_time={seconds}", "-max_len=20000", f"-artifact_prefix={name}-", "-verbosity=0"]
        atheris.Setup(["guided", *flags, "-print_final_stats=1", str(corpus)], once)
        atheris.Fuzz()
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
