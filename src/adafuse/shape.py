"""The sizes of a backbone, known before it is loaded: they complete configurations, and are part of what a cell is.

In: a `Model`, or the sizes as a transformers config names them. Out: plain numbers; nothing heavy is imported.
Next: adapters/geometry.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from adafuse.config import LINEARS, Model

# of a tensor or a field; theirs have a hundred characters at most
LONGEST_NAME = 300


def shape_of(model: Model) -> dict[str, Any]:
    """A folder's own sizes (none if it is missing: backbone.check_source says so), or the configuration's."""
    if model.path is None:
        return model.shape
    file = Path(model.path) / "config.json"
    return read_json(file) if file.is_file() else {}


def read_json(file: Path) -> dict[str, Any]:
    """The object in a file of a checkpoint. Raises ValueError, one line that names it, for anything else."""
    if file.exists() and not file.is_file():
        raise ValueError(f"{file} is not a regular file: copy the checkpoint again")
    data = file.read_bytes()
    if data.startswith(b"version https://git-lfs"):
        raise ValueError(f"{file} is a Git LFS pointer, not the file: run git lfs pull, or download it whole")
    try:
        # as transformers reads it: in no other encoding, without a byte order mark
        found = json.loads(data.decode())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}): copy the checkpoint again") from None
    if not isinstance(found, dict):
        raise ValueError(f"{file} is not a JSON object: copy the checkpoint again")
    refuse_unshown(found, file)
    return found


def refuse_unshown(names: Iterable[str], file: Path) -> None:
    """Names stand in messages of one line: none may break it, move a terminal's cursor or fill the screen."""
    for name in names:
        if not name.isprintable() or len(name) > LONGEST_NAME:
            raise ValueError(f"{file} is damaged: it holds the name {ascii(name)[:80]}: copy it again")


def widths(shape: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of the seven linears of one block."""
    hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    head = shape.get("head_dim") or hidden // heads
    keys = (shape.get("num_key_value_heads") or heads) * head
    ins = (hidden, hidden, hidden, heads * head, hidden, hidden, inner)
    outs = (heads * head, keys, keys, hidden, inner, inner, hidden)
    return {name: (i, o) for name, i, o in zip(LINEARS, ins, outs, strict=True)}
