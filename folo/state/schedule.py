"""Who runs next, and how far: a pure function from a state to a plan for one step of it."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from folo.state.batch import Batch, Scheduled, Shared
from folo.state.engine import EngineState
from folo.state.flight import Flight, foreseen, landed
from folo.state.heap import Block
from folo.state.pool import ROOT
from folo.state.sequence import Sequence

# The number of tokens whose K and V are there already, and the blocks that hold them.
Reuse = tuple[int, tuple[Block | Shared, ...]]
_WAIT: Reuse = (-1, ())  # a sibling is still computing the prompt that they share


def schedule(state: EngineState) -> Batch | None:
    """The next step's batch, or None when nothing is left to run. Reads nothing but `state`.

    Every sequence catches up with its tokens under one budget. Those that lack one token go first;
    then prefill chunks of running sequences; then the waiting ones are admitted, in order.

    While a step is in flight, decodes are planned without waiting for its tokens. A sequence that those
    tokens turn out to end has a surplus row in the batch, which is discarded.

    Raises:
        RequestError: a step in flight found no token for a request (`folo.step`).
    """
    if (ahead := foreseen(state)) is not None:
        batch = _plan(ahead, state, state.flight)
        if batch is not None and batch.decoding and not batch.preempted:
            return batch
    return _plan(landed(state), state)


def _plan(state: EngineState, origin: EngineState, behind: Flight | None = None) -> Batch | None:
    """A batch of `state`, in which nothing is in flight, for a step of `origin`."""
    trial = _Trial(state)
    lagging = trial.decode()
    num_decodes = len(trial.scheduled)
    trial.promised = 0
    for sequence in lagging:
        trial.promised += trial.lacks(sequence, trial.go_on(sequence))
    if not trial.preempted:
        for sequence in state.waiting:
            if not trial.admit(sequence):
                break
    if not trial.scheduled:
        return None
    decoding = len(trial.scheduled) == num_decodes
    return Batch(state, tuple(trial.scheduled), tuple(trial.preempted), decoding, origin, behind)


class _Trial:
    """The scratch pad of one `_plan` call: a trial of the step's accounting on the state's pool."""

    def __init__(self, state: EngineState) -> None:
        self.state = state
        self.block_size = state.cache.block_size
        self.pool = state.pool
        self.budget = state.scheduler.max_num_batched_tokens
        self.scheduled: list[Scheduled] = []
        self.preempted: list[Sequence] = []
        self.settled: set[int] = set()  # id() of the sequences in the batch, and of the preempted
        self.coming: dict[bytes, Shared] = {}  # full blocks that this batch computes, by digest
        self.num_running = len(state.running)
        self.running: dict[str, list[Sequence]] = {}  # by request, once anyone asks
        self.places: dict[str, list[int]] = {}  # in the batch, by request: of the first `num_placed`
        self.num_placed = 0
        self.promised = 0  # blocks set aside for sequences ahead, for the rest of their tokens

    def lacks(self, sequence: Sequence, end: int) -> int:
        """Blocks that a sequence computed up to `end` needs for the rest of its tokens."""
        return self._num_blocks(sequence.tokens.length) - self._num_blocks(end)

    def decode(self) -> list[Sequence]:
        """Schedule the running sequences that lack one token; returns those that lack more."""
        lagging: list[Sequence] = []
        size, settled, branches = self.block_size, self.settled, self.pool.branches
        waiting = bool(self.state.waiting)  # who waits may share a block that becomes full
        for sequence in self.state.running:
            start = sequence.num_computed
            end = start + 1
            if sequence.tokens.length > end:
                lagging.append(sequence)
                self.promised += self.lacks(sequence, start)
            elif (
                start % size
                and (end % size or not waiting)
                and self.budget
                and id(sequence) not in settled
                and not (branches.length and sequence.table.blocks[-1].index in branches)
            ):
                # The fast path of nearly all decodes: one more slot of a block that no other table holds.
                self.scheduled.append(Scheduled(sequence, start, end))
                settled.add(id(sequence))
                self.budget -= 1
            else:
                self.go_on(sequence)
                branches = self.pool.branches
        return lagging

    def go_on(self, sequence: Sequence) -> int:
        """Schedule the next chunk of a running sequence, preempting later ones if it takes that.

        Returns how far it will be computed then.
        """
        start = sequence.num_computed
        if not self.budget or id(sequence) in self.settled:
            return start
        while not (room := self._room(sequence)):
            victim = self._victim(sequence)
            if victim is None:
                return start
            self.settled.add(id(victim))
            self.preempted.append(victim)
            self.pool = self.pool.release(victim.table.blocks)
        end = start + min(self._chunk(sequence.remaining), room)
        self._add(Scheduled(sequence, start, end), sequence.table.blocks)
        return end

    def admit(self, sequence: Sequence) -> bool:
        """Schedule the first chunk of a waiting sequence; False if nothing more can be admitted for now."""
        if not self.budget or self.num_running >= self.state.scheduler.max_num_seqs:
            return False
        sibling = self._sibling(sequence)
        if sibling is _WAIT:
            return True  # it will find the prompt computed; those behind it need not wait for that
        start, blocks = self._hits(sequence) if sibling is None else sibling
        # Blocks that this batch computes are counted with their donor.
        pool = self.pool.hold([block for block in blocks if isinstance(block, Block)])
        # It must have room for all its tokens: admitted without, it would only be preempted again.
        length = sequence.tokens.length
        fresh = self._num_blocks(length) - len(blocks) + bool(start % self.block_size)
        if fresh > pool.available - self.promised:
            return False
        self.pool = pool
        end = start + self._chunk(length - start)
        item = Scheduled(sequence, start, end, True, sibling is None, blocks)
        self._add(item, blocks)
        self.num_running += 1
        self.promised += self.lacks(sequence, item.end)
        return True

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.block_size)

    def _chunk(self, remaining: int) -> int:
        longest = self.state.scheduler.long_prefill_token_threshold
        return min(remaining, self.budget, longest or remaining)

    def _room(self, sequence: Sequence) -> int:
        """How many more tokens of a running sequence there are slots for."""
        blocks, available = sequence.table.blocks, max(0, self.pool.available - self.promised)
        slack = len(blocks) * self.block_size - sequence.num_computed
        if slack and self.pool.shared(blocks[-1]):
            if not available:
                return 0
            available -= 1  # the copy to write to
        return slack + available * self.block_size

    def _add(self, item: Scheduled, blocks: tuple[Block | Shared, ...]) -> None:
        size, sequence = self.block_size, item.sequence
        if item.start % size and self.pool.branches.length:
            own = [block for block in blocks if isinstance(block, Block)]
            if self.pool.shared(own[-1]):
                self.pool = self.pool.part(own)
        if (fresh := self._num_blocks(item.end) - len(blocks)) > 0:
            self.pool = self.pool.take(fresh)
        for number in range(item.start // size, min(item.end // size, len(sequence.digests))):
            self.coming.setdefault(sequence.digests[number], Shared(len(self.scheduled), number))
        self.scheduled.append(item)
        self.settled.add(id(sequence))
        self.budget -= item.num_tokens

    def _victim(self, sequence: Sequence) -> Sequence | None:
        """The last running sequence behind this one that is not in the batch."""
        for other in reversed(self.state.running):
            if other is sequence:
                return None
            if id(other) not in self.settled:
                return other
        return None

    def _hits(self, sequence: Sequence) -> Reuse:
        """Its longest chain of full blocks, cached or coming, short of tokens whose logits are wanted."""
        size, parent = self.block_size, ROOT
        blocks: list[Block | Shared] = []
        for number in range(min(len(sequence.digests), sequence.reusable // size)):
            digest = sequence.digests[number]
            tokens = sequence.tokens[number * size : (number + 1) * size]
            block = self.pool.lookup(digest, parent, tokens) or self._coming(digest, parent, tokens)
            if isinstance(block, Shared) and number and blocks[-1] != self._made(block.donor, number - 1):
                break  # it will follow another block, of the same content: a block has one predecessor
            if block is None:
                break
            blocks.append(block)
            parent = digest
        return len(blocks) * size, tuple(blocks)

    def _coming(self, digest: bytes, parent: bytes, tokens: list[int]) -> Shared | None:
        """As `Pool.lookup`, for the blocks that this batch computes."""
        shared = self.coming.get(digest)
        if shared is None:
            return None
        at, donor = shared.number * self.block_size, self.scheduled[shared.donor].sequence
        before = donor.digests[shared.number - 1] if shared.number else ROOT
        return shared if before == parent and donor.tokens[at : at + self.block_size] == tokens else None

    def _sibling(self, sequence: Sequence) -> Reuse | None:
        """The prompt's blocks, short of its last token, from another sample of the request.

        None: no other sample is there to share with, or this one is past its prompt.
        """
        if not sequence.origin.sample or sequence.num_output:
            return None
        size, shared = self.block_size, sequence.tokens.length - 1
        running, places = self._samples(sequence.id)
        siblings = False
        for sibling in chain(running, (self.scheduled[number].sequence for number in places)):
            siblings = True
            if sibling.num_computed >= shared:
                return shared, sibling.table.blocks[: self._num_blocks(shared)]
        for number in places:
            if self.scheduled[number].end >= shared:
                full = range(shared // size)
                return len(full) * size, tuple(self._made(number, n) for n in full)
        return _WAIT if siblings else None

    def _samples(self, request_id: str) -> tuple[Iterator[Sequence], list[int]]:
        """The request's running sequences that are not in the batch, and the places of those that are."""
        if not self.running:
            for sequence in self.state.running:
                self.running.setdefault(sequence.id, []).append(sequence)
        for number in range(self.num_placed, len(self.scheduled)):
            self.places.setdefault(self.scheduled[number].sequence.id, []).append(number)
        self.num_placed = len(self.scheduled)
        idle = (s for s in self.running.get(request_id, ()) if id(s) not in self.settled)
        return idle, self.places.get(request_id, [])

    def _made(self, donor: int, number: int) -> Block | Shared:
        """A full block of a scheduled sequence: one that it has, or one that it will have."""
        item = self.scheduled[donor]
        if number >= item.start // self.block_size:
            return Shared(donor, number)
        return (item.reused or item.sequence.table.blocks)[number]
