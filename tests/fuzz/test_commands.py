"""What Hydra reads: overrides of the command line, and YAML files in conf/ that users write."""

import copy
from collections.abc import Callable
from pathlib import Path

import hydra
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.file_config_source import FileConfigSource
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from adafuse import cell
from adafuse.compose import build
from adafuse.model import backbone
from adafuse.model.declared import check_cell
from synthetic import hostile
from synthetic.configurations import CONF
from synthetic.scripts import script

RUN = script("run")
KEYS = [
    *("seed", "batch", "context", "device", "runs_dir", "task", "budget", "replicate", "profile", "tracker"),
    *(
        "model.path",
        "model.name",
        "model.seed",
        "model.dtype",
        "model.weights",
        "model.shape.hidden_size",
        "model.shape",
    ),
    *(
        "experts.rank",
        "experts.targets",
        "experts.top_k",
        "experts.alpha",
        "experts.count",
        "experts.folders",
    ),
    *(
        "method.rank",
        "method.name",
        "method.routing",
        "method.experts_by_quarter",
        "method.dropout",
        "+method.x",
    ),
    *(
        "data.path",
        "data.name",
        "data.families",
        "data.level",
        "data.train_items",
        "suite.tasks",
        "suite.path",
        "suite.name",
    ),
    *(
        "train.steps",
        "train.learning_rate",
        "latency.prompts",
        "latency.gates",
        "latency.bypass_share",
        "arms.run",
    ),
    *(
        "arms.table",
        "drift.switches",
        "kernel.ranks",
        "~seed",
        "+x",
        "++seed",
        "evaluate_strategy",
        "methods.lora.rank",
    ),
]


def refused_in_one_line(call: Callable[[], object]) -> None:
    """As scripts/run.py says it."""
    try:
        call()
    except RUN.REFUSED as error:
        raise ValueError(f"override: {RUN.one_line(error)}") from error


def built(composed: object, overrides: list[str], folder: Path) -> None:
    config = build(composed, overrides)
    RUN.refuse_added_keys(config)
    path, runs = cell.record_path(config), Path(config.runs_dir).resolve()
    assert path.resolve().is_relative_to(runs), f"{path} leads out of {runs}"
    backbone.check_source(config.model)
    check_cell(config)


def base() -> DictConfig:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        return hydra.compose("config", overrides=["profile=cpu"])


def test_overrides(room: Path) -> None:
    good, parser = base(), OverridesParser.create()
    odd = st.one_of(st.sampled_from(hostile.ODD), st.integers(), st.floats(), st.text(max_size=8))
    one = st.tuples(st.sampled_from(KEYS), odd).map(lambda pair: f"{pair[0]}={pair[1]!s:.300}")
    noise = st.text("abc.=,[]{}()'\"\\$:~+-0 \n#!", max_size=20)

    def once(overrides: list[str]) -> None:
        folder = hostile.fresh(room) / "room"
        folder.mkdir()

        def read() -> None:
            arguments = [RUN.whole_path(one) for one in overrides]
            parsed = parser.parse_overrides(arguments)
            if any(one.is_sweep_override() for one in parsed):
                return
            composed = copy.deepcopy(good)
            ConfigLoaderImpl._apply_overrides_to_config(parsed, composed)
            built(composed, arguments, folder)

        hostile.judge("overrides", lambda: refused_in_one_line(read), folder, overrides)

    hostile.every("overrides", st.lists(st.one_of(one, one, one, noise), min_size=1, max_size=3), once)


def test_yaml(room: Path) -> None:
    good = base()
    for group, name in (
        ("method", "adafuse"),
        ("experts", "default"),
        ("data", "mixture"),
        ("model", "tiny"),
    ):
        source = CONF / group / f"{name}.yaml"
        source = source if source.exists() else sorted((CONF / group).glob("*.yaml"))[0]
        (room / "good" / group).mkdir(parents=True)
        (room / "good" / group / "mine.yaml").write_bytes(source.read_bytes())

    def read(folder: Path) -> None:
        source = FileConfigSource("mine", f"file://{folder}")
        composed = copy.deepcopy(good)
        for group in ("method", "experts", "data", "model"):
            found = source.load_config(f"{group}/mine.yaml")
            composed = OmegaConf.merge(composed, OmegaConf.create({group: found.config}))
        built(composed, [], folder)

    # what is no file is found before Hydra composes (tests/test_files.py)
    one = lambda folder: refused_in_one_line(lambda: read(folder))  # noqa: E731
    hostile.attack("yaml", room / "good", one, room, places=False)
