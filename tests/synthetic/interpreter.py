"""Triton's interpreter in half its time, without what costs most of it and tells nothing here."""

from collections.abc import Callable
from dataclasses import dataclass, replace
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

    def watched(go: Callable[..., Any], place: int) -> Callable[..., Any]:
        def access(builder: Any, pointers: Any, *rest: Any) -> Any:
            asked = pointers.data[rest[place].data.astype(bool)]
            inside = [(asked >= first) & (asked < last) for first, last in owned]
            assert not owned or not asked.size or np.any(inside, axis=0).all(), "out of bounds"
            return go(builder, pointers, *rest)

        return access

    builder = type(interpreter.interpreter_builder)
    for access, place in (("create_masked_load", 0), ("create_masked_store", 1)):
        monkeypatch.setattr(builder, access, watched(getattr(builder, access), place))
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
