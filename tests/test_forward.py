"""`folo.model.forward`: the transformers module's logits, and the engine's bits."""

from __future__ import annotations

import importlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import VOCAB_SIZE, tiny_checkpoint
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map
from transformers import PreTrainedModel

import folo
from folo import ops
from folo.model import device
from folo.state.bind import bind
from folo.state.layout import inputs_of

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "llama llama3 rope": ("llama", {"rope_parameters": LLAMA3}),
    "llama biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama MHA": ("llama", {"num_key_value_heads": 4}),
    "llama MQA": ("llama", {"num_key_value_heads": 1}),
    "llama three to one": (
        "llama",
        {"hidden_size": 72, "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 8},
    ),
    "llama wide heads": ("llama", {"head_dim": 40}),
    "llama one layer": ("llama", {"num_hidden_layers": 1, "intermediate_size": 100}),
    "mistral": ("mistral", {}),
    "mistral MQA": ("mistral", {"num_key_value_heads": 1, "head_dim": 64}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "qwen3": ("qwen3", {}),
    "qwen3 tied MHA": ("qwen3", {"tie_word_embeddings": True, "num_key_value_heads": 4, "head_dim": 32}),
    "qwen3 biases": ("qwen3", {"attention_bias": True}),
}
LENGTHS = (1, 5, 33, 150)


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(VOCAB_SIZE, (length,), generator=torch.Generator().manual_seed(seed))


def build(path: Path, name: str, dtype: torch.dtype = torch.float32) -> tuple[PreTrainedModel, folo.Params]:
    architecture, overrides = MODELS[name]
    model = tiny_checkpoint(path, architecture, **overrides)
    return model, folo.load(path, dtype=dtype, use_tqdm=False)


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """In float32, to 1e-4 of the largest logit; what is seen is near 1e-6, of another order of summation."""
    model, params = build(tmp_path, name)
    for length in LENGTHS:
        ids = tokens(length)
        with torch.inference_mode():
            expected = model(ids[None]).logits[0]
        got = folo.model.forward(params, ids)
        assert got.dtype == torch.float32
        assert got.shape == (length, VOCAB_SIZE)
        error = (got - expected).abs().max() / expected.abs().max()
        assert error <= 1e-4, length


def test_logits_of_half_precision_are_near_those_of_float32(tmp_path: Path) -> None:
    """Two layers of bfloat16 and float16 lose a few of their 8 and 11 bits."""
    model, _ = build(tmp_path, "qwen3")
    ids = tokens(33)
    with torch.inference_mode():
        expected = model(ids[None]).logits[0]
    for dtype, tolerance in ((torch.bfloat16, 5e-2), (torch.float16, 7e-3)):
        got = folo.model.forward(folo.load(tmp_path, dtype=dtype, use_tqdm=False), ids)
        assert got.dtype == torch.float32
        assert (got - expected).abs().max() <= tolerance * expected.abs().max()


def test_a_prefix_has_the_same_logits(tiny: folo.Params) -> None:
    ids = tokens(150)
    whole = folo.model.forward(tiny, ids)
    for length in LENGTHS:
        assert torch.equal(folo.model.forward(tiny, ids[:length]), whole[:length])


# --- the engine's path


def engine_logprobs(
    params: folo.Params, prompt: list[int], budget: int, output: int
) -> tuple[list[int], Tensor]:
    """A request through the engine -> the sampled ids, and the logprobs of prompt[1:] and of those."""
    scheduler = folo.SchedulerConfig(max_num_batched_tokens=budget, max_num_seqs=4)
    state = folo.init(params, folo.CacheConfig(num_blocks=64), scheduler)
    sampling = folo.SamplingParams(
        temperature=0.8, seed=3, max_tokens=output, ignore_eos=True, logprobs=0, prompt_logprobs=0
    )
    state = folo.submit(state, folo.Request(prompt, sampling, id="a"))
    while (batch := folo.schedule(state)) is not None:
        state, _ = folo.step(params, state, batch)
    result = folo.outputs(state)["a"]
    ids, scored = result.outputs[0].token_ids, result.outputs[0].logprobs
    assert result.prompt_logprobs is not None
    assert scored is not None
    entries = [*result.prompt_logprobs[1:], *scored]
    sequence = [*prompt[1:], *ids]
    values = [entry[token].logprob for entry, token in zip(entries, sequence, strict=True) if entry]
    return ids, torch.tensor(values)


@pytest.mark.parametrize("name", ["llama tied", "qwen2", "qwen3", "llama three to one"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward_gives_the_bits_of_the_engine(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    _, params = build(tmp_path, name, dtype)
    prompt = tokens(75).tolist()
    for budget in (7, 64):
        ids, engine = engine_logprobs(params, prompt, budget, output=6)
        sequence = torch.tensor([*prompt, *ids])
        logprobs = ops.log_softmax(folo.model.forward(params, sequence[:-1]))
        expected = logprobs.gather(-1, sequence[1:, None])[:, 0]
        assert torch.equal(engine, expected), budget


@pytest.mark.parametrize(
    "name", ["llama biases", "llama wide heads", "llama one layer", "llama three to one", "qwen3", "qwen2"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_layers_in_one_call_are_their_ops_one_by_one(
    name: str, dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Packed weights go through `ops.decoder_layers`, all at once or one by one; plain ones op by op."""
    _, params = build(tmp_path, name, dtype)
    assert params.packed
    called: list[Any] = []
    whole = ops.decoder_layers

    def count(*args: Any) -> tuple[Tensor, Tensor]:
        called.append(args)
        return whole(*args)

    monkeypatch.setattr(ops, "decoder_layers", count)
    logits = folo.model.forward(params, tokens(75))
    assert len(called) == 1
    op = torch.ops.folo.decoder_layers.default
    torch.library.opcheck(op, called[0], test_utils=("test_schema", "test_faketensor"))
    module = importlib.import_module("folo.model.forward")  # `folo.model.forward` is the function
    monkeypatch.setattr(module, "_FEW_ROWS", 74)
    assert torch.equal(folo.model.forward(params, tokens(75)), logits)
    assert len(called) == 1 + params.config.num_layers
    monkeypatch.setattr(module, "in_groups", lambda layers: None)
    assert torch.equal(folo.model.forward(params, tokens(75)), logits)
    assert len(called) == 1 + params.config.num_layers
    plain = folo.load(tmp_path, dtype=dtype, pack=False, use_tqdm=False)
    assert torch.equal(folo.model.forward(plain, tokens(75)), logits)


@pytest.mark.parametrize("name", ["llama biases", "llama one layer", "qwen3"])
def test_behind_the_last_attention_are_the_wanted_rows_alone(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, packed = build(tmp_path, name)
    plain = folo.load(tmp_path, dtype="float32", pack=False, use_tqdm=False)
    heights: list[int] = []
    linear = ops.linear

    def count(x: Tensor, *args: Any) -> Tensor:
        heights.append(x.shape[0])
        return linear(x, *args)

    def hidden(params: folo.Params, wanted: list[int] | None) -> Tensor:
        state = folo.submit(folo.init(params), folo.Request(tokens(75).tolist(), id="a"))
        batch = folo.schedule(state)
        assert batch is not None
        inputs = inputs_of(bind(batch))
        assert inputs.logits_rows is not None
        assert inputs.logits_rows.tolist() == [74]
        rows = None if wanted is None else torch.tensor(wanted, dtype=torch.int64)
        k, v = state.heap.k, state.heap.v
        return device.run(params, k, v, replace(inputs, logits_rows=rows), state.attention)

    monkeypatch.setattr(ops, "linear", count)
    every = hidden(plain, None)
    assert set(heights) == {75}
    module = importlib.import_module("folo.model.forward")
    for few in (module._FEW_ROWS, 74):  # layers in one call; one by one
        monkeypatch.setattr(module, "_FEW_ROWS", few)
        for wanted in ([74], [70, 3, 74], []):
            assert torch.equal(hidden(packed, wanted), every[wanted])
            heights.clear()
            assert torch.equal(hidden(plain, wanted), every[wanted])
            assert heights[-3:] == [75, len(wanted), len(wanted)], "projections to qkv, from heads, down"


def test_forward_leaves_its_arguments_alone(tiny: folo.Params) -> None:
    ids = tokens(20)
    before, weights = ids.clone(), tree_map(torch.clone, tiny)
    folo.model.forward(tiny, ids)
    assert torch.equal(ids, before)
    for leaf, expected in zip(tree_leaves(tiny), tree_leaves(weights), strict=True):
        assert torch.equal(leaf, expected)


def test_every_integer_dtype_will_do(tiny: folo.Params) -> None:
    ids = tokens(9) % 100
    expected = folo.model.forward(tiny, ids)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32):
        assert torch.equal(folo.model.forward(tiny, ids.to(dtype)), expected)


@pytest.mark.parametrize("shape", [(), (0,), (1, 3), (2, 2)])
def test_other_shapes_are_refused(tiny: folo.Params, shape: tuple[int, ...]) -> None:
    with pytest.raises(folo.ConfigError, match=r"shape \[T\]"):
        folo.model.forward(tiny, torch.zeros(shape, dtype=torch.int64))


def test_more_tokens_than_positions_are_refused(tiny: folo.Params) -> None:
    folo.model.forward(tiny, tokens(256))
    with pytest.raises(folo.ConfigError, match="257 tokens exceed the model's 256 positions"):
        folo.model.forward(tiny, tokens(257))


def test_token_ids_outside_the_vocabulary_are_refused(tiny: folo.Params) -> None:
    vocab_size = tiny.config.vocab_size
    assert folo.model.forward(tiny, torch.tensor([0, vocab_size - 1])).shape == (2, vocab_size)
    for wrong in (-1, vocab_size, 10**6):
        with pytest.raises(folo.ConfigError, match=f"token id {wrong} is outside .* of {vocab_size}"):
            folo.model.forward(tiny, torch.tensor([5, wrong, 6]))


@pytest.mark.parametrize(
    ("ids", "kind"),
    [
        ([5, 6], "list"),
        (torch.tensor([5.0]), "torch.float32"),
        (torch.tensor([True]), "torch.bool"),
        (torch.tensor([1j]), "torch.complex64"),
    ],
)
def test_token_ids_that_are_no_integer_tensor(tiny: folo.Params, ids: Any, kind: str) -> None:
    with pytest.raises(folo.ConfigError, match=f"must be an integer tensor, got {kind}"):
        folo.model.forward(tiny, ids)
