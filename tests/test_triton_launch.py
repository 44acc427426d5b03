"""From an op to the launch of its kernels, short of the GPU: CPU tensors stand for CUDA's."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from importlib import import_module
from inspect import signature
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import triton_source
from torch import Tensor
from triton.runtime.jit import JITFunction

from folo.ops import cuda, reference, sampler
from folo.ops.arithmetic import arithmetic
from folo.ops.cuda.attention import paged_attention
from folo.ops.cuda.kernel import DTYPES, Kernel
from folo.ops.cuda.linear import linear, plan
from folo.ops.cuda.norm import add_rms_norm, rms_norm, silu_mul
from folo.ops.cuda.quantized import quantized_linear
from folo.ops.cuda.rope import qk_norm_rope_write
from folo.ops.cuda.sampler import draw, log_softmax, philox
from folo.ops.cuda.warp import warp
from folo.ops.quantized import BITS, SPANS


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(shape, dtype=dtype)


def products(dtype: torch.dtype) -> None:
    for n, k in ((1024, 2048), (6144, 1024), (9600, 64), (4096, 4096), (100, 130)):
        weight, bias = empty(n, k, dtype=dtype), empty(n + 1, dtype=dtype)[1:]
        for m in (0, 1, 16, 65, 2600):
            x = empty(m * k + 1, dtype=dtype)[1:].view(m, k)  # at an odd address
            for wide in (False, True):
                linear(x, weight, None, wide)
                linear(x, weight, bias, wide)


def quantised_products(dtype: torch.dtype) -> None:
    for n, k in ((1024, 2048), (24576, 1024), (100, 130)):
        tiles, blocks, bias = -(-n // 16), -(-k // 32), empty(n + 1, dtype=dtype)[1:]
        for bits, span in ((bits, span) for bits in BITS for span in SPANS):
            codes = torch.empty(tiles, blocks, bits, 16, dtype=torch.int32)
            scales = empty(tiles, -(-blocks // span), 16, dtype=torch.float16)
            columns = torch.zeros(32 * blocks, dtype=torch.int64)
            for m in (0, 1, 65, 2600):
                x = empty(m * k + 1, dtype=dtype)[1:].view(m, k)
                for wide in (False, True):
                    quantized_linear(x, codes, scales, scales.byte(), None, n, None, wide)
                    quantized_linear(x, codes, scales, scales.byte(), columns, n, bias, wide)


def norms(dtype: torch.dtype) -> None:
    for width in (1, 48, 1000, 1024, 4096, 5120):
        for rows in (1, 16):
            x = empty(rows, 2 * width, dtype=dtype)
            rms_norm(x[:, :width], x[0, width:], 1e-6)
            add_rms_norm(x[:, :width], x[:, width:], x[0, width:], 1e-6)
            silu_mul(x)


def heads(dtype: torch.dtype) -> None:
    for head_dim in (18, 64, 80, 96, 128, 256):
        norm, angles = empty(head_dim, dtype=dtype), torch.empty(16, head_dim)
        cache = empty(1 + 2 * 3 * 16 * head_dim, dtype=dtype)[1:].view(2, 3, 16, head_dim).transpose(1, 2)
        for rows in (1, 16):
            qkv, slots = empty(rows, 11 * head_dim, dtype=dtype), torch.empty(17, dtype=torch.int64)[1:]
            for norms in (None, norm):
                qk_norm_rope_write(qkv, angles[:rows], norms, norms, 1e-6, cache, cache, slots[:rows])


def sequences(dtype: torch.dtype) -> None:
    for head_dim in (16, 64, 80, 96, 128, 256):
        caches = empty(2, 8, 2, 16, head_dim, dtype=dtype).transpose(2, 3)
        for count, tokens, blocks in ((1, 1, 1), (1, 700, 50), (16, 16, 160), (256, 256, 2560)):
            q = empty(tokens * 6 * head_dim + 1, dtype=dtype)[1:].view(tokens, 6, head_dim)
            tables, starts = torch.empty((count, blocks + 1)).int()[:, 1:], torch.empty(count + 2).int()[1:]
            paged_attention(q, caches[0], caches[1], tables, starts, torch.empty(count).int(), 0.125)


def samples(dtype: torch.dtype) -> None:
    for rows in (1, 16):
        numbers, column = torch.empty(rows + 1).long()[1:], torch.empty(rows + 1)[1:]
        philox(numbers, numbers, numbers, 0)
        for vocabulary in (1000, 1024, 151936):
            logits = torch.empty(rows * vocabulary + 1)[1:].view(rows, vocabulary)
            draw(logits, torch.empty(rows + 1).bool()[1:], column)
            log_softmax(logits)


def truncations(dtype: torch.dtype) -> None:
    for rows in (1, 16):
        numbers, column = torch.empty(rows + 1).long()[1:], torch.empty(rows + 1)[1:]
        for vocabulary in (1000, 1024, 151936):
            for truncate in (False, True):
                warp(torch.empty(rows, vocabulary), column, column, numbers, column, truncate)


LAUNCHES = {
    "attention": sequences,
    "linear": products,
    "norm": norms,
    "quantized": quantised_products,
    "rope": heads,
    "sampler": samples,
    "warp": truncations,
}


def test_every_kernel_is_launched_here() -> None:
    assert set(LAUNCHES) == set(cuda.KERNELS.values())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("module", "run"), LAUNCHES.items())
def test_whatever_is_launched_was_compiled_in_a_test(
    module: str, run: Callable[[torch.dtype], None], dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the numbers of rows, and wherever tensors lie: Triton is asked for nothing but the builds."""
    builds = import_module(f"folo.ops.cuda.{module}").builds()
    known = {triton_source.key(build.kernel, triton_source.of_build(build)) for build in builds}
    launched: list[str] = []

    def launch(kernel: Kernel, grid: tuple[int, ...], *args: Any) -> None:
        launched.append(triton_source.key(kernel, triton_source.of_launch(kernel, *args)))

    monkeypatch.setattr(Kernel, "launch", launch)
    run(dtype)
    assert launched
    assert set(launched) <= known


def test_without_triton_the_reference_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_TRITON", False)
    x, weight = torch.ones(2, 4), torch.ones(4)
    with pytest.warns(RuntimeWarning, match="there is no triton"):
        got = cuda._implementation("rms_norm")(x, weight, 1e-6)
    assert torch.equal(got, reference.rms_norm(x, weight, 1e-6))


def test_a_run_on_a_gpu_records_what_computes_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (9, 0))
    found = arithmetic(torch.device("cuda"))
    assert found["backend"] == "triton"
    assert found["instruction_set"] == "NVIDIA H200"
    assert found["kernels"] == cuda.build_key()
    monkeypatch.setattr(cuda, "version", lambda _: "another")
    assert found["kernels"] != cuda.build_key()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    assert arithmetic(torch.device("cuda"))["backend"] == "reference"


@pytest.mark.parametrize(
    ("capability", "stages"), [((8, 0), 8), ((8, 6), 7), ((8, 9), 7), ((9, 0), 8), ((12, 0), 7)]
)
def test_a_gpu_with_less_shared_memory_gets_fewer_stages(
    capability: tuple[int, int], stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    launched: list[int] = []
    found = {"get_device_capability": lambda _: capability, "device_of": lambda _: nullcontext()}
    for name, stand_in in found.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    kernel, grid = plan(4096, 1024, torch.bfloat16).product(1)
    monkeypatch.setattr(JITFunction, "run", lambda *_, num_stages, **__: launched.append(num_stages))
    kernel.launch(grid, SimpleNamespace(device=torch.device("cuda")))
    assert launched == [stages]


def test_float64_runs_as_the_reference() -> None:
    x, weight = torch.ones(2, 4, dtype=torch.float64), torch.ones(4, dtype=torch.float64)
    assert torch.equal(cuda._implementation("rms_norm")(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))


def test_every_kernel_is_registered_for_cuda_tensors_and_called_as_its_reference() -> None:
    for name, module in cuda.KERNELS.items():
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"folo::{name}", "CUDA"), name
        oracle = getattr(reference if hasattr(reference, name) else sampler, name)
        kernel = getattr(import_module(f"folo.ops.cuda.{module}"), name)
        assert signature(kernel) == signature(oracle), name
