"""The choice of who computes attention, and the calls into other libraries, which need a GPU themselves."""

from __future__ import annotations

import inspect
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from engine import finish_all, prompt
from torch import Tensor
from torch.nn.attention import varlen

import folo
from folo.ops import reference
from folo.ops.attention import BACKENDS, Attention, attention_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def varlen_attn_of_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch 2.13 has it; torch 2.11's takes no pages, so it is given the parameters."""

    def varlen_attn(query: Tensor, block_table: Tensor, seqused_k: Tensor, num_splits: int) -> Tensor:
        raise AssertionError

    if "block_table" not in inspect.signature(varlen.varlen_attn).parameters:
        monkeypatch.setattr(varlen, "varlen_attn", varlen_attn)


@pytest.mark.parametrize(
    ("name", "device", "dtype", "block_size", "why"),
    [
        ("fast", CPU, torch.float32, 16, r"attention='fast': expected one of \('auto', 'cpu', 'triton'"),
        ("triton", CPU, torch.float32, 16, r"attention='triton' runs on cuda devices, this is cpu; .*auto"),
        ("cpu", CUDA, torch.float32, 16, r"attention='cpu' runs on cpu devices, this is cuda"),
        ("torch", CUDA, torch.float32, 256, "computes in float16 and bfloat16, this is float32"),
        ("torch", CUDA, torch.float16, 64, "attention='torch' needs a block_size of 256, not 64"),
        ("torch", CUDA, torch.bfloat16, 256, "bits do not depend.*deterministic=False takes it all the same"),
        ("flash_attn", CUDA, torch.bfloat16, 256, "needs the package flash-attn: pip install flash-attn"),
    ],
)
@pytest.mark.usefixtures("varlen_attn_of_pages")
def test_a_backend_that_cannot_be_had_is_refused(
    name: str, device: torch.device, dtype: torch.dtype, block_size: int, why: str
) -> None:
    with pytest.raises(folo.ConfigError, match=why):
        attention_backend(name, device, dtype, block_size, 64)


@pytest.mark.usefixtures("varlen_attn_of_pages")
def test_auto_takes_folos_own_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    assert attention_backend("auto", CPU, torch.float32, 16, 64) == "cpu"
    assert attention_backend("auto", CUDA, torch.bfloat16, 16, 64) == "triton"
    assert attention_backend("torch", CUDA, torch.bfloat16, 256, 64, deterministic=False) == "torch"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert attention_backend("auto", CUDA, torch.bfloat16, 16, 64) == "reference"
    with pytest.raises(folo.ConfigError, match="needs the package triton"):
        attention_backend("triton", CUDA, torch.bfloat16, 16, 64)


def test_heads_of_a_size_without_a_kernel_get_the_reference() -> None:
    sizes = {
        head_dim: attention_backend("auto", CUDA, torch.bfloat16, 16, head_dim) for head_dim in (80, 100, 512)
    }
    assert sizes == {80: "triton", 100: "reference", 512: "reference"}
    with pytest.raises(
        folo.ConfigError, match="'triton' needs a head_dim that is a multiple of 16 up to 256, not 100"
    ):
        attention_backend("triton", CUDA, torch.bfloat16, 16, 100)


def test_an_older_varlen_attn_is_told_from_a_newer_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(query: Tensor, block_table: Tensor, seqused_k: Tensor) -> Tensor:
        return query

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    with pytest.raises(folo.ConfigError, match="needs a varlen_attn with num_splits, unlike that of torch"):
        attention_backend("torch", CUDA, torch.bfloat16, 256, 64, deterministic=False)


def test_a_state_keeps_its_backend(tiny: folo.Params, tmp_path: Path) -> None:
    """The reference, behind packed weights: other bits than the kernels', the same in any batch."""
    sampling = folo.SamplingParams(temperature=0, max_tokens=12, logprobs=0, ignore_eos=True)

    def outputs(attention: str, budget: int) -> tuple[folo.EngineState, list[Any]]:
        scheduler = folo.SchedulerConfig(max_num_batched_tokens=budget)
        state = folo.init(tiny, folo.CacheConfig(num_blocks=40), scheduler, attention=attention)
        for n in range(3):
            state = folo.submit(state, folo.Request(prompt(20 + n, n), sampling, f"r{n}"))
        return state, [output.outputs for output in folo.outputs(finish_all(tiny, state)).values()]

    state, expected = outputs("reference", 64)
    assert outputs("reference", 9)[1] == expected
    assert outputs("auto", 64)[1] != expected
    folo.save(state, tmp_path / "state")
    restored = folo.restore(tiny, tmp_path / "state")
    assert restored.attention == "reference"
    assert [output.outputs for output in folo.outputs(finish_all(tiny, restored)).values()] == expected


def op(name: str) -> Attention:
    found = BACKENDS[name].op
    assert found is not None
    return found


def problem() -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """A prefill chunk, a decode, a sequence without rows, and padding."""
    numbers = torch.Generator().manual_seed(0)
    k, v = (torch.randn(8, 16, 2, 32, generator=numbers) for _ in range(2))
    q = torch.randn(9, 4, 32, generator=numbers)
    tables = torch.tensor([[3, 1, 0], [5, 2, 7], [4, 0, 0], [0, 0, 0]], dtype=torch.int32)
    start = torch.tensor([0, 6, 7, 7, 9], dtype=torch.int32)
    return q, k, v, tables, start, torch.tensor([20, 41, 3, 0], dtype=torch.int32)


def one_by_one(q: Tensor, k: Tensor, v: Tensor, table: Tensor, length: int, scale: float) -> Tensor:
    """One query `[Hq, E]` over the first `length` keys of its pages, in plain torch."""
    keys, values = (cache[table.long()].flatten(0, 1)[:length] for cache in (k, v))
    keys, values = (x.repeat_interleave(q.shape[0] // k.shape[2], 1) for x in (keys, values))
    weights = torch.softmax(torch.einsum("he,the->ht", q, keys) * scale, -1)
    return torch.einsum("ht,the->he", weights, values)


def test_flash_attn_is_given_each_row_as_a_sequence(monkeypatch: pytest.MonkeyPatch) -> None:
    def flash_attn_with_kvcache(
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        cache_seqlens: Tensor,
        block_table: Tensor,
        **options: Any,
    ) -> Tensor:
        assert q.shape[1] == 1
        assert cache_seqlens.dtype == block_table.dtype == torch.int32
        assert options == {"softmax_scale": 0.2, "causal": True, "num_splits": 1}
        lengths = cache_seqlens.tolist()
        rows = [
            one_by_one(q[n, 0], k_cache, v_cache, block_table[n], at, 0.2) for n, at in enumerate(lengths)
        ]
        return torch.stack(rows)[:, None]

    module: Any = types.ModuleType("flash_attn")
    module.flash_attn_with_kvcache = flash_attn_with_kvcache
    monkeypatch.setitem(sys.modules, "flash_attn", module)
    inputs = problem()
    torch.testing.assert_close(
        op("flash_attn")(*inputs, 0.2), reference.paged_attention(*inputs, 0.2), rtol=1e-5, atol=1e-5
    )


def test_varlen_attn_is_given_pages_and_lengths(monkeypatch: pytest.MonkeyPatch) -> None:
    def varlen_attn(
        q: Tensor, k: Tensor, v: Tensor, start: Tensor, *positional: Any, **options: Any
    ) -> Tensor:
        lengths, tables = options.pop("seqused_k").tolist(), options.pop("block_table")
        assert positional == (None, 9, 48), "no cu_seq_k, and bounds of the lengths"
        expected = {"scale": 0.2, "window_size": (-1, 0), "enable_gqa": True, "num_splits": 1}
        assert options == expected
        out = torch.zeros_like(q)
        for s, (begin, end) in enumerate(zip(start.tolist(), start.tolist()[1:], strict=False)):
            for row in range(begin, end):
                seen = max(0, lengths[s] - (end - row) + 1)
                out[row] = one_by_one(q[row], k, v, tables[s], seen, 0.2)
        return out

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    inputs = problem()
    torch.testing.assert_close(
        op("torch")(*inputs, 0.2), reference.paged_attention(*inputs, 0.2), rtol=1e-5, atol=1e-5
    )
