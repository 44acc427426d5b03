"""Shared fixtures: a tiny random model, loaded once."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_checkpoint
from hypothesis import settings

import folo
from folo.ops import cpu

# They need a process of their own: tests/test_triton_interpreted.py runs them.
collect_ignore = ["interpreted"]

# No test is timed: coverage, and a second test beside, make any deadline a matter of luck.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_finish() -> None:
    """What was imported stays: a collection that a test asks for need not look at a million objects of it."""
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
    """Runs the test with all that the ops can run with here, plain torch included."""
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
def threads() -> Iterator[None]:
    """Puts the number of torch threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
