"""Shared fixtures: a tiny random model, loaded once."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from hypothesis import settings
from llms import MODEL_DEFAULTS, small_llm
from torch import Tensor

import folo
from folo import LLM, CacheConfig, EngineConfig, LLMEngine, ModelConfig, ops
from folo.ops import cpu

# They need a process of their own: tests/test_triton_interpreted.py runs them.
collect_ignore = ["interpreted"]

# No test is timed: coverage, and a second test beside, make any deadline a matter of luck.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """What was imported stays: a garbage collection in a test need not look at its million objects."""
    gc.freeze()


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(path, "qwen3", tokenizer=True)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> folo.Params:
    """Two layers, 300 tokens of vocabulary, 256 positions, float32."""
    return folo.load(str(tiny_dir), use_tqdm=False)


@pytest.fixture(params=cpu.instruction_sets())
def each_instruction_set(request: pytest.FixtureRequest) -> Iterator[str]:
    """Runs the test with every instruction set of this CPU, and with plain torch."""
    before = cpu.instruction_set()
    cpu.use(request.param)
    yield request.param
    cpu.use(before)


@pytest.fixture
def reference_ops() -> Iterator[None]:
    """Runs the test with plain torch."""
    before = cpu.instruction_set()
    cpu.use(cpu.REFERENCE)
    yield
    cpu.use(before)


@pytest.fixture
def threads() -> Iterator[Callable[[int], None]]:
    """Sets the number of torch threads, and puts it back at the end."""
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def tokenizer(tiny_dir: Path) -> Any:
    """The tokenizer of `tiny`."""
    return folo.load_tokenizer(str(tiny_dir))


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The number of blocks copied, for each step that copied any."""
    counts: list[int] = []
    real = ops.copy_blocks

    def counting(k: Tensor, v: Tensor, source: Tensor, target: Tensor) -> None:
        counts.append(len(source))
        real(k, v, source, target)

    monkeypatch.setattr(ops, "copy_blocks", counting)
    return counts


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny model with a tokenizer and sampling parameters of its own."""
    path = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(path, tokenizer=True, generation=MODEL_DEFAULTS)
    return str(path)


@pytest.fixture
def llm(checkpoint: str) -> LLM:
    return small_llm(checkpoint)


@pytest.fixture
def engine(checkpoint: str) -> LLMEngine:
    return LLMEngine(EngineConfig(ModelConfig(checkpoint), CacheConfig(num_blocks=64)), use_tqdm=False)
