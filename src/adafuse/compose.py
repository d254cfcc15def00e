"""From Hydra's composition to a checked `Config`.

In: what Hydra composed from conf/ and the command line. Out: a `Config`, checked before anything heavy is imported.
A misspelt key is refused by the schema, an impossible combination by refusals.py. Next: cell.py.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf

from adafuse.adapters.geometry import at_equal_budget, trainable_parameters
from adafuse.config import Budget, Config
from adafuse.model.declared import check_declared
from adafuse.refusals import validate
from adafuse.shape import shape_of


def register() -> None:
    """Make the schema and the resolvers known to Hydra; called once by the entry script."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("mul", _product, replace=True)
    OmegaConf.register_new_resolver("by_profile", by_profile, replace=True)


def by_profile(profile: str, values: Mapping[str, Any]) -> Any:
    """The value of a setting that is chosen by profile: `${by_profile:${profile},{cpu:3.0,gpu:1.0}}`.

    Raises ValueError for a profile without one.
    """
    if profile not in values:
        raise ValueError(f"profile={profile} has no value here: add it beside {', '.join(values)}")
    return values[profile]


def _product(*factors: float) -> float | int:
    result = math.prod(factors)
    return int(result) if float(result).is_integer() else result


def build(composed: Any, overrides: list[str] | None = None) -> Config:
    """Turn Hydra's composition into a checked `Config`.

    The selected `method` stands in for its namesake among `methods`, so that one override holds in every task.
    Raises ValueError with what to do.
    """
    for override in overrides or []:
        if override.lstrip("+~").startswith("methods."):
            name = override.lstrip("+~").split(".")[1]
            raise ValueError(f"'{override}' is not a choice: use method={name} method.FIELD=VALUE")
    config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    config.methods[config.method.name] = config.method
    validate(config)
    if config.budget is Budget.equal:
        _equalise(config)
    return config


def _equalise(config: Config) -> None:
    """Give every method the ranks at which it trains as many parameters as plain LoRA does."""
    shape = shape_of(config.model)
    if not shape:
        # a folder that is missing: the stage says so
        return
    if config.model.path is not None:
        check_declared(shape, f"{config.model.path}/config.json")
    budget = trainable_parameters(config.methods["lora"], config.experts, shape)
    config.methods = {
        name: at_equal_budget(method, config.experts, shape, budget)
        for name, method in config.methods.items()
    }
    config.method = config.methods[config.method.name]
