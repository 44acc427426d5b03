"""The engine on a virtual CUDA device: the CPU's tokens, by the calls that a GPU takes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import virtual_cuda
from engine import finish_all, prompt
from gptq_files import Style, gptq_checkpoint
from virtual_tensors import VirtualCuda

import folo
from folo.config import CompileMode
from folo.sampling import Context

pytestmark = [pytest.mark.no_cover, pytest.mark.usefixtures("reference_ops")]

SMALL = folo.CacheConfig(block_size=8, num_blocks=12, reserve_blocks=60)  # sequences preempt one another
TIGHT = folo.SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=24)  # prompts come in chunks


@pytest.fixture
def device() -> Iterator[VirtualCuda]:
    with virtual_cuda.entered() as device:
        yield device


@pytest.fixture(scope="module")
def quantised_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gptq")
    gptq_checkpoint(path, Style(desc_act=True), architecture="qwen3", tokenizer=True)
    return path


def shift(logits: torch.Tensor, context: Context) -> torch.Tensor:
    return logits.roll(context.position % 3)


VARIANTS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.9, "top_k": 20, "top_p": 0.9, "min_p": 0.01},
    {"logprobs": 2, "prompt_logprobs": 1},
    {"frequency_penalty": 0.5, "repetition_penalty": 1.2},
    {"stop_token_ids": tuple(range(0, 300, 11)), "n": 2},
    {"logprobs": 1, "logprobs_mode": "processed", "logit_bias": {5: 4.0}, "min_tokens": 3},
    {"logits_processors": (shift,)},
)


def submitted(params: folo.Params, variants: tuple[dict[str, Any], ...] = VARIANTS) -> folo.EngineState:
    """A request of each variant; prompts share their first tokens."""
    state = folo.init(params, SMALL, TIGHT)
    for n, variant in enumerate(variants):
        sampling = folo.SamplingParams(**variant, seed=n, max_tokens=8 + 2 * n, ignore_eos=True)
        state = folo.submit(state, folo.Request([*prompt(17), *prompt(3 + 6 * n, n)], sampling, f"r{n}"))
    return state


def ended(params: folo.Params, state: folo.EngineState, mode: CompileMode) -> folo.EngineState:
    step = folo.compile(folo.step, mode=mode)
    while (batch := folo.schedule(state)) is not None:
        state, _ = step(params, state, batch)
        folo.check(state)
    return state


@pytest.mark.parametrize(
    ("weights", "dtype", "mode"),
    [
        ("tiny_dir", "float32", "cudagraph"),
        ("tiny_dir", "bfloat16", "inductor"),
        ("quantised_dir", "float16", "cudagraph"),
        ("quantised_dir", "bfloat16", "eager"),
    ],
)
def test_outputs_are_those_of_the_cpu(
    weights: str, dtype: str, mode: CompileMode, device: VirtualCuda, request: pytest.FixtureRequest
) -> None:
    directory = request.getfixturevalue(weights)
    here, there = (folo.load(directory, dtype, where, use_tqdm=False) for where in ("cpu", "cuda"))
    expected = finish_all(here, submitted(here))
    found = ended(there, submitted(there), mode)
    assert folo.outputs(found) == folo.outputs(expected)
    assert found.counters.preemptions > 0
    assert found.counters.prefix_hits > 0
    assert device.num_kernels > 0


def test_a_heap_takes_the_memory_of_one_that_is_gone(tiny_dir: Path, device: VirtualCuda) -> None:
    params = folo.load(tiny_dir, "float32", "cuda", use_tqdm=False)
    share = folo.CacheConfig(gpu_memory_utilization=0.2)
    sizes = [folo.init(params, share, TIGHT).cache.num_blocks for _ in range(3)]
    assert sizes == [sizes[0]] * 3


@pytest.mark.parametrize("mode", ["eager", "cudagraph"])
def test_a_state_is_forked_saved_and_goes_on_on_another_device(
    mode: CompileMode, tiny_dir: Path, tmp_path: Path, device: VirtualCuda
) -> None:
    here, there = (folo.load(tiny_dir, "float32", where, use_tqdm=False) for where in ("cpu", "cuda"))
    variants = VARIANTS[:-1]  # a function has no name in a file
    expected = folo.outputs(finish_all(here, submitted(here, variants)))
    state = submitted(there, variants)
    step = folo.compile(folo.step, mode=mode)
    for _ in range(9):
        batch = folo.schedule(state)
        assert batch is not None
        state, _ = step(there, state, batch)
    folo.save(state, tmp_path / "state")
    forked = folo.fork(state, "r5", ["child"])
    outputs = folo.outputs(ended(there, forked, mode))
    assert outputs["child"].outputs[0].token_ids == outputs["r5"].outputs[0].token_ids
    assert folo.outputs(ended(there, state, mode)) == expected
    for params, recompute in ((there, False), (here, True)):
        restored = folo.restore(params, tmp_path / "state", recompute=recompute)
        assert folo.outputs(finish_all(params, restored)) == expected
    rebound = folo.rebind(state, folo.load(tiny_dir, "float32", "cuda", use_tqdm=False))
    assert folo.outputs(ended(rebound.params, rebound, mode)) == expected


@pytest.mark.parametrize("mode", ["inductor", "cudagraph"])
def test_whatever_the_current_device_is_a_step_runs_on_its_own(
    mode: CompileMode, tiny_dir: Path, device: VirtualCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Events are recorded, and graphs captured, on the current device."""
    inside, found = list[torch.Tensor](), list[bool]()

    @contextmanager
    def device_of(tensor: torch.Tensor) -> Iterator[None]:
        inside.append(tensor)
        yield
        inside.pop()

    def noting(name: str) -> Any:
        original = getattr(torch.cuda, name)
        return lambda *args, **options: (found.append(bool(inside)), original(*args, **options))[1]

    state = submitted(folo.load(tiny_dir, "float32", "cuda", use_tqdm=False))
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    for name in ("Event", "graph"):
        monkeypatch.setattr(torch.cuda, name, noting(name))
    ended(state.params, state, mode)
    assert found, "there are some"
    assert all(found)


def test_llm_generates_streams_and_takes_cuda_by_itself(tiny_dir: Path, device: VirtualCuda) -> None:
    llm = folo.LLM(str(tiny_dir), num_blocks=40)
    assert llm.params.device.type == "cuda"
    sampling = folo.SamplingParams(temperature=0.8, max_tokens=12, seed=3, ignore_eos=True)
    outs = llm.generate(["the cat", "and the hat"], sampling, use_tqdm=False)
    assert [len(out.outputs[0].token_ids) for out in outs] == [12, 12]
    assert "".join(llm.stream("the cat", sampling)) == outs[0].outputs[0].text


CHOSEN = """
    not_wait or without_waiting or (replayed and dtype2) or (norms and 20-dtype0) or rope_angles
    or True-80-dtype0 or sampler or finds_its_place or greedy
"""


def test_the_tests_for_a_gpu_pass_as_far_as_they_are_not_about_its_arithmetic() -> None:
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-p", "virtual_cuda", "-p", "no:cacheprovider", "-m", "cuda"]
    done = subprocess.run(
        [*command, "-k", " ".join(CHOSEN.split()), str(tests / "test_cuda.py")],
        env={**os.environ, "PYTHONPATH": f"{tests.parent}:{tests}", "FOLO_CPU_ISA": "reference"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-1000:]
    assert done.stdout.count(".") >= 12, done.stdout


def test_a_text_is_evaluated_where_the_params_are(tiny_dir: Path, device: VirtualCuda) -> None:
    here, there = (folo.load(tiny_dir, "float32", where, use_tqdm=False) for where in ("cpu", "cuda"))
    expected = folo.quant.perplexity(here, prompt(40), 24, 12, use_tqdm=False)
    assert folo.quant.perplexity(there, prompt(40), 24, 12, use_tqdm=False) == expected
    compared = folo.quant.compare(there, there, prompt(40), 24, 12, use_tqdm=False)
    assert compared.first == compared.second == expected
    assert (compared.kl, compared.agreement) == (0.0, 1.0)
