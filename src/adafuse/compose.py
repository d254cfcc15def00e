"""From Hydra's composition to a checked `Config`.

In: what Hydra composed from conf/ and the command line. Out: a `Config`, checked before anything heavy is imported.
A misspelt key is refused by the schema, an impossible combination by refusals.py. Next: cell.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adafuse.adapters import imports
from adafuse.adapters.geometry import at_equal_budget, trainable_parameters
from adafuse.cell import methods_of_arms
from adafuse.config import Budget, Config, Dtype, Experts, Method, Model
from adafuse.files import printable
from adafuse.membership import refuse_secrets
from adafuse.model.backbone import check_source, device
from adafuse.model.checkpoint import dtype_of
from adafuse.model.declared import OF_ARMS, check_declared
from adafuse.paths import ROOT
from adafuse.records import as_plain
from adafuse.refusals import validate
from adafuse.shape import shape_of

# a link to conf/method/ that an installed copy has too, and a copy of the tree without links has not
RECIPES = Path(__file__).parent / "recipes"
if not RECIPES.is_dir():
    RECIPES = Path(__file__).resolve().parents[2] / "conf" / "method"
WITHOUT_EXPERTS = ("base", "full")
T = TypeVar("T", Experts, Method)


def register() -> None:
    """Make the schema and the resolvers known to Hydra; called once by the entry script."""
    from hydra.core.config_store import ConfigStore

    ConfigStore.instance().store(name="schema", node=Config)
    _resolvers()


def composed(overrides: list[str]) -> Config:
    """The configuration of one job, by Hydra as any other. Raises ValueError, one line."""
    import hydra
    from hydra.errors import HydraException

    register()
    try:
        with hydra.initialize_config_dir(str(ROOT / "conf"), version_base="1.3"):
            return build(hydra.compose("config", overrides=overrides), overrides)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(printable(str(error).splitlines()[0])) from None


def _resolvers() -> None:
    OmegaConf.register_new_resolver("mul", _product, replace=True)
    OmegaConf.register_new_resolver("by_profile", by_profile, replace=True)
    OmegaConf.register_new_resolver("writable", writable, replace=True)


def by_profile(profile: str, values: Mapping[str, Any]) -> Any:
    """The value of a setting that is chosen by profile: `${by_profile:${profile},{cpu:3.0,gpu:1.0}}`.

    Raises ValueError for a profile without one.
    """
    if profile not in values:
        raise ValueError(f"profile={profile} has no value here: add it beside {', '.join(values)}")
    return values[profile]


def writable(folder: str) -> str:
    """`folder`, or where nothing can be written one that goes with this process: what is finished is read still."""
    path = Path(folder).absolute()
    there = next(one for one in (path, *path.parents) if one.exists())
    return folder if os.access(there, os.W_OK) else _elsewhere().name


@cache
def _elsewhere() -> TemporaryDirectory[str]:
    return TemporaryDirectory()


def _product(*factors: float) -> float | int:
    result = math.prod(factors)
    return int(result) if float(result).is_integer() else result


def recipe(name: str, experts: Experts, **changes: Any) -> Method:
    """The method of a file in conf/method/ for these experts, with some of its fields changed; checked.

    Raises ValueError for a name or a field that there is not, a value of another kind, and what cannot go together.
    """
    file = RECIPES / f"{name}.yaml"
    known = sorted(
        path.stem for path in RECIPES.glob("*.yaml") if path.is_file() and path.stem not in WITHOUT_EXPERTS
    )
    if name not in known:
        raise ValueError(f"method {name!r} is none of {known}")
    _resolvers()
    # of what a profile decides, the rate of learning alone, the caller says it
    context = {"profile": "real", "experts": as_plain(experts), "method": OmegaConf.load(file)}
    whole: Any = OmegaConf.to_container(OmegaConf.create(context), resolve=True)
    return typed(Method, {**whole["method"], "learning_rate_factor": 1.0, **changes})


def typed(kind: type[T], plain: Mapping[str, Any]) -> T:
    """A dataclass of config.py from plain values, enums by name. Raises ValueError, one line, for what it cannot be."""
    try:
        found: T = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(kind), dict(plain)))  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ValueError(printable(f"{kind.__name__.lower()}: {str(error).splitlines()[0]}")) from None
    return found


def build(composed: Any, overrides: list[str] | None = None) -> Config:
    """Turn Hydra's composition into a checked `Config`.

    The selected `method` stands in for its namesake among `methods`, so that one override holds in every task.
    Raises ValueError with what to do.
    """
    refuse_secrets(overrides or [])
    for override in overrides or []:
        if override.lstrip("+~").startswith("methods."):
            name = override.lstrip("+~").split(".")[1]
            raise ValueError(f"'{override}' is not a choice: use method={name} method.FIELD=VALUE")
    loras = _take_folders(composed, overrides or [])
    config: Config = OmegaConf.to_object(composed)  # type: ignore[assignment]
    # a file of this machine's own may have resolved one
    refuse_secrets(f"{key}={value}" for key, value in _texts(as_plain(config)))
    config.methods[config.method.name] = config.method
    _take_own_items(config, overrides or [])
    _settle_dtypes(config)
    validate(config)
    if loras:
        _refuse_misfits(config, loras)
    if config.budget is Budget.equal:
        _equalise(config)
    return config


def _texts(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every text in plain settings, and its dotted name."""
    if isinstance(value, str):
        yield key, value
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, inner in items:
        yield from _texts(inner, f"{key}.{name}" if key else str(name))


def _take_folders(composed: Any, overrides: list[str]) -> list[imports.Lora]:
    """Experts that are LoRA folders bring their own geometry, before anything is computed from it."""
    if not composed.experts.folders:
        if any(override.startswith("experts.folders=") for override in overrides):
            raise ValueError("experts.from=[] names no LoRA folder: name one or more, or leave it out")
        return []
    model: Model = OmegaConf.to_object(composed.model)  # type: ignore[assignment]
    model.path = None if model.path is None else str(Path(model.path).expanduser())
    check_source(model)
    shape = shape_of(model)
    if not shape:
        raise ValueError("experts.from needs the sizes of the backbone: add model.path=FOLDER")
    loras = [imports.inspect(Path(folder).expanduser(), shape) for folder in composed.experts.folders]
    imports.refuse_lacking(loras, composed.experts.missing_as_zeros)
    found = imports.geometry(loras, composed.experts.top_k)
    named = {override.partition("=")[0] for override in overrides}
    for key in ("targets", "rank", "count", "alpha", "folders"):
        said, theirs = composed.experts[key], getattr(found, key)
        if key != "folders" and f"experts.{key}" in named and said != theirs:
            raise ValueError(
                f"experts.{key}={said}, but the folders of experts.from make it {theirs}: leave it out"
            )
        OmegaConf.update(composed, f"experts.{key}", theirs, merge=False)
    return loras


def _refuse_misfits(config: Config, loras: list[imports.Lora]) -> None:
    """Raise ValueError where a method that is trained on these experts has no place for them."""
    if config.budget is Budget.equal:
        raise ValueError(
            "budget=equal gives each method ranks, and experts.from brings its own: use budget=published"
        )
    for method in methods_of_arms(config).values() if config.task in OF_ARMS else [config.method]:
        imports.refuse_misfits(loras, method, config.experts)


def _take_own_items(config: Config, overrides: list[str]) -> None:
    """The user's own items are all that is learnt and asked, as far as the command does not name families or tasks."""
    data, suite = config.data, config.suite
    if data.path is None:
        return
    from adafuse.data import rows  # pydantic takes a third of a second

    data.path = str(Path(data.path).expanduser())
    named = any(override.startswith("data.families=") for override in overrides)
    families = data.families if named else []
    if suite.tasks == data.families:
        suite.tasks = [*families, rows.task_of(data.path)]
    data.families = families


def _settle_dtypes(config: Config) -> None:
    """`auto` becomes what is computed in; without a folder it stays, and the backbone is refused."""
    model = config.model
    if model.path is not None:
        model.path = str(Path(model.path).expanduser())
    if model.dtype is Dtype.auto and model.path is not None:
        check_source(model)
        model.dtype = dtype_of(Path(model.path))
        if model.dtype is not Dtype.float32 and device(config) == "cpu":
            model.dtype = Dtype.float32
    if config.evaluate_dtype is Dtype.auto:
        config.evaluate_dtype = model.dtype
    if config.drift.dtype is Dtype.auto:
        config.drift.dtype = model.dtype


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
