"""Clean copies: one for all who need it, never of weights that have changed, and in host memory when asked."""

import pytest
import torch
from torch import nn

from adafuse import strategies
from adafuse.adapters.adapter import Adapter
from adafuse.config import StrategyName
from adafuse.model import clean
from adafuse.model.clean import clean_copy
from synthetic.configurations import GEOMETRY, compose


def test_who_asks_twice_gets_the_same_copy() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    first = clean_copy(weight)
    assert torch.equal(first, weight) and first.data_ptr() != weight.data_ptr()
    assert clean_copy(weight) is first


def test_a_weight_that_changed_is_copied_anew_and_the_old_copy_stays_as_it_was() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    before = clean_copy(weight)
    was = before.clone()
    weight.data.add_(1)
    assert torch.equal(clean_copy(weight), weight) and torch.equal(before, was)


def test_a_copy_goes_with_its_weight() -> None:
    weight = nn.Parameter(torch.randn(3, 4))
    clean_copy(weight)
    count = len(clean._COPIES)
    del weight
    assert len(clean._COPIES) == count - 1


def test_merging_arms_of_a_cell_share_their_copies(tiny_llama) -> None:
    model, config = tiny_llama(), compose(*GEOMETRY, "method=adafuse")
    kept = []
    for name in (StrategyName.switch, StrategyName.rebase):
        adapter = Adapter(model, config.method, config.experts, 0)
        strategy = strategies.make(name)
        strategy.prepare(adapter)
        kept.append([copy.data_ptr() for copy in strategy._clean.values()])
    assert kept[0] == kept[1]


@pytest.mark.gpu
def test_only_what_a_kernel_reads_stays_on_the_device() -> None:
    weight = nn.Parameter(torch.randn(3, 4, device="cuda"))
    with clean.kept_on_host():
        assert clean_copy(weight).device.type == "cpu"
        assert clean_copy(weight, read_by_kernels=True).is_cuda
    assert clean_copy(weight).is_cuda
