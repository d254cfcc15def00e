"""The two arms that run PEFT's own modules, and ways to decode with them: shared by the tests of engine/peft.py."""

import pytest
import torch
from peft.tuners.lora import Linear, LoraLayer
from torch import nn

from adafuse.adapters import reference
from adafuse.adapters.adapter import Adapter
from adafuse.bench.checks import Check, run_checks
from adafuse.config import Runtime, StrategyName
from adafuse.engine.decoders import Decoder
from adafuse.engine.make import make
from synthetic import adapters
from synthetic.adapters import prompt
from synthetic.configurations import GEOMETRY, compose

LORA = (StrategyName.peft, ["method=lora"])
ADAFUSE = (StrategyName.peft_merge, ["method=adafuse"])
Arm = tuple[StrategyName, list[str]]
DTYPES = (torch.float32, torch.bfloat16)
BOTH = pytest.mark.parametrize("arm", [LORA, ADAFUSE], ids=lambda arm: arm[0].name)
IN_DTYPES = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def adapted(model, arm: Arm) -> Adapter:
    """Experts in the backbone's dtype, as a timed arm has them."""
    return adapters.adapted(model, compose(*GEOMETRY, *arm[1])).to_dtype(model.dtype)


def decoder_of(adapter: Adapter, arm: Arm) -> Decoder:
    return make(adapter.model, adapter, arm[0], Runtime.eager, length=64)


def checks_of(adapter: Adapter, arm: Arm, ids: torch.Tensor) -> list[Check]:
    oracle = reference.float_view(adapter.model)
    return run_checks(decoder_of(adapter, arm), oracle, ids, tokens=16).checks


def decode(decoder: Decoder, tokens: int = 16) -> torch.Tensor:
    with decoder.installed():
        decoder.start(prompt())
        with decoder.decoding():
            return decoder.run(tokens)


def layers_of(model: nn.Module) -> dict[str, Linear]:
    return {path: module for path, module in model.named_modules() if isinstance(module, LoraLayer)}
