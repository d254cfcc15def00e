"""Triton's interpreter in half its time, without what costs most of it and tells nothing here."""

from dataclasses import replace
from types import FunctionType, SimpleNamespace

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
