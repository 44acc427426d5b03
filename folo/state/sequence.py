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
    """One scored position: the token's own logprob and rank (1: the likeliest), and the likeliest tokens.

    top_ids, top_logprobs: as many as the request asked for, likeliest first.
    """

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


@dataclass(frozen=True, eq=False)  # compared by identity: equal ones of two states are not one sequence
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
    scored_from: int  # first position whose score is kept: 1 with prompt logprobs, else num_prompt
    scored_to: int  # the end of those positions, exclusive; scored_from or less: no scores
    looks_back: bool  # sampling needs the values of earlier tokens: penalties, logits processors
    lineage: tuple[tuple[str, int, int], ...] = ()  # of each fork: (parent request id, tokens kept, seed)


@dataclass(frozen=True)
class Sequence:
    """One sample of a request: its tokens, and how far they are computed.

    The first `num_computed` tokens have their K and V in the blocks of `table`; the others have none yet.
    """

    origin: Origin
    tokens: Log[int]  # prompt, then output
    num_computed: int
    table: BlockTable
    digests: Log[bytes]  # of the full blocks among the tokens; empty without prefix caching
    scores: Log[TokenLogprobs]  # of the positions from origin.scored_from on, without a gap
    text: TextState | None  # kept up to date only where stop strings need it
    num_cached: int | None = None  # tokens whose K and V existed when it was first admitted; None before
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    stopped: bool = False  # its last token is a stop token
    foreign: int = 0  # how many scores, from the first on, come from the weights before a `rebind`

    @property
    def id(self) -> str:
        return self.origin.request.id

    @property
    def key(self) -> tuple[str, int]:
        """(request id, sample): the same for this sequence in every state."""
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
        """How many leading tokens may reuse K and V that exist already.

        The last one may not: the next token is sampled from its logits. Nor may any whose logits still
        have to score a token.
        """
        unscored = self.unscored
        return (unscored.start if unscored else self.tokens.length) - 1

    @property
    def prompt_scores(self) -> list[TokenLogprobs]:
        """The scores of the prompt's tokens from the second on, so far; empty if not asked for."""
        origin = self.origin
        return self.scores[: origin.num_prompt - origin.scored_from]

    @property
    def output_scores(self) -> list[TokenLogprobs]:
        """The scores of the output's tokens so far; empty if not asked for."""
        origin = self.origin
        return self.scores[origin.num_prompt - origin.scored_from :]

    @property
    def cumulative_logprob(self) -> float:
        """Of the output's tokens that are scored."""
        total = 0.0  # no sum(), which from Python 3.12 on compensates, and has other bits
        for scores in self.output_scores:
            total += scores.logprob
        return total

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
