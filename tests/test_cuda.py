"""What only a GPU can show: the kernels' contract and accuracy, captured graphs, the promises on CUDA.

`pytest -m cuda tests/test_cuda.py`; nothing here runs where there is no CUDA device.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from engine import finish_all, prompt
from gptq_files import Style, gptq_checkpoint
from gptq_weights import weight
from torch import Tensor
from torch.utils import _pytree as pytree

import folo
from folo import ops
from folo.bench import invariance
from folo.bench.cells import REFERENCE, Run, Subject, array, run
from folo.ops import reference, sampler
from folo.ops.attention import BACKENDS
from folo.ops.quantized import BITS, Quantized

pytestmark = pytest.mark.cuda

DEVICE = "cuda"

HALF = (torch.bfloat16, torch.float16)
DTYPES = (*HALF, torch.float32)
ROWS = 300
COUNTS = (1, 2, 7, 16, 33, 63, 64, 65, 70, 128, 129, 256, 300)
# Half a unit in the last place of the result, and as much again for what is rounded on the way.
BOUND = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.float32: 1e-5}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    numbers = torch.Generator(DEVICE).manual_seed(seed + sum(shape))
    return torch.randn(shape, generator=numbers, device=DEVICE).to(dtype)


def same_bits(a: Tensor, b: Tensor) -> bool:
    kind = {2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))


def check_rows(op: Callable[[Tensor], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Every row of prefixes and permutations is what it is alone; returns the rows, each alone."""
    rows = torch.arange(ROWS, device=DEVICE)
    alone = [torch.cat(column) for column in zip(*(op(rows[n : n + 1]) for n in range(ROWS)), strict=True)]
    shuffled = rows[torch.randperm(ROWS, device=DEVICE)]
    for chosen in (*(rows[:count] for count in COUNTS), shuffled, shuffled[:70], shuffled[:5], rows[40:57]):
        for together, expected in zip(op(chosen), alone, strict=True):
            assert same_bits(together, expected[chosen]), len(chosen)
    return tuple(alone)


def close(found: Tensor, exact: Tensor, dtype: torch.dtype, scale: float = 1.0) -> None:
    """Within the bound, relative to the size of the exact values."""
    error = (found.double() - exact).abs().max()
    assert error <= BOUND[dtype] * scale * exact.abs().max(), f"error {error}"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "k"), [(36, 130), (1024, 3072), (1024, 2048), (4096, 1024), (6144, 1024), (960, 576), (576, 1536)]
)
def test_linear(n: int, k: int, dtype: torch.dtype) -> None:
    x, weight, bias = random(ROWS, k, dtype=dtype), random(n, k, dtype=dtype, seed=1), random(n, dtype=dtype)
    alone, wide = check_rows(
        lambda rows: tuple(ops.linear(x[rows], weight, bias, wide) for wide in (False, True))
    )
    assert wide.dtype == torch.float32
    assert same_bits(wide.to(dtype), alone)
    close(alone, x.double() @ weight.double().t() + bias.double(), dtype)
    large = torch.cat([x] * 8)
    assert same_bits(ops.linear(large, weight, bias), torch.cat([alone] * 8)), "tall tiles"


def quantised(n: int, k: int, group_size: int, bits: int, desc_act: bool) -> Quantized:
    return pytree.tree_map(lambda part: part.to(DEVICE), weight(n, k, group_size, bits, desc_act))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(
    ("n", "k", "group_size"),
    [(36, 130, 48), (960, 576, 32), (1024, 3072, 128), (4096, 1024, -1), (6144, 1024, 64), (20, 20, 128)],
)
def test_quantised_linear(n: int, k: int, group_size: int, bits: int, dtype: torch.dtype) -> None:
    x, bias = random(ROWS, k, dtype=dtype), random(n, dtype=dtype)
    for desc_act in (False, True):
        packed = quantised(n, k, group_size, bits, desc_act)
        (alone,) = check_rows(lambda rows, packed=packed: (ops.linear(x[rows], packed, bias),))
        assert same_bits(ops.linear(x, packed, bias, wide=True).to(dtype), alone)
        close(alone, x.double() @ packed.plain(torch.float64).t() + bias.double(), dtype)
        large = torch.cat([x] * 8)
        assert same_bits(ops.linear(large, packed, bias), torch.cat([alone] * 8)), "tall tiles"


@pytest.mark.parametrize("bits", BITS)
def test_every_code_of_a_quantised_weight_finds_its_place(bits: int) -> None:
    """A row that is one column of 1 gives that column of the weight, which float32 holds exactly."""
    for n, k, group_size in ((36, 130, 48), (960, 576, 32), (100, 192, 128), (48, 96, -1)):
        for desc_act in (False, True):
            packed = quantised(n, k, group_size, bits, desc_act)
            one = torch.eye(k, device=DEVICE)
            assert torch.equal(ops.linear(one, packed), packed.plain().t()), (n, k, desc_act)
            for dtype in HALF:
                assert torch.equal(ops.linear(one.to(dtype), packed), packed.plain().t().to(dtype)), dtype


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_quantised_linear_does_not_wait_for_the_device() -> None:
    packed, x = quantised(96, 160, 32, 4, desc_act=True), random(5, 160, dtype=torch.bfloat16)
    expected = ops.linear(x, packed)
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ops.linear(x, packed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert same_bits(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [20, 576, 1024, 4096])
def test_norms_and_silu(width: int, dtype: torch.dtype) -> None:
    x, residual = random(ROWS, width, dtype=dtype), random(ROWS, width, dtype=dtype, seed=1)
    weight = random(width, dtype=dtype)
    (alone,) = check_rows(lambda rows: (ops.rms_norm(x[rows], weight, 1e-6),))
    close(alone, reference.rms_norm(x.double(), weight.double(), 1e-6), dtype)
    check_rows(lambda rows: ops.add_rms_norm(x[rows], residual[rows], weight, 1e-6))
    (alone,) = check_rows(lambda rows: (ops.silu_mul(x[rows]),))
    close(alone, reference.silu_mul(x.double()), dtype)


def test_rope_angles_are_those_of_large_positions() -> None:
    inv_freq = 1e6 ** (-torch.arange(0, 128, 2, device=DEVICE) / 128)
    positions = torch.tensor([0, 1, 77, 4095, 40_959, 131_071], device=DEVICE)
    found = ops.rope_angles(positions, inv_freq)
    angles = (positions.float()[:, None] * inv_freq).double()  # float32 products, as specified
    torch.testing.assert_close(found.double(), torch.cat((angles.cos(), angles.sin()), 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128, 256])
@pytest.mark.parametrize("normed", [True, False])
def test_qk_norm_rope_write(head_dim: int, normed: bool, dtype: torch.dtype) -> None:
    count, heads, kv_heads = 70, 4, 2
    qkv = random(count, (heads + 2 * kv_heads) * head_dim, dtype=dtype)
    angles = ops.rope_angles(torch.arange(count, device=DEVICE), torch.rand(head_dim // 2, device=DEVICE))
    norms: Any = (None, None)
    if normed:
        norms = random(head_dim, dtype=dtype), random(head_dim, dtype=dtype, seed=1)
    slots = torch.randperm(12 * 8, device=DEVICE)[:count]
    slots[3] = -1

    def caches(kind: torch.dtype) -> Any:
        shape = (2, 12, kv_heads, 8, head_dim)
        return list(torch.zeros(shape, dtype=kind, device=DEVICE).transpose(2, 3))

    mine, exact = caches(dtype), caches(torch.float64)
    q = ops.qk_norm_rope_write(qkv, angles, *norms, 1e-6, *mine, slots)
    q_norm, k_norm = (None if norm is None else norm.double() for norm in norms)
    expected = reference.qk_norm_rope_write(
        qkv.double(), angles.double(), q_norm, k_norm, 1e-6, exact[0], exact[1], slots
    )
    close(q, expected, dtype, 4)
    for cache, right in zip(mine, exact, strict=True):
        close(cache, right, dtype, 4)
    for row in (0, 3, 41):
        own = caches(dtype)
        one = slice(row, row + 1)
        alone = ops.qk_norm_rope_write(qkv[one], angles[one], *norms, 1e-6, *own, slots[one])
        assert row == 3 or same_bits(alone, q[one])
        if slots[row] >= 0:
            place = slots[row] // 8, slots[row] % 8
            assert all(same_bits(a[place], b[place]) for a, b in zip(own, mine, strict=True))


class Sequences:
    """Contexts of several lengths in pages of one heap, placed at random."""

    def __init__(
        self, lengths: list[int], block_size: int, heads: tuple[int, int, int], dtype: torch.dtype, seed: int
    ) -> None:
        num_heads, kv_heads, head_dim = heads
        self.lengths, self.size, self.scale = lengths, block_size, head_dim**-0.5
        pages = [-(-length // block_size) for length in lengths]
        order = iter(torch.randperm(sum(pages), generator=torch.Generator().manual_seed(seed)).tolist())
        self.tables = torch.zeros(len(lengths), max(pages), dtype=torch.int32)
        shape = (2, sum(pages), kv_heads, block_size, head_dim)
        self.k, self.v = torch.full(shape, torch.nan, dtype=dtype, device=DEVICE).transpose(2, 3)
        self.q, self.keys, self.values = [], [], []
        for s, length in enumerate(lengths):
            self.q.append(random(length, num_heads, head_dim, dtype=dtype, seed=s))
            self.keys.append(random(length, kv_heads, head_dim, dtype=dtype, seed=100 + s))
            self.values.append(random(length, kv_heads, head_dim, dtype=dtype, seed=200 + s))
            for page in range(pages[s]):
                place = next(order)
                self.tables[s, page] = place
                own = slice(page * block_size, min(length, (page + 1) * block_size))
                self.k[place, : own.stop - own.start] = self.keys[s][own]
                self.v[place, : own.stop - own.start] = self.values[s][own]

    def attend(self, chosen: list[tuple[int, int, int]]) -> list[Tensor]:
        """Rows [begin, end) of sequence s, for each (s, begin, end), in one call; padding comes last."""
        rows = [self.q[s][begin:end] for s, begin, end in chosen]
        counts = [0, *(end - begin for _, begin, end in chosen), 3]
        lens = [end for *_, end in chosen]
        out = ops.paged_attention(
            torch.cat([*rows, self.q[0][:3]]),
            self.k,
            self.v,
            torch.cat([self.tables[[s for s, *_ in chosen]], self.tables[:1] * 0]).to(DEVICE),
            torch.tensor(counts).cumsum(0).int().to(DEVICE),
            torch.tensor([*lens, 0], dtype=torch.int32, device=DEVICE),
            self.scale,
        )
        assert not out[-3:].any(), "padding"
        return list(out[:-3].split(counts[1:-1]))

    def exact(self, s: int) -> Tensor:
        group = self.q[s].shape[1] // self.keys[s].shape[1]
        keys, values = (x.double().repeat_interleave(group, 1) for x in (self.keys[s], self.values[s]))
        scores = torch.einsum("qhe,khe->hqk", self.q[s].double(), keys) * self.scale
        mask = torch.ones(scores.shape[-2:], device=DEVICE).tril().bool()
        return torch.einsum("hqk,khe->qhe", torch.softmax(scores.masked_fill(~mask, -torch.inf), -1), values)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(16, 8, 128), (9, 3, 64), (4, 2, 80), (4, 4, 256), (8, 1, 96)])
@pytest.mark.parametrize("block_size", [8, 16, 256])
def test_attention(block_size: int, heads: tuple[int, int, int], dtype: torch.dtype) -> None:
    lengths = [700, 1, 257, 64, 300]
    problem = Sequences(lengths, block_size, heads, dtype, seed=0)
    whole = [problem.attend([(s, 0, length)])[0] for s, length in enumerate(lengths)]
    for s, found in enumerate(whole):
        close(found, problem.exact(s), dtype, 2)
    together = problem.attend([(s, 0, length) for s, length in enumerate(lengths)])
    assert all(same_bits(a, b) for a, b in zip(together, whole, strict=True))
    for chunk in (1, 7, 16, 64):
        for s in (0, 2, 4):
            for begin in range(lengths[s] - lengths[s] % chunk - chunk, lengths[s], chunk):
                end = min(begin + chunk, lengths[s])
                rows = problem.attend([(2, 256, 257), (s, begin, end), (1, 0, 1)])[1]
                assert same_bits(rows, whole[s][begin:end]), (s, begin, chunk)
    decodes = problem.attend([(s, length - 1, length) for s, length in enumerate(lengths)] * 20)
    for row, expected in zip(decodes, [w[-1:] for w in whole] * 20, strict=True):
        assert same_bits(row, expected), "decodes of a full batch"
    moved = Sequences(lengths, {8: 16, 16: 32, 256: 8}[block_size], heads, dtype, seed=5)
    for s, length in enumerate(lengths):
        assert same_bits(moved.attend([(s, 0, length)])[0], whole[s]), "other pages, of another size"


def test_the_sampler_draws_what_the_reference_draws() -> None:
    logits = (random(70, 5000) * 256).round() / 64  # equal, or so far apart that no rounding makes them equal
    logits[3] = torch.nan
    logits[5, 17] = torch.inf
    logits[6] = -torch.inf
    u, position = torch.rand(70, device=DEVICE), torch.arange(70, device=DEVICE)
    u = (u * 2**24).floor() / 2**24
    greedy = position % 3 == 0
    found, expected = ops.draw(logits, greedy, u), sampler.draw(logits, greedy, u)
    assert (found != expected).sum() <= 1, "exp may differ in its last bit, at the edge of a token"
    assert torch.equal(found[greedy], expected[greedy])
    counter = position * 7919, position, position % 5, 0
    assert torch.equal(ops.philox(*counter), sampler.philox(*counter))
    good = logits[7:]  # what is left of a row that holds no number is not specified
    one, zero = torch.ones(63, device=DEVICE), torch.zeros(63, device=DEVICE)
    for top_k, top_p, min_p in ((0, 1.0, 0.0), (5, 1.0, 0.0), (0, 0.7, 0.0), (40, 0.9, 0.02)):
        options = one * 0.8, zero + min_p, (zero + top_k).long(), zero + top_p
        a, b = ops.warp(good, *options), sampler.warp(good, *options)
        both = torch.isfinite(a) & torch.isfinite(b)
        assert (torch.isfinite(a) != torch.isfinite(b)).sum() <= 2, (top_k, top_p, min_p)
        torch.testing.assert_close(a[both], b[both], rtol=1e-6, atol=0)
    picked = good, position[7:], 5
    for a, b in zip(ops.pick_logprobs(*picked), sampler.pick_logprobs(*picked), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
    check = random(ROWS, 5000)
    check_rows(lambda rows: (ops.log_softmax(check[rows]), ops.draw(check[rows], rows < 0, rows / 512)))


@pytest.fixture(scope="module")
def tiny_on_cuda(tiny_dir: Path) -> folo.Params:
    return folo.load(str(tiny_dir), device=DEVICE, use_tqdm=False)


@pytest.fixture(scope="module", params=["dense", "4 bits"])
def matrix(
    request: pytest.FixtureRequest, tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Subject, Run]:
    path = tiny_dir
    if request.param == "4 bits":
        path = tmp_path_factory.mktemp("gptq")
        gptq_checkpoint(path, Style(desc_act=True), architecture="qwen3", tokenizer=True)
    params = folo.load(str(path), device=DEVICE, use_tqdm=False)
    asked = invariance.requests(invariance.random_prompts(300))
    subject = Subject(params, str(path), asked, invariance.SMALL_POOLS)
    return subject, run(subject, REFERENCE)


@pytest.mark.parametrize("cell", [cell for cell in array() if cell.history != "restored"], ids=str)
def test_the_invariance_matrix_holds(cell: Any, matrix: tuple[Subject, Run]) -> None:
    result = invariance.compare(*matrix, cell)
    assert (result.differing_tokens, result.differing_logprobs) == (0, 0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_replayed_graphs_give_the_outputs_of_eager_steps(dtype: torch.dtype, tiny_dir: Path) -> None:
    params = folo.load(str(tiny_dir), dtype=dtype, device=DEVICE, use_tqdm=False)
    cache, scheduler = folo.CacheConfig(num_blocks=200), folo.SchedulerConfig(max_num_seqs=24)
    state = folo.init(params, cache, scheduler)
    variants: tuple[dict[str, Any], ...] = (
        {"temperature": 0.0},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.9},
        {"logprobs": 2},
        {"frequency_penalty": 0.5},
        {"stop_token_ids": tuple(range(0, 300, 11))},
    )
    for n in range(20):
        sampling = folo.SamplingParams(**variants[n % 5], seed=n, max_tokens=30 + n, ignore_eos=True)
        state = folo.submit(state, folo.Request(prompt(3 + 6 * n, n), sampling, f"r{n}"))
    expected = folo.outputs(finish_all(params, state))
    step, after, tokens = folo.compile(folo.step, mode="cudagraph"), state, []
    while (batch := folo.schedule(after)) is not None:
        after, new = step(params, after, batch)
        tokens.append(new)
    assert folo.outputs(after) == expected
    found: dict[str, list[int]] = {}
    for new in tokens:
        for id, token in zip(new.request_ids, new.ids.tolist(), strict=True):
            found.setdefault(id, []).append(token)
    assert found == {id: output.outputs[0].token_ids for id, output in expected.items()}


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype:UserWarning")
def test_a_replayed_step_is_launched_without_waiting_for_the_device(tiny_on_cuda: folo.Params) -> None:
    state = folo.init(tiny_on_cuda, folo.CacheConfig(num_blocks=100))
    for n in range(4):
        sampling = folo.SamplingParams(seed=n, max_tokens=40, ignore_eos=True)
        state = folo.submit(state, folo.Request(prompt(20, n), sampling, f"r{n}"))
    step = folo.compile(folo.step, mode="cudagraph")
    for number in range(12):
        batch = folo.schedule(state)
        assert batch is not None
        if number > 6:  # an event is waited for, which this does not count; a copy to pageable memory it does
            torch.cuda.set_sync_debug_mode("error")
        try:
            state, _ = step(tiny_on_cuda, state, batch)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert state.flight is not None


def test_greedy_float32_is_transformers(tmp_path: Path) -> None:
    model: Any = tiny_checkpoint(tmp_path, "qwen3")
    params = folo.load(tmp_path, dtype="float32", device=DEVICE, use_tqdm=False)
    model.to(DEVICE)
    ids = torch.tensor([prompt(24, 3)], device=DEVICE)
    model.generation_config.eos_token_id = None
    mask = torch.ones_like(ids)
    expected = model.generate(ids, attention_mask=mask, max_new_tokens=64, do_sample=False, pad_token_id=0)
    state = folo.init(params, folo.CacheConfig(num_blocks=20))
    sampling = folo.SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    state = folo.submit(state, folo.Request(ids[0].tolist(), sampling, "a"))
    assert folo.outputs(finish_all(params, state))["a"].outputs[0].token_ids == expected[0, 24:].tolist()


def test_torchs_varlen_attn_computes_the_same_attention_or_is_refused(tiny_dir: Path) -> None:
    params = folo.load(str(tiny_dir), dtype="bfloat16", device=DEVICE, use_tqdm=False)
    cache, logprobs = folo.CacheConfig(block_size=256, num_blocks=20), []
    if BACKENDS["torch"].lacks(params.device, params.dtype) is not None:  # torch 2.11's has no block tables
        with pytest.raises(folo.ConfigError, match="attention='torch'"):
            folo.init(params, cache, attention="torch", deterministic=False)
        return
    for attention in ("triton", "torch"):
        state = folo.init(params, cache, attention=attention, deterministic=False)
        sampling = folo.SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=0)
        state = folo.submit(state, folo.Request(prompt(200), sampling, "a"))
        tables = folo.outputs(finish_all(params, state))["a"].prompt_logprobs
        assert tables is not None
        logprobs.append([next(iter(table.values())).logprob for table in tables[1:] if table])
    torch.testing.assert_close(torch.tensor(logprobs[0]), torch.tensor(logprobs[1]), rtol=0, atol=0.1)
