"""One continuation of one prompt, as a value."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from folo.detokenize import TextState
from folo.request import Request
from folo.state.evolve import evolve
from folo.state.heap import Block
from folo.state.log import Log


@dataclass(frozen=True, slots=True)
class BlockTable:
    """The blocks that hold a sequence's K and V, in order, and their indices packed as int32."""

    blocks: tuple[Block, ...] = ()
    packed: bytes = b""

    @staticmethod
    def of(blocks: tuple[Block, ...]) -> BlockTable:
        return BlockTable(blocks, np.array([block.index for block in blocks], "<i4").tobytes())

    def first(self, count: int) -> BlockTable:
        """The table of the first `count` blocks, at most all."""
        if count >= len(self.blocks):
            return self
        return BlockTable(self.blocks[:count], self.packed[: 4 * count])

    def extended(self, new: list[Block]) -> BlockTable:
        packed = b"".join([block.index.to_bytes(4, "little") for block in new])
        return BlockTable((*self.blocks, *new), self.packed + packed)


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One scored position: the token's own logprob and rank, and the most likely ones."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]

    def of(self, token: int) -> TokenLogprobs | None:
        """The scores of the same position with `token` there, if it is one of the most likely ones."""
        if token not in self.top_ids:
            return None
        logprob = self.top_logprobs[self.top_ids.index(token)]
        rank = 1 + sum(other > logprob for other in self.top_logprobs)
        return TokenLogprobs(logprob, rank, self.top_ids, self.top_logprobs)


@dataclass(frozen=True)
class Origin:
    """What never changes about a sequence. Positions are absolute: the prompt's first token is at 0."""

    request: Request
    arrival: int  # counts the requests of a state
    sample: int  # which of the request's samples this is
    stream: int  # the sample index that its random numbers are drawn with
    seed: int
    packed_sampling: bytes  # one folo.inputs.SAMPLING
    stop_ids: frozenset[int]  # end-of-sequence included, unless ignored
    num_prompt: int
    max_length: int  # the sequence ends at this many tokens
    scored_from: int  # 1 or num_prompt: the positions of which scores are kept; none if the range is empty
    scored_to: int
    looks_back: bool  # sampling reads the tokens so far themselves: penalties, logits processors
    lineage: tuple[tuple[str, int, int], ...] = ()


@dataclass(frozen=True)
class Sequence:
    """The first `num_computed` tokens have their K and V in the table; the others are yet to be computed."""

    origin: Origin
    tokens: Log[int]  # prompt, then output
    num_computed: int
    table: BlockTable
    digests: Log[bytes]  # of the full blocks among the tokens; empty without prefix caching
    scores: Log[TokenLogprobs]  # of the positions from origin.scored_from on, without a gap
    text: TextState | None  # kept up to date only where stop strings need it
    cumulative_logprob: float = 0.0  # of the scored output tokens
    num_cached: int | None = None  # tokens that found their K and V when admitted; None before that
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    stopped: bool = False  # by its last token
    foreign: int = 0  # how many of the first scores are of weights from before a `rebind`

    @property
    def id(self) -> str:
        return self.origin.request.id

    @property
    def key(self) -> tuple[str, int]:
        """Which of the state's sequences this is, whatever became of it."""
        return self.origin.request.id, self.origin.sample

    @property
    def num_output(self) -> int:
        return self.tokens.length - self.origin.num_prompt

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return self.tokens.length - self.num_computed

    @property
    def unscored(self) -> range:
        """The positions of tokens that still have to be scored."""
        origin = self.origin
        return range(origin.scored_from + self.scores.length, min(self.tokens.length, origin.scored_to))

    @property
    def reusable(self) -> int:
        """How many of the first tokens may take K and V that exist, and need not be computed.

        Not the last one, whose logits the next token is sampled from; nor any whose logits score a token.
        """
        unscored = self.unscored
        return (unscored.start if unscored else self.tokens.length) - 1

    @property
    def prompt_scores(self) -> list[TokenLogprobs]:
        """Of the prompt's tokens from the second on, so far; empty if the request did not ask."""
        origin = self.origin
        return self.scores[: origin.num_prompt - origin.scored_from]

    @property
    def output_scores(self) -> list[TokenLogprobs]:
        """Of the output's tokens so far; empty if the request did not ask."""
        origin = self.origin
        return self.scores[origin.num_prompt - origin.scored_from :]

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.origin.num_prompt :]

    @property
    def text_ids(self) -> list[int]:
        """The output tokens whose text is shown: not the stop token, unless the request wants it."""
        ids, params = self.output_ids, self.origin.request.sampling
        return ids[:-1] if self.stopped and not params.include_stop_str_in_output else ids

    def vacate(self) -> Sequence:
        """Without blocks: everything is to be computed again."""
        return evolve(self, num_computed=0, table=BlockTable())
