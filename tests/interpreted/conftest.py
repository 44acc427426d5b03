"""What the tests of interpreted kernels share: Triton as an interpreter, random tensors, equality of bits.

The interpreter runs a kernel over CPU tensors with NumPy, in float32 and float16 (it gets bfloat16 wrong).
It shows that rows, columns and tails find their places and that the contract holds; not what a GPU rounds.
"""

from __future__ import annotations

import os
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


interpreter._patch_lang_tensor = _patch_tensor_and_index
