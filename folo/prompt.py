"""What a prompt may be, and the token ids that it stands for."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from numbers import Integral
from typing import Any

import torch

from folo.errors import RequestError

# Text, token ids (a one-dimensional tensor too), or vLLM's {"prompt": ...} or
# {"prompt_token_ids": ...}.
Prompt = str | Sequence[int] | Mapping[str, Any]


def is_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    """Whether this is one prompt, not several. Raises RequestError if it can be neither."""
    if isinstance(prompts, (str, Mapping)):
        return True
    if isinstance(prompts, torch.Tensor) and prompts.ndim:
        return prompts.ndim == 1
    no_list = isinstance(prompts, (bytes, bytearray)) or not hasattr(prompts, "__getitem__")
    if no_list or getattr(prompts, "ndim", 1) == 0 or not hasattr(prompts, "__len__"):
        raise RequestError(f"prompts must be text, token ids, or a list of prompts, got {prompts!r}")
    return len(prompts) > 0 and isinstance(prompts[0], Integral)


def unpacked(prompt: Prompt) -> str | Sequence[int]:
    """A prompt out of vLLM's dictionary, if it is in one. Raises RequestError for another dictionary."""
    if not isinstance(prompt, Mapping):
        return prompt
    for key in ("prompt", "prompt_token_ids"):
        if prompt.keys() == {key}:
            return prompt[key]
    raise RequestError(
        f'a prompt is text, token ids, {{"prompt": text}} or {{"prompt_token_ids": ids}}; got the keys '
        f"{', '.join(map(repr, prompt))}"
    )


def encode(tokenizer: Any, prompt: Prompt) -> Sequence[int]:
    """Token ids of a prompt; ids pass through. Raises RequestError for text without a tokenizer."""
    prompt = unpacked(prompt)
    if not isinstance(prompt, str):
        return prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt
    if tokenizer is None:
        raise RequestError("a text prompt needs a tokenizer; give token ids, or skip_tokenizer_init=False")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise RequestError(f"the prompt {prompt[:40]!r} holds a lone surrogate: it is no text")
    return tokenizer(prompt, verbose=False)["input_ids"]  # what is too long, `submit` refuses
