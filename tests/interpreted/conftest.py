"""What the tests of interpreted kernels share: Triton as an interpreter, random tensors, equality of bits.

The interpreter runs a kernel over CPU tensors with NumPy, in float32 and float16 (it gets bfloat16 wrong).
It shows that rows, columns and tails find their places and that the contract holds; not what a GPU rounds.
"""

from __future__ import annotations

import math
import os
from dataclasses import replace
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    raise pytest.UsageError("tests/interpreted needs TRITON_INTERPRET=1 in the environment")

from triton import language as tl
from triton.language.semantic import TritonSemantic
from triton.runtime import interpreter

_patch_tensor = interpreter._patch_lang_tensor


def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
    """NumPy 2.4 refuses what Triton 3.6 asks of it: an int of an array of one element, which is no scalar."""
    _patch_tensor(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())


_make_block_type = tl.block_type.__init__
_attributes: dict[Any, dict[str, Any]] = {}


def _block_type_once(self: Any, element_ty: Any, shape: Any) -> None:
    """Every operation makes such types, and spells out their names: equal ones share all they have."""
    if element_ty.is_ptr():  # which has no hash
        return _make_block_type(self, element_ty, shape)
    key = element_ty.name, *[size.value if type(size) is tl.constexpr else size for size in shape]
    if key not in _attributes:
        _make_block_type(self, element_ty, shape)
        _attributes[key] = self.__dict__
    self.__dict__ = _attributes[key]
    return None


def _tensor_of_type(self: Any, handle: Any, type: Any) -> None:
    """Tensors of one type share its shape and size, which Triton makes anew for each."""
    known = type.__dict__.get("_known")
    if known is None:
        shape = type.shape if type.is_block() else ()
        known = tl.tuple([tl.constexpr(size) for size in shape]), tl.constexpr(math.prod(shape))
        type.__dict__["_known"] = known
    self.handle, self.type, self.dtype = handle, type, type.scalar
    self.shape, self.numel = known


_NEVER_PROMOTED = {"fp32", "int32", "int64"}
_typed = TritonSemantic.binary_op_type_checking_impl


def _typed_at_once(self: Any, lhs: Any, rhs: Any, *options: Any, **named: Any) -> Any:
    """Two blocks of one type, as nearly always, stay what they are; those of other shapes are broadcast."""
    if type(lhs) is type(rhs) is tl.tensor and lhs.dtype is rhs.dtype and lhs.dtype.name in _NEVER_PROMOTED:
        same = lhs.type.__dict__ is rhs.type.__dict__
        return (lhs, rhs) if same else self.broadcast_impl_value(lhs, rhs)
    return _typed(self, lhs, rhs, *options, **named)


_scalar = TritonSemantic.scalar_constant
_scalars: dict[Any, Any] = {}


def _scalar_once(self: Any, value: Any, dtype: Any) -> Any:
    """A kernel meets few constants, and each of them in every step of its loops."""
    key = type(value), repr(value), dtype.name  # 0.0 and -0.0 are equal, and not the same
    if key not in _scalars:
        _scalars[key] = _scalar(self, value, dtype)
    return _scalars[key]


def _attribute(obj: Any, name: str, member: Any, builder: Any, scope: Any) -> None:
    """As Triton's, but without its check that `_semantic` is given: it is given here."""
    function, semantic = getattr(member, "__wrapped__", member), TritonSemantic(builder)

    def called(*args: Any, **named: Any) -> Any:
        named["_semantic"] = semantic
        return function(*args, **named)

    scope.set_attr(obj, name, called)


_type_for_tuple_values = tl.core._type_for_tuple_values
_type_of_ints = cache(_type_for_tuple_values)


def _tuple_type_once(values: Any, fields: Any = None) -> Any:
    if fields is None and all(type(value) is int for value in values):
        return _type_of_ints(tuple(values))
    return _type_for_tuple_values(values, fields)


_np_dtype_of_scalar = cache(interpreter._get_np_dtype)


def _np_dtype_once(dtype: Any) -> Any:
    """Triton makes a table of all of them for each answer."""
    return np.dtype(np.uint64) if dtype.scalar.is_ptr() else _np_dtype_of_scalar(dtype.scalar)


def _dot(self: Any, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
    """A row's product, wherever in its tile it stands: NumPy's own leaves that to a BLAS, whose bits vary."""
    a, b = (np.ascontiguousarray(x.data, dtype=d.data.dtype) for x in (a, b))
    product = np.einsum("...mk,...kn->...mn", a, b)
    return interpreter.TensorHandle(product + d.data, d.dtype.scalar)


interpreter.InterpreterBuilder.create_dot = _dot
interpreter._patch_lang_tensor = _patch_tensor_and_index
tl.tensor.__init__ = _tensor_of_type
TritonSemantic.binary_op_type_checking_impl = _typed_at_once
TritonSemantic.scalar_constant = _scalar_once
interpreter._patch_attr = _attribute
tl.block_type.__init__ = _block_type_once
tl.core._type_for_tuple_values = _tuple_type_once
interpreter._get_np_dtype = _np_dtype_once
# Looking for overflow takes a third of the time, and the result is thrown away unless the builder debugs.
interpreter.interpreter_builder.options = replace(
    interpreter.interpreter_builder.options, sanitize_overflow=False
)
# Triton patches its language for each function that is called, and restores it afterwards: here it stays.
interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
interpreter._patch_lang = lambda fn: interpreter._LangPatchScope()
