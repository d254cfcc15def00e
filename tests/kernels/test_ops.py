"""kernels/ops.py: torch's dispatcher is in the way of a kernel only where somebody looks at operators."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from adafuse.kernels import ops

X, ROUTER = torch.ones(1, 16), torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def through_torch(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Notes each call that goes through the operator."""
    called, operator = [], torch._library.custom_ops.CustomOpDef
    through = operator.__call__

    def noted(self, *args, **kwargs):
        called.append(self._name)
        return through(self, *args, **kwargs)

    monkeypatch.setattr(operator, "__call__", noted)
    return called


def test_an_eager_step_calls_the_function_itself(through_torch: list[str]) -> None:
    ops.route(X, ROUTER, 2, False)
    assert through_torch == []


def test_who_counts_operations_or_profiles_sees_an_operator(through_torch: list[str]) -> None:
    with FlopCounterMode(display=False) as counter:
        ops.route(X, ROUTER, 2, False)
    assert counter.get_total_flops() == 2 * 4 * 16 and through_torch == ["route"]
    with torch.profiler.profile() as profiler:
        ops.route(X, ROUTER, 2, False)
    assert "adafuse::route" in {event.key for event in profiler.key_averages()}


def test_torch_compile_sees_one_node() -> None:
    nodes = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        nodes.extend(node.target for node in graph.graph.nodes if node.op == "call_function")
        return graph

    compiled = torch.compile(lambda x: ops.route(x, ROUTER, 2, False), backend=keep, fullgraph=True)
    want = ops.route(X, ROUTER, 2, False)
    assert all(torch.equal(*pair) for pair in zip(compiled(X), want, strict=True))
    assert torch.ops.adafuse.route.default in nodes
