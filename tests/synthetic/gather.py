"""Operands of shrink and the expands, what naive.py makes of them, and how near the kernels must come."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from adafuse.kernels import naive

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
