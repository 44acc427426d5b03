"""A quantised model as a checkpoint on disk: all of it, or nothing."""

from __future__ import annotations

import shutil
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

from folo.errors import ConfigError
from folo.model.export import export
from folo.model.params import Params


def check_target(path: Path) -> None:
    """Raises ConfigError if there is something at `path` already, or no directory to make it in."""
    if path.exists():
        raise ConfigError(f"{path} is there already: give the name of a new directory")
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"{path.absolute().parent} is no directory: make it first")


def write(params: Params, tokenizer: Any, path: Path) -> None:
    """Weights, configuration and tokenizer into the new directory `path`, which appears when it is complete.

    Raises:
        ConfigError: as `check_target` and `folo.model.export.export` do.
        OSError: the files cannot be written.
    """
    check_target(path)
    beside = Path(mkdtemp(prefix=f".{path.name}-", dir=path.absolute().parent))
    try:
        export(params, beside)
        tokenizer.save_pretrained(beside)
        beside.chmod(0o755)  # mkdtemp's is for its owner alone
        beside.rename(path)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
