"""Shared fixtures: a tiny random model, loaded once."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from checkpoints import tiny_checkpoint
from hypothesis import settings

import folo

# No test is timed: coverage, and a second test beside, make any deadline a matter of luck.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


@pytest.fixture(scope="session")
def tiny_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(path, "qwen3", tokenizer=True)
    return path


@pytest.fixture(scope="session")
def tiny(tiny_dir: Path) -> folo.Params:
    """Two layers, 300 tokens of vocabulary, 256 positions, float32."""
    return folo.load(str(tiny_dir), use_tqdm=False)


@pytest.fixture
def threads() -> Iterator[None]:
    """Puts the number of torch threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
