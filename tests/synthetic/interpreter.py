"""Triton's interpreter in half its time, without what costs most of it and tells nothing here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import triton.language as tl
from triton.runtime import interpreter


def quicken() -> None:
    """A launch patches the language for all that its kernel calls: what is patched need not be patched at every call.

    Sums and products of integers are computed as on a GPU, not a second time in 64 bits to see whether they overflow.
    """
    patch, nothing = interpreter._patch_lang, SimpleNamespace(restore=lambda: None)
    interpreter._patch_lang = lambda fn: patch(fn) if _unpatched(fn) else nothing
    builder = interpreter.interpreter_builder
    builder.options = replace(builder.options, sanitize_overflow=False)


def _unpatched(fn: FunctionType) -> bool:
    """Whether one of the two modules that hold the language is seen by `fn` as it is outside the interpreter."""
    original = [lang for lang in (tl, tl.core) if tl.core.is_builtin(lang.load)]
    return any(value is lang for lang in original for value in fn.__globals__.values())


def bound(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> None:
    """Launches of a kernel fail where they read or write, unmasked, what lies in none of the tensors they are given."""
    kernel = getattr(module, name)
    owned: list[tuple[int, int]] = []

    def run(grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        owned[:] = [_extent(value) for value in arguments.values() if isinstance(value, torch.Tensor)]
        kernel[grid](**arguments)
        owned.clear()

    def look(pointers: Any, mask: Any) -> None:
        asked = _asked(pointers, mask)
        inside = [(asked >= first) & (asked < last) for first, last in owned]
        assert not owned or not asked.size or np.any(inside, axis=0).all(), "out of bounds"

    _before(monkeypatch, "create_masked_load", lambda pointers, mask, *_: look(pointers, mask))
    _before(monkeypatch, "create_masked_store", lambda pointers, _, mask, *__: look(pointers, mask))
    monkeypatch.setattr(module, name, _Launched(run))


def late(monkeypatch: pytest.MonkeyPatch, module: object, name: str) -> None:
    """Of launches of a kernel the FRONT programs run behind the others, one by one from the last on, each when one of
    the others looks whether it has.
    """
    kernel, builder = getattr(module, name), interpreter.interpreter_builder
    identify, atomic = builder.create_get_program_id, builder.create_atomic_rmw
    now = SimpleNamespace(shift=0, left=[])

    def programs(first: int, count: int, arguments: dict[str, Any]) -> None:
        before = now.shift, dict(vars(builder))
        now.shift = first
        kernel[(count,)](**arguments)
        now.shift = before[0]
        vars(builder).update(before[1])

    def run(grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        front = arguments["FRONT"]
        now.left, now.arguments = list(range(front)), arguments
        programs(front, grid[0] - front, arguments)
        while now.left:
            programs(now.left.pop(), 1, arguments)

    def identified(axis: int) -> Any:
        found = identify(axis)
        found.data = found.data + now.shift
        return found

    def looked(*operands: Any) -> Any:
        if now.left and now.shift == now.arguments["FRONT"]:
            programs(now.left.pop(), 1, now.arguments)
        return atomic(*operands)

    monkeypatch.setattr(builder, "create_get_program_id", identified)
    monkeypatch.setattr(builder, "create_atomic_rmw", looked)
    monkeypatch.setattr(module, name, _Launched(run))


def overlapping(monkeypatch: pytest.MonkeyPatch, modules: Sequence[Any]) -> None:
    """Dependent launches of these modules' kernels fail where a program, before it has waited for the launches before,
    writes, or reads what one of them writes that may still be under way: any since the last that was not dependent. So
    does a launch in which nobody waits.
    """
    now = _Flight()
    for name in ("set_grid_idx", "create_masked_load", "create_masked_store", "create_atomic_rmw"):
        _before(monkeypatch, name, getattr(now, name))
    stands = {
        "dependent": lambda _: {"PDL": True},
        "gdc_wait": now.wait,
        "gdc_launch_dependents": lambda: None,
    }
    for module in modules:
        kernels = {name: kernel for name, kernel in vars(module).items() if name.endswith("_kernel")}
        launched = {name: _Launched(partial(now.run, kernel)) for name, kernel in kernels.items()}
        for name, stand in (stands | launched).items():
            monkeypatch.setattr(module, name, stand, raising=False)


class _Flight:
    """What launches that may still be under way have written, and whether the program that runs has waited for them.
    Its other methods are called as the interpreter's are.
    """

    def __init__(self) -> None:
        self.dependent, self.waited, self.waits = False, True, 0
        self.own: list[Any] = []
        self.written: list[Any] = []

    def run(self, kernel: Any, grid: tuple[int, ...], arguments: dict[str, Any]) -> None:
        self.dependent, self.waits, self.own = bool(arguments.get("PDL")), 0, []
        if not self.dependent:
            self.written.clear()
        kernel[grid](**arguments)
        assert self.waits or not self.dependent, "nobody waits"
        self.written.append(np.unique(np.concatenate(self.own)))
        self.dependent = False

    def wait(self) -> None:
        self.waited, self.waits = True, self.waits + 1

    def set_grid_idx(self, *_: int) -> None:
        self.waited = not self.dependent

    def create_masked_load(self, pointers: Any, mask: Any, *_: Any) -> None:
        if not self.waited:
            asked = _asked(pointers, mask)
            assert not any(np.isin(asked, written).any() for written in self.written), "read early"

    def create_masked_store(self, pointers: Any, _: Any, mask: Any, *__: Any) -> None:
        assert self.waited, "written early"
        self.own.append(_asked(pointers, mask))

    def create_atomic_rmw(self, _: Any, pointers: Any, __: Any, mask: Any, *___: Any) -> None:
        self.create_masked_store(pointers, None, mask)


@dataclass
class _Launched:
    """Stands in for a kernel."""

    run: Callable[[tuple[int, ...], dict[str, Any]], None]

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        return lambda **arguments: self.run(grid, arguments)


def _extent(tensor: torch.Tensor) -> tuple[int, int]:
    """First byte, and the one behind the last."""
    places = 1 + sum((size - 1) * step for size, step in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + places * tensor.itemsize


def _asked(pointers: Any, mask: Any) -> Any:
    """Addresses that are not masked, in a row."""
    return pointers.data[mask.data.astype(bool)]


def _before(monkeypatch: pytest.MonkeyPatch, name: str, look: Callable[..., None]) -> None:
    """Whatever the interpreter is asked to do by this name, `look` has its operands first."""
    builder = type(interpreter.interpreter_builder)
    go = getattr(builder, name)
    monkeypatch.setattr(builder, name, lambda own, *operands: (look(*operands), go(own, *operands))[1])
