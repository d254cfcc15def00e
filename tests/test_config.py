"""config.py, refusals.py and conf/: every experiment composes in every profile, and what is misspelt is refused."""

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hydra
import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import ConfigCompositionException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from adafuse import compose as schema
from adafuse.config import Config, Task, Weights
from adafuse.evaluation.suites import check_suite
from synthetic.configurations import CONF, ROOT, compose, options

EXPERIMENTS, PROFILES = options("experiment"), options("profile")


def compose_from(folder: Path, *overrides: str) -> Config:
    schema.register()
    with hydra.initialize_config_dir(str(folder), version_base="1.3"):
        return schema.build(hydra.compose("config", overrides=list(overrides)), list(overrides))


@pytest.fixture
def conf(tmp_path: Path) -> Path:
    """A copy of conf/ that a test may spoil."""
    return Path(shutil.copytree(CONF, tmp_path / "conf"))


def swept(name: str) -> dict[str, str]:
    """What an experiment sweeps, by itself or (conf/sweep) as it does on generated families."""
    content = yaml.safe_load((CONF / f"experiment/{name}.yaml").read_text())
    chosen = [value for line in content["defaults"] for key, value in line.items() if "/sweep@" in key]
    if chosen:
        own = re.search(r"cpu:(\w+)", chosen[0])[1]
        return yaml.safe_load((CONF / f"sweep/{own}.yaml").read_text())
    return content["hydra"]["sweeper"]["params"]


def jobs(name: str) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Jobs of an experiment with every profile and every swept value in at least one, not in every combination.

    Of seeds and replicates the first and the last.
    """
    columns = []
    for key, values in swept(name).items():
        sweep = OverridesParser.create().parse_override(f"{key}={values}").sweep_string_iterator()
        found = [f"{key}={value}" for value in sweep]
        columns.append(found if key not in ("seed", "replicate") else [found[0], found[-1]])
    for row in range(max(len(PROFILES), *map(len, columns))):
        job = tuple(column[min(row, len(column) - 1)] for column in columns)
        yield PROFILES[row % len(PROFILES)], job


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_every_experiment_composes_in_every_profile_and_every_swept_value_is_valid(experiment: str) -> None:
    # its folder is the user's, and none is named here
    nowhere = ["model.path=null"] if experiment == "own_model" else []
    for profile, job in jobs(experiment):
        config = compose(f"experiment={experiment}", f"profile={profile}", *job, *nowhere)
        assert config.profile == profile
        check_suite(config.suite, config.data)


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_experiments_say_what_they_are_for_and_how_long_they_take(experiment: str) -> None:
    lines = (CONF / f"experiment/{experiment}.yaml").read_text().splitlines()
    assert lines[0] == "# @package _global_"
    header = " ".join(line for line in lines if line.startswith("#"))
    assert re.search(r"(minute|nothing more)", header)


def test_timed_experiments_run_each_replicate_in_its_own_process() -> None:
    for experiment in EXPERIMENTS:
        content = yaml.safe_load((CONF / f"experiment/{experiment}.yaml").read_text())
        if content.get("task") in ("latency", "layer"):
            assert {"override /hydra/launcher": "isolated"} in content["defaults"], experiment
            # outermost, so that an interrupted night leaves whole replicates
            assert next(iter(content["hydra"]["sweeper"]["params"].items())) in (
                ("replicate", "range(3)"),
                ("replicate", "range(5)"),
            ), experiment


def test_the_paper_has_an_experiment_for_every_table_and_figure() -> None:
    named = re.findall(r"experiment: (\w+)", (ROOT / "results/paper_tables.yaml").read_text())
    assert set(named) == {*(f"table{i}" for i in range(1, 7)), "figure1", "figure2"} <= set(EXPERIMENTS)


# models and arms: test_options.py composes all of them and looks at what they hold
@pytest.mark.parametrize("group", ["experts", "method", "data", "suite", "tracker"])
def test_every_option_composes(group: str) -> None:
    for option in options(group):
        # no generated families, which the usual suite asks for
        own = ["suite=paper"] if option == "pesc" and group == "data" else []
        compose(f"{group}={option}", *own)


def test_every_set_of_arms_is_used() -> None:
    text = "".join(path.read_text() for path in (CONF / "experiment").glob("*.yaml"))
    chosen = set(re.findall(r"override /arms: (\w+)$", text, re.MULTILINE))
    chosen |= set(
        re.findall(r"\w+:(\w+)", " ".join(re.findall(r"override /arms: (\$.*)$", text, re.MULTILINE)))
    )
    assert set(options("arms")) - chosen == {"all"}


@pytest.mark.parametrize("group", ["model", "experts", "arms", "data", "suite"])
def test_no_file_only_points_to_another(group: str) -> None:
    """What is chosen by profile is chosen where it is used; a thing is called as its file is."""
    assert not [path for path in (CONF / group).iterdir() if path.is_dir()]
    for path in (CONF / group).glob("*.yaml"):
        held = yaml.safe_load(path.read_text())
        assert held.keys() - {"defaults"}, path
        assert held.get("name", "unnamed") == ("unnamed" if group == "experts" else path.stem)


def test_an_experiment_wins_over_a_profile_and_the_command_line_over_both() -> None:
    assert compose("profile=gpu").model.name == "llama2_7b"
    assert compose("profile=gpu", "experiment=table2").model.name == "small"
    assert compose("profile=gpu", "experiment=table2", "model=tiny").model.name == "tiny"
    assert compose("experiment=table2", "profile=gpu").model.name == "small", (
        "the order of overrides does not matter"
    )
    assert not compose("profile=cpu").latency.trained_adapters
    assert compose("profile=cpu", "experiment=smoke").latency.trained_adapters
    assert not compose("experiment=smoke", "latency.trained_adapters=false").latency.trained_adapters


def test_the_settings_of_this_machine_win_over_experiments(conf: Path) -> None:
    (conf / "local").mkdir(exist_ok=True)
    (conf / "local/default.yaml").write_text(
        "# @package _global_\nlatency: {rounds: 5, trained_adapters: true}\n"
    )
    local = compose_from(conf, "experiment=module_scan")
    assert (local.latency.rounds, local.latency.trained_adapters) == (5, True)
    assert compose_from(conf, "latency.rounds=6").latency.rounds == 6


@pytest.mark.parametrize(("profile", "model"), [("cpu", "tiny"), ("gpu", "small"), ("paper", "llama2_7b")])
def test_accuracy_is_asked_of_a_backbone_that_has_some(profile: str, model: str) -> None:
    chosen = compose("experiment=table2", f"profile={profile}").model
    assert chosen.name == model
    assert chosen.weights is not Weights.random
    mistral = compose("experiment=table4", f"profile={profile}").model
    assert mistral.shape["model_type"] == "mistral"
    assert mistral.weights is not Weights.random


MISSPELT = [
    "train.stepz=1",
    "modle.path=x",
    "trackr=off",
    "model.weights=hubb",
    "method.routing=tokens",
    "method.expert_kind=adapter",
    "evaluate_strategy=magic",
    "task=bench",
    "train.steps=many",
    "layer.ranks=4",
    "latency.trained_adapters=perhaps",
    "arms.table.base.runtime=magic",
]


@pytest.mark.parametrize("override", MISSPELT)
def test_a_misspelt_key_or_value_is_refused(override: str) -> None:
    with pytest.raises((ConfigCompositionException, OmegaConfBaseException)):
        compose(override)


@pytest.mark.parametrize(
    "group", ["model", "experts", "method", "arms", "data", "suite", "profile", "experiment", "tracker"]
)
def test_an_unknown_option_is_refused(group: str) -> None:
    with pytest.raises(ConfigCompositionException, match="Could not find"):
        compose(f"{group}=nonesuch")


@pytest.mark.parametrize("group", ["model", "experts", "method", "arms", "data", "suite", "profile"])
def test_a_misspelt_key_in_a_file_is_refused(group: str, conf: Path) -> None:
    first = (conf / group / options(group)[0]).with_suffix(".yaml")
    (conf / group / "spoilt.yaml").write_text(first.read_text() + "\nnonesuch: 1\n")
    with pytest.raises(ConfigCompositionException, match="nonesuch"):
        compose_from(conf, f"{group}=spoilt")


IMPOSSIBLE = [
    ("arms.run=[base,nope]", "unknown arm 'nope'"),
    ("arms.run=[base,base]", "twice"),
    ("arms.run=[]", "arms.run is empty"),
    ("runs_dir=", "runs_dir is empty: name a folder"),
    ("arms.table.base.method=nope", "unknown method 'nope'"),
    ("task=latency arms.table.base_again.method=pesc arms.table.base_again.strategy=switch", "not linear"),
    ("method=pesc evaluate_strategy=switch", "not linear"),
    ("method=mixlora evaluate_strategy=simple_merge", "not linear"),
    ("method=mola evaluate_strategy=rebase", "layer by layer"),
    ("method=adafuse_layerwise evaluate_strategy=switch", "layer by layer"),
    ("experts.targets=[query]", "experts.targets"),
    ("experts.targets=[]", "experts.targets is empty"),
    ("experts.top_k=9", "exceeds"),
    ("experts.rank=0", "experts.rank"),
    ("method=mola method.experts_by_quarter=[2,4,6]", "four numbers"),
    ("method=mola method.experts_by_quarter=[1,4,6,8]", "fewer than"),
    ("method=adafuse method.experts_by_quarter=[2,4,6,8]", "layerwise"),
    ("method=pesc method.routing=token", "blockwise"),
    ("method=adafuse method.routing=blockwise", "blockwise"),
    ("method=mola method.null_expert=true", "leaves a whole token"),
    ("method=mola method.router_norm=true", "use method=adafuse"),
    ("method=adafuse method.null_expert=true method.normalisation=softmax_topk_raw", "softmax_topk_renorm"),
    ("method=adafuse method.bypass_penalty=0.1", "null_expert=true"),
    ("method=lora method.full=true", "expert_targets must be"),
    ("method=mola method.blocks_per_decision=2", "gates that linears share"),
    (
        "method=adafuse method.blocks_per_decision=2 method.router_input=embedding",
        "router_input=first_linear",
    ),
    ("method=adafuse method.blocks_per_decision=2 method.null_expert=true", "blocks_per_decision=0"),
    ("method=adafuse method.blocks_per_decision=-1", "at least 0"),
    ("method=adafuse method.router_block=2", "goes with router_input=block_output"),
    ("method=adafuse method.router_input=block_output", "router_block, from 1 on"),
    (
        "method=adafuse method.router_input=previous_token method.static_targets=[q_proj]",
        "use static_targets=[]",
    ),
    ("method=adafuse method.blocks_per_decision=1 evaluate_strategy=switch", "later blocks decide later"),
    ("method=adafuse evaluate_restore=false", "evaluate_strategy=switch"),
    ("data.level=4", "data.level"),
    ("method=pesc method.first_expert_block=1", "first_expert_block"),
    ("method=pesc method.bottleneck_dim=0", "bottleneck_dim"),
    ("method=moral method.expert_targets=[mlp]", "expert_targets"),
    ("methods.mola.rank=3", "method=mola method.FIELD=VALUE"),
    ("batch=0", "batch"),
    ("train.steps=0", "train.steps"),
    ("latency.rounds=1", "latency.rounds"),
    ("latency.check_tokens=3", "latency.check_tokens"),
    ("latency.block_tokens=8", "latency.block_tokens"),
    ("data.families=[]", "data.families"),
    ("suite.tasks=[]", "suite.tasks"),
    ("device=tpu", "device"),
]


@pytest.mark.parametrize(("overrides", "message"), IMPOSSIBLE, ids=[overrides for overrides, _ in IMPOSSIBLE])
def test_an_impossible_combination_is_refused_in_one_line(overrides: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        compose(*overrides.split())
    assert "\n" not in str(caught.value)


def test_one_override_of_the_method_holds_for_its_arms_too() -> None:
    config = compose("method=mola", "method.dropout=0.3")
    assert config.methods["mola"].dropout == 0.3
    assert config.methods["adafuse"].dropout == compose("method=adafuse").method.dropout


@pytest.mark.parametrize(
    ("factors", "product"), [((8, 4), 32), ((2, 8, 4), 64), ((0.5, 3), 1.5), ((0.5, 4), 2)], ids=str
)
def test_mul(factors: tuple[float, ...], product: float) -> None:
    schema.register()
    value: Any = OmegaConf.create({"x": f"${{mul:{','.join(map(str, factors))}}}"}).x
    assert value == product and type(value) is type(product)


def test_defaults_are_the_cpu_profile_and_need_no_network() -> None:
    config = compose()
    assert (config.profile, config.tracker, config.task) == ("cpu", "off", Task.evaluate)
    assert config.model.weights is Weights.scratch and not config.suite.bundled
