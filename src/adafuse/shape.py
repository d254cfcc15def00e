"""The sizes of a backbone, known before it is loaded: they complete configurations, and are part of what a cell is.

In: a `Model`, or the sizes as a transformers config names them. Out: plain numbers; nothing heavy is imported.
Next: adapters/geometry.py.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from adafuse.config import LINEARS, Model


def shape_of(model: Model) -> dict[str, Any]:
    """A folder's own sizes (none if it is missing: backbone.check_source says so), or the configuration's."""
    if model.path is None:
        return model.shape
    file = Path(model.path) / "config.json"
    shape: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {}
    return shape


def widths(shape: dict[str, Any]) -> dict[str, tuple[int, int]]:
    """(in, out) of the seven linears of one block."""
    hidden, inner, heads = shape["hidden_size"], shape["intermediate_size"], shape["num_attention_heads"]
    head = shape.get("head_dim") or hidden // heads
    keys = (shape.get("num_key_value_heads") or heads) * head
    ins = (hidden, hidden, hidden, heads * head, hidden, hidden, inner)
    outs = (heads * head, keys, keys, hidden, inner, inner, hidden)
    return {name: (i, o) for name, i, o in zip(LINEARS, ins, outs, strict=True)}
