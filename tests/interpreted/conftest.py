"""What the tests of interpreted kernels share: Triton as an interpreter, random tensors, equality of bits.

The interpreter runs a kernel over CPU tensors with NumPy, in float32 and float16 (it gets bfloat16 wrong).
It shows that rows, columns and tails find their places and that the contract holds; not what a GPU rounds.
"""

from __future__ import annotations

import inspect
import os
from functools import cache
from typing import Any

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreted needs TRITON_INTERPRET=1 in the environment")

from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    """NumPy 2.4 refuses what Triton 3.6 asks of it: an int of an array of one element, which is no scalar."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


@cache
def _builtins(pkg: Any) -> list[tuple[str, Any]]:
    return [(name, x) for name, x in inspect.getmembers(pkg) if interpreter.tl.core.is_builtin(x)]


def _patch_known_builtins(pkg: Any, builder: Any, scope: Any) -> None:
    """Triton looks for them among all members again whenever a function is called: a third of the time."""
    for name, member in _builtins(pkg):
        if getattr(pkg, name) is member:
            interpreter._patch_attr(pkg, name, member, builder, scope)


interpreter._patch_lang_tensor = _patch_tensor_and_index
interpreter._patch_builtin = _patch_known_builtins
