"""What the shell remembers of texts, so that looking at outputs at every step stays cheap."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from folo import detokenize
from folo.detokenize import TextState
from folo.state.log import Log
from folo.state.outputs import text_of, token_text_of
from folo.state.sequence import Origin, Sequence


class Texts:
    """The decoded text of running sequences, and of single tokens: a cache over `folo.state.outputs`."""

    def __init__(self) -> None:
        # The tokens, how many of them are output, and their text; as long as some state has the sequence.
        self._known = WeakKeyDictionary[Origin, tuple[Log[int], int, TextState]]()
        self._pieces: dict[int, str | None] = {}

    def __reduce__(self) -> tuple[type[Texts], tuple[()]]:
        return Texts, ()  # a pickled engine remembers nothing: weak references cannot be pickled

    def text(self, tokenizer: Any, sequence: Sequence) -> str:
        """`text_of`, decoding only the tokens that are new since the last call."""
        if tokenizer is None or not sequence.origin.request.sampling.detokenize or sequence.text is not None:
            return text_of(tokenizer, sequence)
        return self._decoded(tokenizer, sequence).final_text

    def settled(self, tokenizer: Any, sequence: Sequence) -> str:
        """The text that later tokens cannot change any more."""
        text = sequence.text
        return (self._decoded(tokenizer, sequence) if text is None else text).text

    def piece(self, tokenizer: Any, token: int) -> str | None:
        """`token_text_of`, remembered."""
        if token not in self._pieces:
            self._pieces[token] = token_text_of(tokenizer, token)
        return self._pieces[token]

    def _decoded(self, tokenizer: Any, sequence: Sequence) -> TextState:
        origin, tokens, ids = sequence.origin, sequence.tokens, sequence.text_ids
        before, seen, text = self._known.get(origin) or (tokens, 0, None)
        if text is None or not before.continued_by(tokens):  # `state` was set to an older value
            request = origin.request
            skip = request.sampling.skip_special_tokens
            seen, text = 0, detokenize.begin(tokenizer, request.prompt_token_ids, skip)
        text = detokenize.advance(tokenizer, text, ids[seen:])
        self._known[origin] = tokens, len(ids), text
        return text
