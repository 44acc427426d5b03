"""What the shell remembers of texts, so that looking at outputs at every step stays cheap."""

from __future__ import annotations

from typing import Any

from folo import detokenize
from folo.detokenize import TextState
from folo.request import Request
from folo.state.log import Log
from folo.state.outputs import text_of, token_text_of
from folo.state.sequence import Sequence


class Texts:
    """The decoded text of running sequences, and of single tokens: a cache over `folo.state.outputs`."""

    def __init__(self) -> None:
        # By request id and sample: whose text it is, of which tokens, how many of the output, and the text.
        self._known: dict[tuple[str, int], tuple[Request, Log[int], int, TextState]] = {}
        self._pieces: dict[int, str | None] = {}

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

    def forget(self, id: str, num_samples: int) -> None:
        """Drop what is known of a request."""
        for sample in range(num_samples):
            self._known.pop((id, sample), None)

    def _decoded(self, tokenizer: Any, sequence: Sequence) -> TextState:
        request, tokens, ids = sequence.origin.request, sequence.tokens, sequence.text_ids
        owner, before, seen, text = self._known.get(sequence.key) or (None, tokens, 0, None)
        if text is None or owner is not request or not before.continued_by(tokens):  # `state` was set
            skip = request.sampling.skip_special_tokens
            seen, text = 0, detokenize.begin(tokenizer, request.prompt_token_ids, skip)
        text = detokenize.advance(tokenizer, text, ids[seen:])
        self._known[sequence.key] = request, tokens, len(ids), text
        return text
