"""What the files of conf/ hold: methods as they were published, arms with their backbones, models that are known."""

import dataclasses
import re

import pytest
import yaml

from adafuse.config import ExpertKind, Method, Model, Routing, Runtime, StrategyName
from synthetic.configurations import CONF, METHODS, compose, options


@pytest.mark.parametrize("method", options("method"))
def test_a_method_holds_what_differs_from_the_defaults_and_each_value_names_its_source(method: str) -> None:
    assert options("method") == sorted(["base", "full", *METHODS])
    path = CONF / f"method/{method}.yaml"
    defaults = {field.name: field.default for field in dataclasses.fields(Method)}
    held = yaml.safe_load(path.read_text())
    assert held["name"] == method and held.keys() <= defaults.keys()
    assert not [key for key, value in held.items() if value == defaults[key]]
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) == len(held)
    for line in lines:
        assert re.search(r"  # .*(paper|repository|ours)", line), line


def test_methods_are_what_was_published() -> None:
    """Numbers of the recipes, at the geometry for which they were printed (rank 16, 8 experts)."""
    methods = compose("experts=all_r16").methods
    pesc, mixlora = methods["pesc"], methods["mixlora"]
    assert (pesc.bottleneck_dim, pesc.static_rank, pesc.static_alpha, pesc.dropout) == (64, 64, 16.0, 0.1)
    assert len(pesc.static_targets) == 7 and pesc.expert_kind is ExpertKind.bottleneck
    assert (mixlora.static_rank, mixlora.static_alpha, mixlora.dropout) == (16, 32.0, 0.05)
    assert mixlora.static_targets == ["q_proj", "k_proj", "v_proj", "o_proj"]
    lora = compose("experts=all_r16", "experts.rank=8", "experts.alpha=16").methods["lora"]
    assert (lora.rank, lora.count, lora.alpha) == (64, 1, 128.0), (
        "equal trainable parameters, as in MoLA's table"
    )
    assert methods["moral"].expert_targets == ["gate_proj", "up_proj", "down_proj"]
    routings = {name: method.routing for name, method in methods.items()}
    assert routings["adafuse"] is Routing.token
    assert {routings[name] for name in ("mola", "moral", "adafuse_layerwise")} == {Routing.layerwise}
    assert {routings[name] for name in ("pesc", "mixlora")} == {Routing.blockwise}
    assert {routings[name] for name in ("base", "full", "lora")} == {Routing.none}
    assert [name for name, method in methods.items() if not method.is_trained] == ["base"]


def test_the_layerwise_twin_differs_from_adafuse_in_its_routing_only() -> None:
    methods = compose().methods
    twin = dataclasses.replace(methods["adafuse_layerwise"], name="adafuse", routing=Routing.token)
    assert twin == methods["adafuse"]


def test_arms() -> None:
    arms = compose("arms=all").arms
    labels = [arm.label for arm in arms.table.values()]
    assert len(set(labels)) == len(labels) and arms.run == list(dict.fromkeys(arms.run))
    assert {arm.method for arm in arms.table.values()} == {"base", *METHODS}
    assert {arm.strategy for arm in arms.table.values()} == set(StrategyName)
    assert {arm.runtime for arm in arms.table.values()} == set(Runtime)
    for name in options("arms"):
        chosen = compose(f"arms={name}").arms
        for runtime in {chosen.table[arm].runtime for arm in chosen.run}:
            base = "base" if runtime is Runtime.eager else f"base_{runtime.name}"
            assert {base, f"{base}_again"} <= set(chosen.run), (
                "a backbone and an A/A arm for every runtime in a set"
            )


def test_merging_arms_are_not_run_in_batches() -> None:
    config = compose("experiment=batch_scan")
    strategies = {config.arms.table[name].strategy for name in config.arms.run if name != "lora_dense"}
    assert strategies <= {StrategyName.loop, StrategyName.dense, StrategyName.gather}


@pytest.mark.parametrize("name", options("model"))
def test_a_model_names_only_sizes_that_transformers_knows(name: str) -> None:
    from transformers import AutoConfig

    shape = dict(compose(f"model={name}").model.shape)
    if not shape:
        pytest.skip("a folder's own config.json says its sizes")
    known = AutoConfig.for_model(shape.pop("model_type"))
    unknown = [key for key in shape if not hasattr(known, key) and key != "rope_theta"]
    assert unknown == []


def test_hub_backbones_are_pinned() -> None:
    models: list[Model] = [compose(f"model={name}").model for name in options("model")]
    for model in models:
        assert (model.hub_id is None) == (model.revision is None)
        assert model.revision is None or re.fullmatch(r"[0-9a-f]{40}", model.revision)
