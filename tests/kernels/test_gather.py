"""shrink and the expands against naive.py: odd sizes, views, poisoned outputs, and what must not agree."""

from __future__ import annotations

import pytest
import torch

from adafuse.kernels import gather, naive
from adafuse.kernels.config import FEW_TOKENS, ExpandConfig, ShrinkConfig
from synthetic.gather import (
    FEW,
    MANY,
    SCALING,
    TYPES,
    Case,
    _poison,  # noqa: F401  # autouse
    close,
    expanded,
    expanded_all,
    expanded_routed,
)


@pytest.mark.parametrize("device,dtype", TYPES)
@pytest.mark.parametrize("sizes", [s.values for s in FEW], ids=[s.id for s in FEW])
def test_shrink(sizes, device, dtype):
    case = Case(*sizes, device, dtype)
    h = gather.shrink(case.x, case.lora_A, case.index, config=ShrinkConfig(16, 64, 2, 4))
    size = naive.shrink(case.x.abs(), case.lora_A.abs(), case.index)[0]
    assert h.shape == (-(-sizes[4] // 128), *case.index.shape, case.lora_A.shape[1])
    assert close(h.sum(0), naive.shrink(case.x, case.lora_A, case.index)[0], size, torch.float32)
    swapped = naive.shrink(case.x, case.lora_A.roll(1, 0), case.index)[0]
    assert not close(h.sum(0), swapped, size, torch.float32)


@pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
@pytest.mark.parametrize("device,dtype", TYPES)
@pytest.mark.parametrize("sizes", [s.values for s in FEW], ids=[s.id for s in FEW])
def test_expand(sizes, device, dtype, gelu):
    case = Case(*sizes, device, dtype)
    y, h = case.y.clone(), naive.shrink(case.x, case.lora_A, case.index)
    planes = torch.stack([h[0] - 1, torch.ones_like(h[0])])  # they have to be added up before gelu
    config = ExpandConfig(1, 32, 16, 4)
    gather.expand_(
        y, planes, case.lora_B, case.index, case.weight, case.members, SCALING, gelu, config=config
    )
    assert close(y, *expanded(case, gelu=gelu), dtype)
    mutations = [
        {"scaling": -SCALING},
        {"weight": torch.ones_like(case.weight)},
        {"lora_B": case.lora_B.roll(1, 0)},
        {"gelu": not gelu},
    ]
    for mutation in mutations:
        assert not close(y, *expanded(case, **{"gelu": gelu} | mutation), dtype), mutation


@pytest.mark.parametrize("shared", [True, False], ids=["shared", "own"])
@pytest.mark.parametrize("gelu", [False, True], ids=["linear", "gelu"])
@pytest.mark.parametrize("device,dtype", TYPES)
@pytest.mark.parametrize("sizes", [s.values for s in FEW + MANY], ids=[s.id for s in FEW + MANY])
def test_expand_all(sizes, device, dtype, gelu, shared):
    case = Case(*sizes, device, dtype, shared=shared)
    before, many = case.product.clone(), sizes[0] > FEW_TOKENS
    # several tiles of tokens and outputs, and several steps of a sum in which no expert starts
    config = ExpandConfig(16, 32, 64, 4, 3) if many else ExpandConfig(1, 32, 16, 4)
    y, rest = before[:, : case.y.shape[1]], (case.members, SCALING, gelu)
    wanted, size = expanded_all(case, gelu=gelu)
    gather.expand_all_(
        case.y, case.u, case.lora_B, case.index_TGK.int(), case.weight_TGK, *rest, config=config
    )
    assert close(case.y, wanted, size, dtype)
    assert torch.equal(case.product[:, case.y.shape[1] :], before[:, case.y.shape[1] :])
    found = case.y.clone()
    case.y.copy_(y)
    mutations = [
        {"scaling": -SCALING},
        {"weight": torch.ones_like(case.weight_TGK)},
        {"u": case.u.roll(case.rank, 1)},
        {"index": (case.index_TGK + 1) % case.experts},
        {"gelu": not gelu},
    ]
    if not shared and len(case.members) > 1:
        mutations.append({"index": case.index_TGK[:, :1], "weight": case.weight_TGK[:, :1]})
    for mutation in mutations:
        assert not close(found, *expanded_all(case, **{"gelu": gelu} | mutation), dtype), mutation


@pytest.mark.parametrize("raw", [False, True], ids=["renormalised", "raw"])
@pytest.mark.parametrize("device,dtype", TYPES)
@pytest.mark.parametrize("sizes", [s.values for s in FEW + MANY], ids=[s.id for s in FEW + MANY])
def test_expand_routed(sizes, device, dtype, raw):
    case = Case(*sizes, device, dtype)
    before, outputs = case.product.clone(), case.y.shape[1]
    config = ExpandConfig(16, 32, 64, 4, 3) if sizes[0] > FEW_TOKENS else ExpandConfig(1, 32, 16, 4)
    rest = (case.lora_B, case.members, case.top_k, raw, SCALING)
    index, weight = gather.expand_routed_(case.y, case.u, case.logits, *rest, config=config)
    found = case.y.clone()
    case.y.copy_(before[:, :outputs])
    assert torch.equal(case.product, before), "only y is written"
    y, size, wanted_index, wanted_weight = expanded_routed(case, raw)
    assert close(found, y, size, dtype)
    assert torch.equal(index, wanted_index) and index.dtype == torch.int64
    # a softmax of at most 16 terms in fp32
    torch.testing.assert_close(weight, wanted_weight, rtol=1e-5, atol=0)
    mutations = [
        {"scaling": -SCALING},
        {"logits": -case.logits},
        {"u": case.u.roll(case.rank, 1)},
        {"lora_B": case.lora_B.roll(1, 0)},
    ]
    if len(case.members) > 1:
        mutations.append({"logits": case.logits.roll(case.experts, 1)})
    for mutation in mutations:
        assert not close(found, *expanded_routed(case, raw, **mutation)[:2], dtype), mutation
    assert not close(found, *expanded_routed(case, not raw)[:2], dtype)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("fill", [0.0, float("nan")], ids=["equal", "nan"])
@pytest.mark.parametrize(
    "sizes", [s.values for s in (FEW[1], MANY[1])], ids=[s.id for s in (FEW[1], MANY[1])]
)
def test_routed_indices_are_distinct_and_valid_whatever_the_logits(sizes, fill):
    case = Case(*sizes, "cpu", torch.float32)
    rest = (case.lora_B, case.members, 3, False, SCALING)
    logits = case.logits.unflatten(1, (len(case.members), -1)).fill_(fill)
    index, weight = gather.expand_routed_(case.y, case.u, logits, *rest)
    assert torch.equal(index, torch.arange(3).expand_as(index))
    assert weight.isnan().all() if fill != fill else torch.allclose(weight, torch.full_like(weight, 1 / 3))


def test_the_columns_between_members_are_left_alone():
    case = Case(*MANY[1].values, "cpu", torch.float32)
    case.y.fill_(0.0)
    gather.expand_all_(case.y, case.u, case.lora_B, case.index_TGK, case.weight_TGK, case.members, SCALING)
    written = case.y.abs().sum(0) > 0
    assert written.nonzero().flatten().tolist() == [*range(3, 73), *range(90, 123)]


def test_a_fourth_member_and_a_fifth_token_are_refused():
    case = Case(*FEW[0].values, "cpu", torch.float32)
    h = naive.shrink(case.x, case.lora_A, case.index)
    with pytest.raises(ValueError, match="4 members: the kernels take 1 to 3"):
        gather.expand_(case.y, h, case.lora_B, case.index, case.weight, [(0, 10)] * 4, SCALING)
    case = Case(FEW_TOKENS + 1, *FEW[0].values[1:], "cpu", torch.float32)
    h = naive.shrink(case.x, case.lora_A, case.index)
    with pytest.raises(ValueError, match="expand_all_"):
        gather.shrink(case.x, case.lora_A, case.index)
    with pytest.raises(ValueError, match="expand_all_"):
        gather.expand_(case.y, h, case.lora_B, case.index, case.weight, case.members, SCALING)
