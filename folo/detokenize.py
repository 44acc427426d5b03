"""Text from tokens, a token at a time, as a value that is carried along.

A token's text depends on its neighbours: a character may be split over tokens, and some decoders treat the
first token of a call differently. So each step decodes a short window twice, without and with the new
token, and takes the difference (the prefix_offset/read_offset method of text-generation-inference and
vLLM). Text that ends in U+FFFD is held back, since the next token may complete the character. The work for
a token does not grow with the length of the text, and the result does not depend on how the tokens were
grouped into calls.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

_REPLACEMENT = "\ufffd"

# Prompt tokens decoded with the output, so that it reads as a continuation of the prompt (as in vLLM).
_PROMPT_TAIL = 5

# A UTF-8 character has at most 4 bytes, and a token that shows anything has at least one.
_CHARACTER_TOKENS = 4

# Text that still ends in U+FFFD after this many tokens holds bytes that no further token can make valid, or
# that character itself. (Twice 4 would do, but for decoders that read a run of bytes as one.)
_MOST_HELD = 16


@dataclass(frozen=True, slots=True)
class TextState:
    """The text of the output so far, and what is needed to go on. Made by `begin`, moved by `advance`.

    text: what is settled; it only ever grows.
    pending: what the tokens held back read as now (it ends in U+FFFD): part of the text if no more come.
    """

    text: str
    pending: str
    skip_special_tokens: bool
    window: tuple[int, ...]
    prefix: str  # the part of decode(window) that is in `text`, or in the prompt
    held: int  # tokens at the end of `window` that have added nothing to `text` yet

    @property
    def certain_text(self) -> str:
        """What later tokens cannot change: `text`, and `pending` up to its unfinished character."""
        return self.text + self.pending.rstrip(_REPLACEMENT)

    @property
    def final_text(self) -> str:
        """The text when no more tokens come: what was held back is part of it."""
        return self.text + self.pending


def begin(tokenizer: Any, prompt_ids: Sequence[int], skip_special_tokens: bool = True) -> TextState:
    """The state before the first output token, with the end of the prompt as context.

    The context starts at a character if it can: decoders with byte fallback give up a whole run of bytes
    that begins inside one. (Such a decoder also tears a prompt of token ids that *ends* inside one.)
    """
    window = tuple(prompt_ids[-_PROMPT_TAIL:])
    prefix = _decode(tokenizer, window, skip_special_tokens)
    for length in range(_PROMPT_TAIL + 1, _PROMPT_TAIL + _CHARACTER_TOKENS):
        if not prefix.startswith(_REPLACEMENT):
            break
        window = tuple(prompt_ids[-length:])
        prefix = _decode(tokenizer, window, skip_special_tokens)
    return TextState("", "", skip_special_tokens, window, prefix, held=0)


def advance(tokenizer: Any, state: TextState, new_ids: Sequence[int]) -> TextState:
    """The state after `new_ids`, output tokens that follow those already seen.

    tokenizer: any transformers tokenizer; only `decode` is used.
    """
    for token in new_ids:
        state = _advance(tokenizer, state, token)
    return state


def text_of(
    tokenizer: Any, prompt_ids: Sequence[int], output_ids: Sequence[int], skip_special_tokens: bool = True
) -> str:
    """The text of a whole output: all its increments, and what is held back at the end."""
    return advance(tokenizer, begin(tokenizer, prompt_ids, skip_special_tokens), output_ids).final_text


def find_stop(text: str, start: int, stops: Sequence[str]) -> tuple[int, str] | None:
    """The first stop string to be completed at or after text[start]: (index where it begins, the string).

    Of several that end at the same character, the one that begins first; then the one listed first. So
    the answer is the same however the text was cut into increments.
    """
    best: tuple[int, int, str] | None = None
    for stop in stops:
        index = text.find(stop, max(0, start - len(stop) + 1))
        if index >= 0 and (best is None or (index + len(stop), index) < best[:2]):
            best = (index + len(stop), index, stop)
    return None if best is None else best[1:]


def stream_safe_length(text: str, stops: Sequence[str]) -> int:
    """How many characters of `text`, which holds no stop string, can be shown: all before a possible one."""
    return len(text) - max((_overlap(text, stop) for stop in stops), default=0)


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` that is a beginning of `stop`."""
    longest = min(len(stop), len(text))
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)


def _advance(tokenizer: Any, state: TextState, token: int) -> TextState:
    skip = state.skip_special_tokens
    window, held = (*state.window, token), state.held + 1
    whole = _decode(tokenizer, window, skip)
    added = _beyond(state.prefix, whole)

    # A skipped special token adds nothing, ever. Dropping it keeps the window short when thousands come.
    # (Twice, since some decoders strip the space of a token that stands alone.)
    if added == state.pending and not _decode(tokenizer, (token, token), skip):
        return state

    if not whole.endswith(_REPLACEMENT):
        window = window[-held:]
        return TextState(state.text + added, "", skip, window, _decode(tokenizer, window, skip), held=0)
    if held <= _MOST_HELD:
        return replace(state, window=window, held=held, pending=added)

    # All but the last replacement character is settled, since an unfinished character reads as one.
    window = window[-_CHARACTER_TOKENS:]
    prefix = _decode(tokenizer, window, skip)[:-1]
    return TextState(state.text + added[:-1], added[-1:], skip, window, prefix, held=_CHARACTER_TOKENS)


def _beyond(prefix: str, whole: str) -> str:
    """What `whole` adds to `prefix`, whose unfinished last character `whole` may have completed."""
    if whole.startswith(prefix):
        return whole[len(prefix) :]
    return whole[len(prefix.rstrip(_REPLACEMENT)) :]


def _decode(tokenizer: Any, ids: Sequence[int], skip_special_tokens: bool) -> str:
    return tokenizer.decode(
        list(ids), skip_special_tokens=skip_special_tokens, clean_up_tokenization_spaces=False
    )
