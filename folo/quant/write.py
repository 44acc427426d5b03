"""A quantised model as a checkpoint on disk: all of it, or nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

from folo.errors import ConfigError
from folo.files import beside
from folo.model.export import export
from folo.model.params import Params


def check_target(path: Path) -> None:
    """Raises ConfigError if there is something at `path` already, or no directory that it can be made in."""
    if path.exists():
        raise ConfigError(f"{path} is there already: give the name of a new directory")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path.absolute().parent} is no directory: make it first")
    if not os.access(path.absolute().parent, os.W_OK):  # said before the work, not after
        raise ConfigError(f"{path.absolute().parent} cannot be written to")


def write(params: Params, tokenizer: Any, path: Path) -> None:
    """Weights, configuration and tokenizer into the new directory `path`, which appears when it is complete.

    Raises:
        ConfigError: as `check_target` and `folo.model.export.export` do.
        OSError: the files cannot be written.
    """
    check_target(path)
    partial = beside(path)
    shutil.rmtree(partial, ignore_errors=True)  # what a killed process of the same id may have left
    try:
        export(params, partial)
        tokenizer.save_pretrained(partial)
        partial.rename(path)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
