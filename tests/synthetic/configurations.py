"""Composed configurations: by the command-line overrides that a user would give, each composed once a process."""

import pickle
from copy import deepcopy
from functools import cache
from pathlib import Path

import hydra
import pytest
from hydra._internal.core_plugins.file_config_source import FileConfigSource

from adafuse import compose as schema
from adafuse.config import Config

_READ = FileConfigSource.load_config
ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
METHODS = ["lora", "mola", "moral", "pesc", "mixlora", "adafuse", "adafuse_layerwise"]
GEOMETRY = ["experts.rank=4", "experts.count=4", "experts.top_k=2", "experts.alpha=8"]


def options(group: str) -> list[str]:
    """The names of a group's files in conf/."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))


def compose(*overrides: str) -> Config:
    """The checked configuration of these command-line overrides, the caller's own to change."""
    if any(override.startswith(("model.path=", "data.path=")) for override in overrides):
        # it depends on what a folder holds now
        return pickle.loads(_composed.__wrapped__(overrides))
    return pickle.loads(_composed(overrides))


@cache
def _composed(overrides: tuple[str, ...]) -> bytes:
    """A composition costs half a second, a copy of it a thousandth of that."""
    schema.register()
    with pytest.MonkeyPatch.context() as patch, hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        # a third of a composition is reading the same files again
        patch.setattr(
            FileConfigSource, "load_config", lambda source, name: deepcopy(_file(source.path, name))
        )
        composed = hydra.compose("config", overrides=list(overrides))
    return pickle.dumps(schema.build(composed, list(overrides)))


@cache
def _file(folder: str, name: str) -> object:
    return _READ(FileConfigSource("main", f"file://{folder}"), name)
