"""Checkpoint folders, whole and in shards: refused before anything heavy loads, or read without code of theirs."""

from pathlib import Path

from adafuse.config import Model
from adafuse.model import backbone
from adafuse.model.checkpoint import dtype_of
from synthetic import hostile
from synthetic.checkpoints import save, shard, tiny_model


def read(folder: Path) -> None:
    for kind in ("whole", "shards"):
        path = folder / kind
        model = Model(name="mine", path=str(path))
        backbone.check_source(model)
        dtype_of(path)
        if same(path, kind):
            continue
        backbone.from_folder(str(path), None, model)


GOOD: dict[str, dict[str, bytes]] = {}


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def same(folder: Path, kind: str) -> bool:
    """Nothing was done to this one: loading it tells nothing."""
    return contents(folder) == GOOD[kind]


def test_models(room: Path) -> None:
    for kind in ("whole", "shards"):
        folder = save(tiny_model(num_hidden_layers=1), room / "good" / kind)
        (folder / "modeling.py").write_text("raise SystemExit('code ran')\n")
    shard(room / "good/shards")
    GOOD.update({kind: contents(room / "good" / kind) for kind in ("whole", "shards")})
    hostile.attack("models", room / "good", read, room)
