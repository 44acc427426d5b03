"""The kernels take plain memory: what does not fit together is refused before it gets to them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from folo import ops
from folo.model.params import in_groups
from folo.ops import cpu, kv_cache
from folo.ops.packed import Packed, pack
from folo.ops.quantized import BITS

pytestmark = pytest.mark.skipif(
    cpu.instruction_set() == cpu.REFERENCE, reason="plain torch looks at shapes itself"
)

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
ROWS, HEADS, KV_HEADS, HEAD_DIM = 5, 4, 2, 16


def random(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def ints(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def caches(
    dtype: torch.dtype = torch.float32, heads: int = KV_HEADS, head_dim: int = HEAD_DIM, blocks: int = 4
) -> tuple[Tensor, Tensor]:
    k, v = kv_cache.zeros((1, blocks, 16, heads, head_dim), dtype, torch.device("cpu"))
    return k[0], v[0]


def packed_linear(x: tuple[int, ...], shape: tuple[int, int], bias: Tensor | None = None) -> Tensor:
    return ops.linear(random(*x), Packed(pack(random(*shape)), shape), bias)


def write(
    angles: tuple[int, int] = (ROWS, HEAD_DIM),
    norms: tuple[Tensor | None, Tensor | None] = (None, None),
    slots: int = ROWS,
    width: int = (HEADS + 2 * KV_HEADS) * HEAD_DIM,
    kv: tuple[Tensor, Tensor] | None = None,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    qkv, places = random(ROWS, width, dtype=dtype), torch.arange(slots)
    return ops.qk_norm_rope_write(qkv, random(*angles), *norms, 1e-6, *(kv or caches(dtype)), places)


def attend(
    q: tuple[int, ...] = (ROWS, HEADS, HEAD_DIM),
    tables: tuple[int, ...] = (2, 1),
    start: Tensor = ints(0, 1, ROWS),  # noqa: B008 (never written to)
    kv: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    tables_ = torch.zeros(tables, dtype=torch.int32)
    return ops.paged_attention(random(*q), *(kv or caches()), tables_, start, ints(1, 4), 0.25)


def quantized_linear(bits: int = 4, x: tuple[int, ...] = (ROWS, 32)) -> Tensor:
    """By codes of one tile of 16 rows and one block of 32 columns."""
    codes, zeros = torch.zeros(1, 1, bits, 16, dtype=torch.int32), torch.zeros(1, 1, 16, dtype=torch.uint8)
    return torch.ops.folo.quantized_linear(random(*x), codes, zeros.half(), zeros, None, 16)


def sample(op: str, tokens: int = 8, **changed: Tensor | int) -> Any:
    """An op of the sampler on ROWS rows, with some of its arguments changed."""
    ids, values = torch.zeros(ROWS, dtype=torch.int64), torch.ones(ROWS)
    history = {"history": ids, "history_start": torch.arange(ROWS + 1), "prompt_len": ids}
    penalties = {"repetition": values, "presence": values, "frequency": values}
    biases = {"bias_row": torch.arange(ROWS), "bias_id": ids, "bias_value": values}
    columns: dict[str, Tensor | int] = {
        "philox": {"seed": ids, "position": ids, "sample_index": ids, "purpose": 0},
        "penalize": {**history, **penalties, **biases},
        "warp": {"temperature": values, "min_p": values, "top_k": ids, "top_p": values},
        "draw": {"greedy": ids.bool(), "u": values / 2},
        "log_softmax": {},
        "pick_logprobs": {"ids": ids, "k": 2},
    }[op]
    logits = {} if op == "philox" else {"logits": random(ROWS, tokens)}
    return getattr(ops, op)(**(logits | columns | changed))


SHORT_IDS, SHORT_VALUES = torch.zeros(ROWS - 1, dtype=torch.int64), torch.ones(ROWS - 1)
SHORT = {
    "philox": {"position": SHORT_IDS, "sample_index": SHORT_IDS},
    "penalize": {
        **dict.fromkeys(("history", "history_start", "prompt_len", "bias_row", "bias_id"), SHORT_IDS),
        **dict.fromkeys(("repetition", "presence", "frequency", "bias_value"), SHORT_VALUES),
    },
    "warp": {
        "temperature": SHORT_VALUES,
        "min_p": SHORT_VALUES,
        "top_k": SHORT_IDS,
        "top_p": SHORT_VALUES,
    },
    "draw": {"greedy": SHORT_IDS.bool(), "u": SHORT_VALUES},
    "pick_logprobs": {"ids": SHORT_IDS},
}


WRONG: dict[str, Callable[[], Any]] = {
    "a product of nothing": lambda: packed_linear((3, 0), (20, 0)),
    "x of three dimensions": lambda: packed_linear((2, 8, 3), (20, 8)),
    "a short bias": lambda: packed_linear((3, 8), (20, 8), random(3)),
    "a bias of another dtype": lambda: packed_linear((3, 8), (20, 8), random(20, dtype=torch.bfloat16)),
    "a weight that is not packed": lambda: torch.ops.folo.packed_linear(random(3, 8), random(2, 8), 20),
    "a short norm": lambda: ops.rms_norm(random(3, 8), random(4), 1e-6),
    "a long norm": lambda: ops.rms_norm(random(4, 8), random(16), 1e-6),
    "a short norm of a sum": lambda: ops.add_rms_norm(random(3, 8), random(3, 8), random(4), 1e-6),
    "a residual of fewer rows": lambda: ops.add_rms_norm(random(3, 8), random(1, 8), random(8), 1e-6),
    "a gate without its other half": lambda: ops.silu_mul(random(3, 7)),
    "angles of fewer rows": lambda: write(angles=(2, HEAD_DIM)),
    "angles of nothing": lambda: write(angles=(ROWS, 0)),
    "angles of another head": lambda: write(angles=(ROWS, 8)),
    "fewer slots than rows": lambda: write(slots=2),
    "rows that are no heads": lambda: write(width=130),
    "rows without a query": lambda: write(width=2 * KV_HEADS * HEAD_DIM),
    "short norms of heads": lambda: write(norms=(random(8), random(8))),
    "norms of heads of another dtype": lambda: write(norms=(half := random(HEAD_DIM).half(), half)),
    "one norm of two": lambda: write(norms=(random(HEAD_DIM), None)),
    "K and V of two caches": lambda: write(kv=(caches()[0], caches(blocks=2)[1])),
    "K and V of different heads": lambda: attend(kv=(caches()[0], caches(heads=1)[1])),
    "queries of other heads": lambda: attend(q=(ROWS, HEADS, 32)),
    "fewer query heads than KV heads": lambda: attend(q=(ROWS, 1, HEAD_DIM)),
    "tables of fewer sequences": lambda: attend(tables=(1, 1)),
    "starts of fewer sequences": lambda: attend(start=ints(0, ROWS)),
    "starts beyond the queries": lambda: attend(start=ints(0, 1, ROWS + 1)),
    "codes of 3 bits": lambda: quantized_linear(3),
    "codes of 16 bits": lambda: quantized_linear(16),
    "quantised, x of three dimensions": lambda: quantized_linear(x=(2, 32, 3)),
    "more likeliest tokens than tokens": lambda: sample("pick_logprobs", k=9),
    "fewer likeliest tokens than none": lambda: sample("pick_logprobs", k=-1),
    "logits of three dimensions": lambda: sample("log_softmax", logits=random(2, 8, 3)),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_does_not_fit_is_refused(case: str) -> None:
    with pytest.raises(RuntimeError):
        WRONG[case]()


@pytest.mark.parametrize(("op", "column"), [(op, column) for op in SHORT for column in SHORT[op]])
def test_columns_shorter_than_the_rows_are_refused(op: str, column: str) -> None:
    columns: dict[str, Any] = {column: SHORT[op][column]}
    with pytest.raises(RuntimeError):
        sample(op, **columns)


def test_what_fits_is_not() -> None:
    assert all(quantized_linear(bits).shape == (ROWS, 16) for bits in BITS)
    assert all(sample(op) is not None for op in (*SHORT, "log_softmax"))
    assert sample("pick_logprobs", k=8)[2].shape == (ROWS, 8)
    assert packed_linear((3, 8), (20, 8), random(20)).shape == (3, 20)
    assert write(norms=(random(HEAD_DIM), random(HEAD_DIM))).shape == (ROWS, HEADS, HEAD_DIM)
    assert attend().shape == (ROWS, HEADS, HEAD_DIM)


@pytest.mark.parametrize("dtype", DTYPES)
def test_norms_of_heads_may_be_stored_with_gaps(dtype: torch.dtype) -> None:
    spread = random(2 * HEAD_DIM, dtype=dtype)[::2]
    expected = write(norms=(spread.contiguous(), spread.contiguous()), dtype=dtype)
    assert torch.equal(write(norms=(spread, spread), dtype=dtype), expected)


@pytest.mark.parametrize("wrong", ["a layer too many", "a cache too many", "a group too long", "too few"])
def test_layers_that_are_not_whole_are_refused(tiny: Any, wrong: str) -> None:
    from folo.model.params import layers_with_next_norm

    config = tiny.config
    own = in_groups(layers_with_next_norm(tiny))
    assert own is not None
    weights, sizes = own
    count = config.num_layers
    if wrong == "a layer too many":
        count -= 1
    elif wrong == "a cache too many":
        count += 1
    elif wrong == "a group too long":
        weights, sizes = [weights[0], *weights], [sizes[0], sizes[1] + 1, *sizes[2:]]
    else:
        weights = weights[:-1]
    k, v = zip(*(caches(tiny.dtype, config.num_kv_heads, config.head_dim) for _ in range(count)), strict=True)
    x, angles = random(ROWS, config.hidden_size), random(ROWS, config.head_dim)
    numbers = config.num_heads, config.intermediate_size, 1e-6, 0.25
    where = torch.arange(ROWS), torch.zeros(1, 1, dtype=torch.int32), ints(0, ROWS), ints(ROWS)
    with pytest.raises(RuntimeError):
        ops.decoder_layers(x, x, angles, weights, sizes, *numbers, list(k), list(v), *where)
