"""A step as it is planned: who runs and how far, and which rows of logits that takes."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from folo.inputs import ROWS_PER_TILE, SAMPLE
from folo.state.engine import EngineState
from folo.state.heap import Block
from folo.state.sequence import Sequence

if TYPE_CHECKING:
    from folo.state.flight import Flight


@dataclass(frozen=True, slots=True)
class Shared:
    """Block `number` of the `donor`-th scheduled sequence, which this same step computes."""

    donor: int
    number: int


class Scheduled(NamedTuple):
    """A sequence's part in a batch: its tokens from `start` up to `end` are computed.

    admitted: it comes from the waiting queue. The rest is for admitted ones only. reused: the blocks that
    hold its first `start` tokens. hits: they were looked up in the prefix index, not taken from a sibling.
    """

    sequence: Sequence
    start: int
    end: int
    admitted: bool = False
    hits: bool = False
    reused: tuple[Block | Shared, ...] = ()

    @property
    def num_tokens(self) -> int:
        return self.end - self.start


class Row(NamedTuple):
    """One row of logits: which hidden state it comes from and what it is for.

    position: of the token that is sampled or scored. target: the token to score, or SAMPLE.
    """

    number: int  # of the scheduled sequence
    sequence: Sequence
    hidden: int
    position: int
    target: int

    @property
    def of_prompt(self) -> bool:
        """Whether it scores a prompt token, by the model alone: no sampling parameter has a say."""
        return self.position < self.sequence.origin.num_prompt


@dataclass(frozen=True, slots=True)
class RowPlan:
    """The rows of logits that a step computes, in the order of its tokens: the columns of `Row`."""

    numbers: list[int]
    sequences: list[Sequence]
    hidden: list[int]
    positions: list[int]
    targets: list[int]

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, n: int) -> Row:
        return Row(self.numbers[n], self.sequences[n], self.hidden[n], self.positions[n], self.targets[n])

    @property
    def sampled(self) -> list[int]:
        """The rows that a token is sampled from; the others score one."""
        return [n for n, target in enumerate(self.targets) if target == SAMPLE]

    @property
    def tiles(self) -> list[range]:
        """The rows that are computed together, at most ROWS_PER_TILE."""
        count = len(self)
        return [range(n, min(n + ROWS_PER_TILE, count)) for n in range(0, count, ROWS_PER_TILE)]


@dataclass(frozen=True, eq=False)
class Batch:
    """A plan for one step of `origin`, and of no other. Dropping it undoes nothing: nothing was done.

    state: what the plan was made on: `origin` without a step in flight; if it has one, `origin` after that
        step has landed, or as foreseen before that.
    behind: the step in flight, if the plan was made on a foreseen state, without knowing its tokens.
    decoding: nothing but decodes is scheduled: each sequence computes its last token only.
    """

    state: EngineState
    scheduled: tuple[Scheduled, ...]
    preempted: tuple[Sequence, ...]
    decoding: bool
    origin: EngineState
    behind: Flight | None = None

    def __repr__(self) -> str:
        parts = [(*item.sequence.key, item.start, item.end) for item in self.scheduled]
        return f"Batch({parts}, preempted={[sequence.key for sequence in self.preempted]})"

    @property
    def num_tokens(self) -> int:
        return sum(s.num_tokens for s in self.scheduled)

    @cached_property
    def rows(self) -> RowPlan:
        """What the step's logits are for."""
        scheduled = self.scheduled
        if self.decoding:  # the fast path: every sequence samples its next token
            numbers, sequences = list(range(len(scheduled))), [item.sequence for item in scheduled]
            positions = [item.end for item in scheduled]
            return RowPlan(numbers, sequences, numbers, positions, [SAMPLE] * len(scheduled))
        rows: list[Row] = []
        first = 0
        for number, (sequence, start, end, *_) in enumerate(scheduled):
            if sequence.origin.scored_from < sequence.origin.scored_to:
                unscored = sequence.unscored  # what no earlier step has scored
                for position in range(unscored.start, min(unscored.stop, end + 1)):
                    target = sequence.tokens[position]
                    rows.append(Row(number, sequence, first + position - 1 - start, position, target))
            first += end - start
            if end == sequence.tokens.length:
                rows.append(Row(number, sequence, first - 1, end, SAMPLE))
        return RowPlan(*map(list, zip(*rows, strict=True))) if rows else RowPlan([], [], [], [], [])
