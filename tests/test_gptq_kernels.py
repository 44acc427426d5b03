"""Linear layers of 2, 4 and 8 bits: exact sums of exact weights, and rows that depend on themselves alone."""

from __future__ import annotations

import pytest
import torch
from gptq_weights import weight
from torch import Tensor

from folo import ops
from folo.ops import cpu
from folo.ops.quantized import BITS, quantized

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHAPES = ((1, 64, 32), (20, 130, 48), (70, 576, 128), (100, 512, -1), (36, 20, 128), (48, 96, 16))
ROWS = 200
COUNTS = (0, 1, 2, 5, 6, 7, 16, 17, 31, 33, 64, 70, 96, 97, 193, 200)


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + sum(shape))).to(dtype)


@pytest.mark.usefixtures("threads", "each_instruction_set")
class TestContract:
    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
    @pytest.mark.parametrize("bits", BITS)
    def test_rows_depend_on_themselves_alone(
        self, n: int, k: int, group_size: int, bits: int, dtype: torch.dtype
    ) -> None:
        packed, x = weight(n, k, group_size, bits, desc_act=n % 20 == 0), random(ROWS, k, dtype=dtype)
        bias = random(n, dtype=dtype) if n % 3 else None
        torch.set_num_threads(1)
        alone = torch.cat([ops.linear(x[r : r + 1], packed, bias) for r in range(ROWS)])
        assert alone.dtype == dtype
        shuffled = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for m in COUNTS if count == 1 else (1, 17, 97):
                assert torch.equal(ops.linear(x[:m], packed, bias), alone[:m]), (m, count)
            assert torch.equal(ops.linear(x[shuffled], packed, bias), alone[shuffled])

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_columns_of_a_fused_weight_depend_on_themselves_alone(self, dtype: torch.dtype) -> None:
        packed, x = weight(96, 128, 32), random(9, 128, dtype=dtype)
        parts = [quantized(part) for part in packed.grouped().split([40, 16, 40])]
        together = torch.cat([ops.linear(x, part) for part in parts], 1)
        assert torch.equal(ops.linear(x, packed), together)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("bits", BITS)
    @pytest.mark.parametrize("desc_act", [False, True])
    @pytest.mark.parametrize(("n", "k", "group_size"), SHAPES)
    def test_errors_are_those_of_the_dense_kernel_at_most(
        self, n: int, k: int, group_size: int, desc_act: bool, bits: int, dtype: torch.dtype
    ) -> None:
        """Against float64. The dense kernel has the weight rounded to x's dtype; float32 can hold it."""
        packed, x = weight(n, k, group_size, bits, desc_act), random(50, k, dtype=dtype)
        bias = random(n, dtype=dtype)
        dense = packed.plain(torch.float64)
        exact = x.double() @ dense.t() + bias.double()
        got, other = ops.linear(x, packed, bias), ops.linear(x, dense.to(dtype), bias)
        error, bound = ((y.double() - exact).abs().mean() for y in (got, other))
        if dtype == torch.float32:  # both are exact but for the order of summation
            assert float((got.double() - exact).abs().max() / exact.abs().max()) <= 1e-6
        else:
            assert error <= bound
        wide = ops.linear(x, packed, bias, wide=True)
        assert wide.dtype == torch.float32
        assert torch.equal(wide.to(dtype), got)
        assert float((wide.double() - exact).abs().max() / exact.abs().max()) <= 1e-6

    def test_what_no_group_has_counts_for_nothing(self) -> None:
        """Places without a column, and the padding of a row, are not multiplied with what lies beside it."""
        packed = weight(32, 40, 16)
        x = random(2, 40)
        x[1] = torch.inf
        assert torch.equal(ops.linear(x, packed)[:1], ops.linear(x[:1], packed))
        assert ops.linear(x[:1], packed).isfinite().all()

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_a_gated_linear_is_a_linear_and_its_gate(self, dtype: torch.dtype) -> None:
        packed, x = weight(96, 128, 32), random(9, 128, dtype=dtype)
        assert torch.equal(ops.gated_linear(x, packed), ops.silu_mul(ops.linear(x, packed)))


def test_four_bits_take_little_memory() -> None:
    """A share of the bytes in bfloat16, scales, zeros and padding included."""
    for n, k, most in ((3072, 1024, 0.29), (1024, 3072, 0.29), (576, 1536, 0.29), (960, 576, 0.29)):
        packed = weight(n, k, 128)
        assert packed.num_bytes <= most * 2 * n * k, (n, k)


@pytest.mark.skipif(cpu.instruction_set() == cpu.REFERENCE, reason="plain torch has no kernels to ask")
def test_parts_that_do_not_fit_are_refused() -> None:
    packed, op = weight(32, 64, 32), torch.ops.folo.quantized_linear.default
    with pytest.raises(RuntimeError, match="does not fit x"):
        op(random(3, 96), packed.codes, packed.scales, packed.zeros, None, 32)
    two = weight(32, 128, 128)
    for spans in (two.scales[:, :0], two.scales.repeat(1, 5, 1)):
        with pytest.raises(RuntimeError, match="does not fit x"):
            op(random(3, 128), two.codes, spans.contiguous(), spans.byte().contiguous(), None, 32)


@pytest.mark.parametrize("columns", [False, True])
def test_schema_and_shape_function_agree_with_the_op(columns: bool) -> None:
    packed = weight(20, 96, 32, desc_act=columns)
    own = packed.codes, packed.scales, packed.zeros, packed.columns
    op = torch.ops.folo.quantized_linear.default
    arguments = random(5, 96), *own, 20, random(20)
    torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
