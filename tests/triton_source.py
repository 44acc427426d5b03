"""What Triton is told to compile: for a build that folo lists, and for a launch of its kernel."""

from __future__ import annotations

from typing import Any

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from folo.ops.cuda.kernel import Build, Kernel


def options(kernel: Kernel) -> dict[str, Any]:
    return {"num_warps": kernel.num_warps, "num_stages": kernel.num_stages, "enable_fp_fusion": False}


def of_build(build: Build) -> Any:
    function = build.kernel.function
    absent = {name: None for name, kind in build.signature.items() if kind == "constexpr"}
    signature = {name: build.signature.get(name, "constexpr") for name in function.arg_names}
    constants = {**build.kernel.constants, **absent}
    assert set(signature) == set(build.signature) | set(constants)
    aligned: dict[Any, Any] = {
        (number,): [["tt.divisibility", 16]]
        for number, (name, kind) in enumerate(signature.items())
        if kind.startswith("*") and name not in function.do_not_specialize
    }
    return ASTSource(function, signature, constants, aligned)


def of_launch(kernel: Kernel, *args: Any) -> Any:
    """What `JITFunction.run` would compile, for a fixed GPU: it would ask for the current one."""
    function, backend = kernel.function, make_backend(GPUTarget("cuda", 90, 32))
    bind = create_function_from_signature(function.signature, function.params, backend)
    bound, specialization, rest = bind(*args, **kernel.constants, **options(kernel))
    _, signature, constants, attributes = function._pack_args(
        backend, options(kernel), bound, specialization, rest
    )
    return ASTSource(function, signature, constants, attributes)


def key(kernel: Kernel, source: Any) -> str:
    """Equal for what compiles to the same code."""
    constants = dict(sorted(source.constants.items()))
    attributes = dict(sorted((k, v) for k, v in source.attrs.items() if v))
    return repr((kernel.function.__name__, source.signature, constants, attributes, options(kernel)))
