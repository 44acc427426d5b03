"""Files as folo writes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def beside(path: Path) -> Path:
    """Where what will be `path` is written first.

    In the same directory, since a rename is atomic within one file system only; under a name that no other
    process has, and no other thread, if `path` is an object of its own.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.{id(path)}.partial")


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """One safetensors file, which whoever may read the caller's other files may read. Raises OSError."""
    path.touch()  # as the umask has it; the library makes its own file, for the owner alone
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    path.chmod(mode)
