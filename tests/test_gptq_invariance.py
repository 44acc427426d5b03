"""The promises hold for a quantised model: the invariance matrix, saved states, `forward` and compilation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_tokenizer
from engine import finish_all, ids_of, prompt, run, stepped
from gptq_files import Style, gptq_checkpoint
from test_invariance import title, verify
from torch import Tensor

import folo
from folo import ops
from folo.bench import cells
from folo.bench.cells import REFERENCE, Cell, Run, Subject, array
from folo.bench.invariance import SMALL_POOLS, prompts, requests
from folo.ops import cpu
from folo.ops.stacked import Stacked


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Layers in an order of their own, but for one that stays dense beside quantised ones."""
    path = tmp_path_factory.mktemp("gptq")
    gptq_checkpoint(path, Style(desc_act=True), skip=("layers.1.self_attn.v_proj",), architecture="qwen3")
    tiny_tokenizer().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def params(directory: Path) -> folo.Params:
    return folo.load(directory, use_tqdm=False)


@pytest.fixture(scope="module")
def subject(params: folo.Params, directory: Path) -> Subject:
    return Subject(params, str(directory), requests(prompts(tiny_tokenizer())), SMALL_POOLS)


@pytest.fixture(scope="module")
def reference(subject: Subject) -> Run:
    return cells.run(subject, REFERENCE)


@pytest.mark.no_cover
@pytest.mark.parametrize("cell", array(), ids=title)
def test_all_pairs(cell: Cell, subject: Subject, reference: Run) -> None:
    verify(subject, reference, cell)


def test_forward_is_what_the_engine_computes(params: folo.Params) -> None:
    assert isinstance(params.layers[1].qkv.weight, Stacked)
    ids = prompt(40)
    sampling = folo.SamplingParams(temperature=0, max_tokens=8, logprobs=0, ignore_eos=True)
    output = run(params, [folo.Request(ids, sampling, id="a")])["a"].outputs[0]
    logits = folo.model.forward(params, torch.tensor([*ids, *output.token_ids[:-1]]))
    logprobs, *_ = ops.pick_logprobs(logits[len(ids) - 1 :], torch.tensor(output.token_ids), 0)
    assert output.logprobs is not None
    found = [table[token].logprob for table, token in zip(output.logprobs, output.token_ids, strict=True)]
    assert found == logprobs.tolist()


@pytest.mark.skipif(cpu.instruction_set() == cpu.REFERENCE, reason="plain torch has no op of a whole layer")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("style", [Style(), Style(desc_act=True), Style(bits=8, group_size=-1)])
def test_a_layer_in_one_call_is_its_ops_one_by_one(
    style: Style, dtype: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second layer has a dense part, and is not one call; so neither are all of them."""
    gptq_checkpoint(tmp_path, style, skip=("layers.1.self_attn.v_proj",), architecture="qwen3")
    params = folo.load(tmp_path, dtype=dtype, use_tqdm=False)
    called: list[Any] = []
    whole = ops.decoder_layers

    def count(*args: Any) -> tuple[Tensor, Tensor]:
        called.append(args)
        return whole(*args)

    ids = torch.tensor(prompt(40))
    monkeypatch.setattr(ops, "decoder_layers", count)
    logits = folo.model.forward(params, ids)
    assert len(called) == params.config.num_layers - 1
    op = torch.ops.folo.decoder_layers.default
    torch.library.opcheck(op, called[0], test_utils=("test_schema", "test_faketensor"))
    monkeypatch.setattr(ops, "is_own", lambda weight: False)
    assert torch.equal(folo.model.forward(params, ids), logits)
    assert len(called) == params.config.num_layers - 1


def test_a_saved_state_goes_on_with_the_same_weights_alone(
    params: folo.Params, directory: Path, tmp_path: Path
) -> None:
    sampling = folo.SamplingParams(temperature=1, seed=3, max_tokens=12, ignore_eos=True)
    state = folo.init(params, folo.CacheConfig(num_blocks=32))
    state = stepped(params, folo.submit(state, folo.Request(prompt(20), sampling, id="a")), 4)
    folo.save(state, tmp_path / "state")
    again = folo.load(directory, use_tqdm=False)
    restored = folo.restore(again, tmp_path / "state")
    assert ids_of(finish_all(again, restored), "a") == ids_of(finish_all(params, state), "a")
    gptq_checkpoint(tmp_path / "other", Style(), architecture="qwen3")
    with pytest.raises(folo.ParamsMismatchError):
        folo.restore(folo.load(tmp_path / "other", use_tqdm=False), tmp_path / "state")


def test_half_dtypes_keep_the_promise_too(params: folo.Params, directory: Path) -> None:
    for dtype in ("bfloat16", "float16"):
        half = folo.load(directory, dtype=dtype, use_tqdm=False)
        assert half.fingerprint != params.fingerprint
        sampling = folo.SamplingParams(temperature=1, max_tokens=6, logprobs=1, ignore_eos=True)
        asked = [folo.Request(prompt(n), replace(sampling, seed=n), id=str(n)) for n in (5, 17, 40)]
        together = run(half, asked)
        for request in asked:
            alone = run(half, [request])[str(request.id)].outputs[0]
            assert alone.logprobs == together[str(request.id)].outputs[0].logprobs
