"""A run that wandb has written offline, read back: wandb's own messages, in the LevelDB log that its sync reads.

The pinned wandb has a reader in its Go part alone; what is here is the framing of the file.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

# a file begins with its magic, then come blocks of chunks: checksum, length, type (1 whole, 2 first, 3 middle, 4 last)
MAGIC, BLOCK, HEAD = 7, 32768, struct.Struct("<IHB")


@dataclass
class Offline:
    run: Any
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    artifacts: dict[str, list[str]] = field(default_factory=dict)
    # all that is sent: every message as text, but for where files lie that sync is to read
    text: str = ""


def read(folder: Path) -> Offline:
    """What `wandb sync` would send of the run in this folder."""
    (file,) = folder.glob("*.wandb")
    found = Offline(None)
    for message in messages(file.read_bytes()):
        kind = message.WhichOneof("record_type")
        if kind == "run":
            found.run = message.run
            found.config |= _items(message.run.config.update)
        elif kind == "config":
            found.config |= _items(message.config.update)
        elif kind == "summary":
            found.summary |= _items(message.summary.update)
        elif kind == "history":
            found.history.append(_items(message.history.item))
        elif kind == "artifact" or (kind == "request" and message.request.HasField("log_artifact")):
            one = message.artifact if kind == "artifact" else message.request.log_artifact.artifact
            found.artifacts.setdefault(one.type, []).extend(entry.path for entry in one.manifest.contents)
            for entry in one.manifest.contents:
                entry.local_path = ""
        found.text += str(message)
    return found


def messages(data: bytes) -> Iterator[Any]:
    at, body = MAGIC, b""
    while at + HEAD.size <= len(data):
        if BLOCK - at % BLOCK < HEAD.size:
            at += BLOCK - at % BLOCK
            continue
        _, length, kind = HEAD.unpack_from(data, at)
        body += data[at + HEAD.size : at + HEAD.size + length]
        at += HEAD.size + length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(body)
            body = b""


def _items(items: Any) -> dict[str, Any]:
    return {
        item.key or "/".join(getattr(item, "nested_key", ())): json.loads(item.value_json) for item in items
    }
