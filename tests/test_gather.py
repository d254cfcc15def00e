"""shrink and the expands against naive.py: odd sizes, views, poisoned outputs, and what must not agree."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adafuse.kernels import gather, gather_routed, naive
from adafuse.kernels.config import FEW_TOKENS, ExpandConfig, ShrinkConfig

TYPES = [
    pytest.param("cpu", torch.float32, id="cpu-fp32"),
    pytest.param("cpu", torch.float16, id="cpu-fp16"),
    *(
        pytest.param("cuda", dtype, marks=pytest.mark.gpu, id=f"cuda-{name}")
        for name, dtype in [("fp32", torch.float32), ("fp16", torch.float16), ("bf16", torch.bfloat16)]
    ),
]
# tokens, top-k, experts, rank, inputs, members
FEW = [
    pytest.param(1, 1, 2, 16, 128, [(0, 40)], id="T1-K1-E2-R16-I128-O40"),
    pytest.param(3, 2, 5, 7, 301, [(3, 70), (90, 33)], id="T3-K2-E5-R7-I301-O70+33"),
]
MANY = [
    pytest.param(5, 1, 2, 8, 0, [(0, 40)], id="T5-K1-E2-R8-O40"),
    pytest.param(7, 2, 5, 7, 0, [(3, 70), (90, 33)], id="T7-K2-E5-R7-O70+33"),
    pytest.param(19, 3, 8, 24, 0, [(0, 17), (20, 64), (84, 5)], id="T19-K3-E8-R24-O17+64+5"),
]
SCALING = 0.5


@pytest.fixture(autouse=True)
def _poison(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from torch.empty is full of NaN and -1, so that what a kernel leaves out is seen."""
    empty = torch.empty

    def poisoned(*shape: int, **options: object) -> Tensor:
        fresh = empty(*shape, **options)
        return fresh.fill_(float("nan") if fresh.is_floating_point() else -1)

    monkeypatch.setattr(torch, "empty", poisoned)


class Case:
    """Random operands of one call; x is a view; y, u and the members' logits are parts of the rows of one product."""

    def __init__(self, tokens, top_k, experts, rank, inputs, members, device, dtype, *, shared=True):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            outputs, joined = max(c + w for c, w in members) + 4, sum(w for _, w in members)
            groups, rows = 1 if shared else len(members), len(members) * rank
            self.members, self.experts, self.top_k, self.rank = members, experts, top_k, rank
            self.x = torch.randn(tokens, inputs + 8).to(device, dtype)[:, :inputs]
            tail = experts * (rows + len(members))
            self.product = torch.randn(tokens, outputs + tail).to(device, dtype)
            starts = [outputs, outputs + experts * rows]
            self.y, self.u, self.logits = self.product.tensor_split(starts, dim=1)
            # half a unit apart, which no type rounds: nothing that is chosen hangs on a rounding
            ranks = torch.stack([torch.randperm(experts) for _ in range(tokens * len(members))])
            self.logits.copy_(ranks.view(tokens, -1) / 2 - 1)
            self.lora_A = (torch.randn(experts, rows, inputs) / max(inputs, 1) ** 0.5).to(device, dtype)
            self.lora_B = torch.randn(experts, joined, rank).to(device, dtype)
            chosen = torch.stack([torch.randperm(experts)[:top_k] for _ in range(tokens * groups)])
            self.index_TGK = chosen.view(tokens, groups, top_k).to(device)
            self.weight_TGK = torch.rand(tokens, groups, top_k).to(device)
            self.index, self.weight = self.index_TGK[:, 0], self.weight_TGK[:, 0]


def close(found: Tensor, wanted: Tensor, size: Tensor, dtype: torch.dtype) -> bool:
    """Whether two sums agree; `size` is the same sum over absolute values.

    Each term carries at most two roundings to the dtype (gated u before a tensor core, y at the end), half an eps
    each. fp32 sums of n terms in another order differ by about sqrt(n) eps of fp32, and n is below 1000 here.
    """
    tolerance = (torch.finfo(dtype).eps + 32 * torch.finfo(torch.float32).eps) * size
    return bool(((found.float() - wanted.float()).abs() <= tolerance).all())


def expanded(case: Case, **changes) -> tuple[Tensor, Tensor]:
    """(y, sum of absolute values) of naive.expand_ after naive.shrink, in fp32, with some arguments replaced."""
    given = {"lora_B": case.lora_B, "index": case.index, "weight": case.weight, "scaling": SCALING}
    given |= {"gelu": False} | changes
    y, size = case.y.float().clone(), case.y.float().abs()
    h = naive.shrink(case.x, case.lora_A, case.index)
    sizes = naive.shrink(case.x.abs(), case.lora_A.abs(), case.index)
    rest = (given["index"], given["weight"], case.members)
    naive.expand_(y, h, given["lora_B"], *rest, given["scaling"], given["gelu"])
    naive.expand_(size, sizes, given["lora_B"].abs(), *rest, abs(given["scaling"]))
    return y, size


def expanded_all(case: Case, **changes) -> tuple[Tensor, Tensor]:
    """(y, sum of absolute values) of naive.expand_all_ in fp32, with some arguments replaced."""
    given = {"u": case.u, "lora_B": case.lora_B, "index": case.index_TGK, "weight": case.weight_TGK}
    given |= {"scaling": SCALING, "gelu": False} | changes
    y, size = case.y.float().clone(), case.y.float().abs()
    rest = (given["index"], given["weight"], case.members)
    naive.expand_all_(y, given["u"], given["lora_B"], *rest, given["scaling"], given["gelu"])
    naive.expand_all_(size, given["u"].abs(), given["lora_B"].abs(), *rest, abs(given["scaling"]))
    return y, size


def expanded_routed(case: Case, raw: bool, **changes) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(y, sum of absolute values, index, weight) of naive.expand_routed_ in fp32, with some arguments replaced."""
    given = {"u": case.u, "logits": case.logits, "lora_B": case.lora_B, "scaling": SCALING} | changes
    y = case.y.float().clone()
    rest = (given["lora_B"], case.members, case.top_k, raw, given["scaling"])
    index, weight = naive.expand_routed_(y, given["u"], given["logits"], *rest)
    return y, expanded_all(case, index=index, weight=weight)[1], index, weight


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
    index, weight = gather_routed.expand_routed_(case.y, case.u, case.logits, *rest, config=config)
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
    index, weight = gather_routed.expand_routed_(case.y, case.u, logits, *rest)
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
    with pytest.raises(AssertionError, match="1 to 3"):
        gather.expand_(case.y, h, case.lora_B, case.index, case.weight, [(0, 10)] * 4, SCALING)
    case = Case(FEW_TOKENS + 1, *FEW[0].values[1:], "cpu", torch.float32)
    h = naive.shrink(case.x, case.lora_A, case.index)
    with pytest.raises(ValueError, match="expand_all_"):
        gather.shrink(case.x, case.lora_A, case.index)
    with pytest.raises(ValueError, match="expand_all_"):
        gather.expand_(case.y, h, case.lora_B, case.index, case.weight, case.members, SCALING)
