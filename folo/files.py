"""Files as folo writes them."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def beside(path: Path) -> Path:
    """Where a file is written before it is renamed to `path`.

    In the same directory, since a rename is atomic within one file system only; under a name that no other
    process uses, nor another thread, if each has a `path` object of its own.
    """
    return path.with_name(f".{path.name}.{os.getpid()}.{id(path)}.partial")


def write_tensors(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Write one safetensors file, with the permissions of the caller's other files. Raises OSError."""
    path.touch()  # with the umask's permissions; the library would make a file for the owner alone
    mode = path.stat().st_mode
    try:
        save_file(dict(tensors), path, dict(metadata))
    except SafetensorError as error:
        raise OSError(f"{path} cannot be written: {error}") from error
    path.chmod(mode)
