"""From Hydra's composition to a checked `Config`.

In: what Hydra composed from conf/ and the command line. Out: a `Config`, checked before anything heavy is imported.
A misspelt key is refused by the schema, an impossible combination by refusals.py. Next: identity.py.
"""

from __future__ import annotations

from typing import Any

from omegaconf import OmegaConf

from adafuse.config import Config
from adafuse.refusals import validate


def register() -> None:
    """Make the schema and the `mul` resolver known to Hydra; called once by the entry script."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)
    OmegaConf.register_new_resolver("mul", lambda *xs: _product(xs), replace=True)


def _product(factors: tuple[float, ...]) -> float | int:
    result: float = 1
    for value in factors:
        result *= value
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
    return config
