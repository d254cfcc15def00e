"""Composed configurations: by the command-line overrides that a user would give, each composed once a process."""

import pickle
from functools import cache
from pathlib import Path

import hydra
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import ConfigRepository
from hydra.core.default_element import ResultDefault
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig

from adafuse import compose as schema
from adafuse.config import Config

ROOT = Path(__file__).resolve().parents[2]
CONF = ROOT / "conf"
METHODS = ["lora", "mola", "moral", "pesc", "mixlora", "adafuse", "adafuse_layerwise"]
GEOMETRY = ["experts.rank=4", "experts.count=4", "experts.top_k=2", "experts.alpha=8"]
_LOAD, _FILES = ConfigRepository.load_config, {}
_MERGE, _MERGED = ConfigLoaderImpl._compose_config_from_defaults_list, {}
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
    """A composition costs a third of a second; half of that is done once, and a copy of it costs next to nothing."""
    with pytest.MonkeyPatch.context() as patch, hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        patch.setattr(ConfigRepository, "load_config", _loaded)
        patch.setattr(ConfigLoaderImpl, "_compose_config_from_defaults_list", _merged)
        composed = hydra.compose("config", overrides=list(overrides))
    return pickle.dumps(schema.build(composed, list(overrides)))


def _loaded(repo: ConfigRepository, config_path: str) -> ConfigResult | None:
    """A file of conf/, read and parsed once; Hydra goes on to change what it gets."""
    if config_path not in _FILES:
        _FILES[config_path] = pickle.dumps(_LOAD(repo, config_path))
    return pickle.loads(_FILES[config_path])


def _merged(loader: ConfigLoaderImpl, defaults: list[ResultDefault], repo: ConfigRepository) -> DictConfig:
    """What the chosen files hold together, before single values are overridden."""
    chosen = str(defaults)
    if chosen not in _MERGED:
        _MERGED[chosen] = pickle.dumps(_MERGE(loader, defaults, repo))
    return pickle.loads(_MERGED[chosen])
