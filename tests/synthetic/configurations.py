"""Composed configurations: by the command-line overrides that a user would give, each composed once a process."""

import pickle
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository, IConfigRepository
from hydra._internal.defaults_list import Overrides
from hydra.core.default_element import InputDefault, ResultDefault
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

from adafuse import compose as schema
from adafuse.config import Config

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
METHODS = ["lora", "mola", "moral", "pesc", "mixlora", "adafuse", "adafuse_layerwise"]
GEOMETRY = ["experts.rank=4", "experts.count=4", "experts.top_k=2", "experts.alpha=8"]
_LOAD, _MERGE = ConfigRepository.load_config, ConfigLoaderImpl._compose_config_from_defaults_list
_CHOICES = defaults_list._create_interpolation_map
_KEPT: dict[tuple[str, str], bytes] = {}
schema.register()


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
    with read_once(), hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        composed = hydra.compose("config", overrides=list(overrides))
    return pickle.dumps(schema.build(composed, list(overrides)))


@contextmanager
def read_once() -> Iterator[None]:
    """Two thirds of a composition's third of a second are for what others read and merged before it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ConfigRepository, "load_config", _loaded)
        patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", _merged)
        patch.setattr(defaults_list, "_create_interpolation_map", _choices)
        yield


def _loaded(repo: ConfigRepository, config_path: str) -> ConfigResult | None:
    """A parsed file; Hydra goes on to change what it gets."""
    return _kept(lambda: _LOAD(repo, config_path), repo, config_path)


def _merged(loader: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> DictConfig:
    """What the chosen files hold together, before single values are overridden."""
    return _kept(lambda: _MERGE(loader, defaults, repo), repo, str(defaults))


def _choices(overrides: Overrides, entries: list[InputDefault], self_added: bool) -> DictConfig:
    """What an interpolation among a file's defaults may name; few files have one."""
    needed = any(entry.is_interpolation() for entry in entries if not entry.is_self())
    return _CHOICES(overrides, entries, self_added) if needed else DictConfig({})


def _kept(make: Callable[[], Any], repo: IConfigRepository, name: str) -> Any:
    folders = str([source.path for source in repo.get_sources()])
    if (folders, name) not in _KEPT:
        _KEPT[folders, name] = pickle.dumps(make())
    return pickle.loads(_KEPT[folders, name])
