"""One continuation of one prompt, as a value."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from folo.detokenize import TextState
from folo.request import Request
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


@dataclass(frozen=True, slots=True)
class TokenLogprobs:
    """One scored position: the token's own logprob and rank, and the most likely ones."""

    logprob: float
    rank: int
    top_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Origin:
    """What never changes about a sequence."""

    request: Request
    arrival: int  # counts the requests of a state
    sample: int
    seed: int
    packed_sampling: bytes  # one folo.inputs.SAMPLING
    stop_ids: frozenset[int]  # end-of-sequence included, unless ignored
    max_tokens: int  # output tokens at most, the model's length included
    lineage: tuple[tuple[str, int, int], ...] = ()

    @property
    def num_prompt(self) -> int:
        return len(self.request.prompt_token_ids)


@dataclass(frozen=True, slots=True)
class Sequence:
    """`num_computed` of the tokens have their K and V in the table; the rest is to be caught up with."""

    origin: Origin
    tokens: Log[int]  # prompt, then output
    num_computed: int
    table: BlockTable
    digests: Log[bytes]  # of the full blocks among the tokens; empty without prefix caching
    logprobs: Log[TokenLogprobs]  # of the output tokens, where asked for
    prompt_logprobs: Log[TokenLogprobs]  # from the second prompt token on, where asked for
    text: TextState | None  # kept up to date only where stop strings need it
    cumulative_logprob: float = 0.0
    num_cached: int | None = None  # prompt tokens found in the prefix cache; None before admission
    preemptions: int = 0
    finish_reason: str | None = None
    stop_reason: int | str | None = None

    @property
    def id(self) -> str:
        return self.origin.request.id

    @property
    def num_output(self) -> int:
        return len(self.tokens) - self.origin.num_prompt

    @property
    def remaining(self) -> int:
        """Tokens to compute before the next one can be sampled."""
        return len(self.tokens) - self.num_computed

    @property
    def scores_prompt(self) -> bool:
        """Prompt logprobs are the same for all samples: the first one computes them."""
        return self.origin.sample == 0 and self.origin.request.sampling.prompt_logprobs is not None

    @property
    def output_ids(self) -> list[int]:
        return self.tokens[self.origin.num_prompt :]

    @property
    def text_ids(self) -> list[int]:
        """The output tokens whose text is shown: not the stop token, unless the request wants it."""
        ids, params = self.output_ids, self.origin.request.sampling
        stopped = self.finish_reason == "stop" and bool(ids) and ids[-1] in self.origin.stop_ids
        return ids[:-1] if stopped and not params.include_stop_str_in_output else ids

    def vacate(self) -> Sequence:
        """Without blocks: everything is to be computed again."""
        return replace(self, num_computed=0, table=BlockTable())

    def ended(self, reason: str, stop_reason: int | str | None) -> Sequence:
        return replace(self.vacate(), finish_reason=reason, stop_reason=stop_reason)
