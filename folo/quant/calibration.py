"""Calibration data: token sequences of a text."""

from __future__ import annotations

from importlib import resources
from typing import Any

from folo.errors import ConfigError


def default_text() -> str:
    """Some 155,000 characters of English prose, about 34,000 tokens: chapters 1 to 11 of the Jargon File and
    every tenth paragraph of what follows them, lines joined and marks taken out.

    Version 4.4.7, 29 Dec 2003, http://www.catb.org/jargon: "in the public domain, to be freely used, shared,
    and modified".
    """
    return resources.files("folo.quant").joinpath("calibration.txt").read_text(encoding="utf-8")


def sequences(tokenizer: Any, text: str, length: int, count: int = 128) -> list[list[int]]:
    """The text's first `count` whole runs of `length` tokens; a shorter text is one sequence.

    Raises ConfigError if the text is empty, or the length or the count less than 1.
    """
    for name, value in (("length", length), ("count", count)):
        if value < 1:
            raise ConfigError(f"{name}={value!r}: expected at least 1")
    ids = tokenizer.encode(text, add_special_tokens=False, verbose=False)
    if not ids:
        raise ConfigError("the calibration text is empty")
    starts = range(0, max(1, len(ids) - length + 1), length)
    return [ids[start : start + length] for start in starts[:count]]
