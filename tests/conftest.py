"""Shared by all tests: no network, one thread, composed configurations, and backbones small enough to forget."""

import gc
import os
import pickle

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import hydra
import pytest
import torch
from hydra._internal.core_plugins.file_config_source import FileConfigSource

# Triton reads this when a kernel is defined; on a GPU the kernels are compiled instead
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from adafuse import compose as schema
from adafuse.config import Config
from synthetic_report import Made, maker

# hundreds of thousands of objects of torch stay for good: no collection has to look at them again
gc.collect()
gc.freeze()
gc.set_threshold(50_000, 20, 50)

_READ = FileConfigSource.load_config
ROOT = Path(__file__).resolve().parents[1]
CONF = ROOT / "conf"
METHODS = ["lora", "mola", "moral", "pesc", "mixlora", "adafuse", "adafuse_layerwise"]
SLOW = [
    *("test_stages", "test_kernel_task", "test_config", "test_strategies", "test_run", "test_fused"),
    *("test_launcher", "test_kernels_without_gates", "test_gate_table", "test_gather", "test_latency"),
    *("test_cell", "test_trace", "test_trainer", "test_graph"),
]
VARIANTS = [
    *([f"method={name}"] for name in METHODS),
    ["method=mola", "method.experts_by_quarter=[2,2,3,4]"],
    ["method=adafuse", "method.router_input=embedding"],
    ["method=adafuse", "method.router_input=block0_output"],
    ["method=adafuse", "method.first_expert_block=1"],
    ["method=adafuse", "method.router_input=embedding", "method.router_norm=true"],
    ["method=adafuse", "method.normalisation=softmax_topk_raw"],
    ["method=adafuse", "method.null_expert=true", "method.bypass_penalty=0.1"],
    ["method=adafuse", "experts.targets=[gate_proj,down_proj]"],
]
GEOMETRY = ["experts.rank=4", "experts.count=4", "experts.top_k=2", "experts.alpha=8"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say so where there is none; slow files start first, so that no worker ends with one."""
    slow = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: slow.get(item.path.stem, len(slow)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


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


@pytest.fixture(params=VARIANTS, ids=lambda overrides: ",".join(o.split("=", 1)[1] for o in overrides))
def variant(request: pytest.FixtureRequest) -> Config:
    """Every method, and every way in which one can be set that changes its forward."""
    return compose(*GEOMETRY, *request.param)


@pytest.fixture
def tiny_llama() -> Callable[..., object]:
    """A maker of seeded random models: 4 blocks, hidden 32, grouped-query attention."""

    def make(model_type: str = "llama", **changes: object) -> object:
        from transformers import AutoConfig, AutoModelForCausalLM

        shape = {
            "vocab_size": 260,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 256,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            # logits far enough apart that greedy decoding is decided
            "initializer_range": 0.1,
        }
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **(shape | changes)))
        return model.eval().requires_grad_(False)

    return make


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A factory of records that are known: synthetic_report.py."""
    return maker(tmp_path)
