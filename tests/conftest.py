"""Shared by all tests: no network, one thread, every method, and backbones small enough to forget."""

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
os.environ.setdefault("WANDB_MODE", "disabled")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

# Triton reads this when a kernel is defined; on a GPU the kernels are compiled instead
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from adafuse.config import Config
from synthetic import interpreter
from synthetic.checkpoints import tiny_model
from synthetic.configurations import GEOMETRY, METHODS, compose
from synthetic.report import Made, maker

interpreter.quicken()
# what is collected more rarely costs less
gc.set_threshold(50_000, 20, 50)

SLOW = [
    *("test_stages", "test_config", "test_strategies", "test_trainer", "test_figures", "test_page"),
    *("test_kernel_task", "test_checks", "test_launcher", "test_measurements", "test_graph", "test_cell"),
    *("test_lean", "test_gather_launches", "test_report_latency", "test_accuracy", "test_run", "test_peft"),
    *("test_api", "test_api_docs", "test_distributed", "test_tracking", "test_lm_eval_command"),
    *("01_one_token", "02_results", "03_your_model"),
]
VARIANTS = [
    *([f"method={name}"] for name in METHODS),
    ["method=mola", "method.experts_by_quarter=[2,2,3,4]"],
    ["method=adafuse", "method.router_input=embedding"],
    ["method=adafuse", "method.router_input=block0_output"],
    ["method=adafuse", "method.first_expert_block=1"],
    ["method=adafuse", "method.router_input=block_output", "method.router_block=1", "experts.count=3"],
    ["method=adafuse", "method.router_input=embedding", "method.router_norm=true"],
    ["method=adafuse", "method.router_input=previous_token"],
    ["method=adafuse", "method.router_input=previous_and_embedding"],
    ["method=adafuse", "method.normalisation=softmax_topk_raw"],
    ["method=adafuse", "method.null_expert=true", "method.bypass_penalty=0.1"],
    ["method=adafuse", "experts.targets=[gate_proj,down_proj]"],
    ["method=adafuse", "method.blocks_per_decision=1"],
]


def pytest_collection_finish() -> None:
    """Hundreds of thousands of objects of libraries stay for good: no collection has to look at them again."""
    gc.collect()
    gc.freeze()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that need a GPU say so where there is none; slow files start first, so that no worker ends with one."""
    slow = {name: place for place, name in enumerate(SLOW)}
    items.sort(key=lambda item: slow.get(item.path.stem, len(slow)))
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(params=VARIANTS, ids=lambda overrides: ",".join(o.split("=", 1)[1] for o in overrides))
def variant(request: pytest.FixtureRequest) -> Config:
    """Every method, and every way in which one can be set that changes its forward."""
    return compose(*GEOMETRY, *request.param)


@pytest.fixture
def tiny_llama() -> Callable[..., object]:
    return tiny_model


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """A factory of records that are known: synthetic/report.py."""
    return maker(tmp_path)
