"""The engine state: a frozen pytree. Every transition returns a new one and leaves the old one valid."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch

from folo.config import CacheConfig, SchedulerConfig, require_kind, require_seed
from folo.errors import ConfigError, RequestError
from folo.ops.attention import attention_backend
from folo.ops.tree import register
from folo.request import Request, require_id
from folo.state.heap import Block, KVHeap
from folo.state.map import Map
from folo.state.pool import Pool
from folo.state.sequence import Sequence

if TYPE_CHECKING:
    from folo.model.config import DecoderConfig
    from folo.model.params import Params
    from folo.state.flight import Flight


@dataclass(frozen=True)
class Held:
    """A request that the state holds, and those of its sequences that have ended."""

    request: Request
    arrival: int
    ended: tuple[Sequence, ...] = ()

    @property
    def num_samples(self) -> int:
        return self.request.sampling.num_samples

    @property
    def finished(self) -> bool:
        return len(self.ended) == self.num_samples


@dataclass(frozen=True)
class Counters:
    """What has happened in this state's history."""

    steps: int = 0
    preemptions: int = 0  # of sequences
    prefix_queries: int = 0  # tokens that were looked up in the prefix index
    prefix_hits: int = 0  # those of them that were found


@dataclass(frozen=True, eq=False)
class EngineState:
    """The whole engine as a value.

    A sequence is in exactly one of `running`, `waiting` (both in the order of `rank`) and the `ended` of
    its request. A request is in `requests` until all of its sequences have ended, then in `finished`.
    `flight` is a step that was launched from this state, and whose tokens the other fields do not have
    yet (`folo.state.flight`). `params` and `heap` are context: they are compared by identity.
    """

    running: tuple[Sequence, ...]
    waiting: tuple[Sequence, ...]
    requests: Map[str, Held]
    finished: Map[str, Held]
    pool: Pool
    arrivals: int
    counters: Counters
    seed: int
    max_model_len: int
    cache: CacheConfig
    scheduler: SchedulerConfig
    params: Params
    heap: KVHeap
    tokenizer: Any
    attention: str
    flight: Flight | None = None

    def __repr__(self) -> str:  # all that it holds would be megabytes
        held = f"running={len(self.running)}, waiting={len(self.waiting)}, finished={len(self.finished)}"
        return f"EngineState({held}, steps={self.counters.steps})"

    def rank(self, sequence: Sequence) -> tuple[int, int, int]:
        """Who goes first: the priority if the policy says so, then arrival, then sample."""
        origin = sequence.origin
        priority = origin.request.priority if self.scheduler.policy == "priority" else 0
        return priority, origin.arrival, origin.sample

    def held(self, id: str) -> Held:
        """The request of this id; raises RequestError if the state holds none."""
        require_id(id)
        held = self.requests.get(id) or self.finished.get(id)
        if held is None:
            raise RequestError(f"no request {id!r} in this state: never submitted, or collected already")
        return held

    def all_held(self) -> list[Held]:
        """The requests, finished or not, in order of arrival."""
        both = (held for requests in (self.requests, self.finished) for _, held in requests.items())
        return sorted(both, key=lambda held: held.arrival)

    @property
    def in_flight(self) -> tuple[str, ...]:
        """The request id of each token that the step in flight samples; empty without one."""
        if self.flight is None:
            return ()
        rows = self.flight.bound.batch.rows
        return tuple(rows.sequences[n].id for n in rows.sampled)

    def unfinished(self) -> dict[str, list[Sequence]]:
        """The sequences in the queues, by request."""
        found: dict[str, list[Sequence]] = {}
        for sequence in (*self.running, *self.waiting):
            found.setdefault(sequence.id, []).append(sequence)
        return found

    def blocks(self) -> list[Block]:
        """Every block that the state refers to, but for what a step in flight took.

        In the order of the tables, then the longest idle first.
        """
        used = {block.index: block for s in self.running for block in s.table.blocks}
        return [*used.values(), *(block for _, block in sorted(self.pool.released.items()))]

    def filled(self) -> dict[int, int]:
        """For each block in a table, by block index: how many of its slots hold a token."""
        size, filled = self.cache.block_size, dict[int, int]()
        for sequence in self.running:
            for number, block in enumerate(sequence.table.blocks):
                here = min(size, sequence.num_computed - number * size)
                filled[block.index] = max(filled.get(block.index, 0), here)
        return filled


def init(
    params: Params,
    cache: CacheConfig | None = None,
    scheduler: SchedulerConfig | None = None,
    tokenizer: Any = None,
    seed: int = 0,
    attention: str = "auto",
    deterministic: bool = True,
) -> EngineState:
    """An empty state over a new KV heap on the parameters' device.

    Args:
        tokenizer: needed for stop strings and for text in the outputs.
        seed: the engine seed, from which requests without a seed of their own get theirs.
        attention: who computes attention: "auto" (folo's kernels), "triton", "cpu", "torch" (its
            varlen_attn), "flash_attn" or "reference"; see `folo.ops.attention`.
        deterministic: refuse an attention backend that is not known to keep a request's bits
            independent of what else runs.

    Raises:
        ConfigError: the seed is out of range; `params` is not a Params, or a configuration has the wrong
            type; the heap would hold no block, or needs more memory than there is; max_model_len exceeds
            the model or the heap; the attention backend is unavailable, or `deterministic` refuses it.
    """
    require_params(params)
    seed = require_seed(seed)
    cache = CacheConfig() if cache is None else cache
    scheduler = SchedulerConfig() if scheduler is None else scheduler
    require_kind("cache", cache, CacheConfig)
    require_kind("scheduler", scheduler, SchedulerConfig)
    config = params.config
    backend = attention_backend(
        attention, params.device, params.dtype, cache.block_size, config.head_dim, deterministic
    )
    block_bytes = config.kv_per_token * cache.block_size * params.dtype.itemsize
    spare = margin(cache, scheduler, params.device)
    num_blocks = cache.num_blocks
    if num_blocks is None:
        memory = _heap_bytes(cache, params.device)
        num_blocks = memory // block_bytes - spare
        if num_blocks < 1:
            raise ConfigError(
                f"{memory / 2**30:.2f} GiB hold {memory // block_bytes} blocks of {block_bytes / 2**20:.2f} "
                f"MiB, of which {spare} are kept for steps in flight; raise kv_cache_gib (CPU) or "
                f"gpu_memory_utilization (CUDA), or lower max_num_seqs, max_num_batched_tokens or block_size"
            )
    longest = longest_sequence(config, cache, scheduler, num_blocks)
    shape = (config.num_layers, num_blocks + spare, cache.block_size, config.num_kv_heads, config.head_dim)
    try:
        heap = KVHeap(shape, params.dtype, params.device)
    except (OSError, OverflowError, torch.OutOfMemoryError) as error:
        raise ConfigError(
            f"no memory for a KV heap of {num_blocks + spare} blocks, "
            f"{block_bytes * (num_blocks + spare) / 2**30:.1f} GiB ({error}); {spare} of them are for steps "
            f"in flight and the reserve: lower num_blocks, kv_cache_gib (CPU), gpu_memory_utilization "
            f"(CUDA), reserve_blocks, max_num_seqs or max_num_batched_tokens"
        ) from error
    return EngineState(
        running=(),
        waiting=(),
        requests=Map(),
        finished=Map(),
        pool=Pool(num_blocks),
        arrivals=0,
        counters=Counters(),
        seed=seed,
        max_model_len=longest,
        cache=replace(cache, num_blocks=num_blocks),
        scheduler=scheduler,
        params=params,
        heap=heap,
        tokenizer=tokenizer,
        attention=backend,
    )


def require_params(params: Any) -> None:
    """Raises ConfigError unless `params` is a Params."""
    # No isinstance: `state` never imports `model`. On the type: the value would compute it from all weights.
    if not hasattr(type(params), "fingerprint"):
        raise ConfigError(f"params={params!r}: expected what folo.load returns")


def require_state(state: Any) -> None:
    """Raises ConfigError unless `state` is an EngineState."""
    if not isinstance(state, EngineState):
        raise ConfigError(
            f"state={state!r}: expected an EngineState; folo.init makes one, and folo.step and folo.collect "
            f"return one in a tuple"
        )


def margin(cache: CacheConfig, scheduler: SchedulerConfig, device: torch.device) -> int:
    """Blocks of the heap beyond those that one state may use: for steps in flight, and the reserve.

    A step takes blocks for its tokens and, for each sequence, up to one copy and one block that stays
    partly empty, while the state that it started from is still held. On a GPU a second step is bound
    before the first has landed.
    """
    chunk, in_flight = -(-scheduler.max_num_batched_tokens // cache.block_size), 1 + (device.type == "cuda")
    return in_flight * (chunk + 2 * scheduler.max_num_seqs) + cache.reserve_blocks


def longest_sequence(
    config: DecoderConfig, cache: CacheConfig, scheduler: SchedulerConfig, num_blocks: int
) -> int:
    """max_model_len in tokens; if None, the most that model and heap allow. ConfigError if it is more."""
    capacity, longest = num_blocks * cache.block_size, scheduler.max_model_len
    if longest is None:
        return min(config.max_position_embeddings, capacity)
    if longest > config.max_position_embeddings:
        raise ConfigError(
            f"max_model_len={longest} exceeds the model's {config.max_position_embeddings} positions"
        )
    if longest > capacity:
        raise ConfigError(
            f"max_model_len={longest} exceeds the {capacity} tokens that num_blocks={num_blocks} of "
            f"{cache.block_size} hold; raise num_blocks or lower max_model_len"
        )
    return longest


def _heap_bytes(cache: CacheConfig, device: torch.device) -> int:
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what dropped heaps left with torch's allocator is free, too
        free, total = torch.cuda.mem_get_info(device)
        return int(free - (1 - cache.gpu_memory_utilization) * total)
    return int(min(cache.kv_cache_gib * 2**30, 2**63))  # infinity is no number of bytes


# Sequences, requests and accounting are leaves: immutable values that no tensor function can map over.
_CONTEXT = ("seed", "max_model_len", "cache", "scheduler", "params", "heap", "tokenizer", "attention")
register(EngineState, context=_CONTEXT)
