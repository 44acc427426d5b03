"""One cell of the invariance matrix: the same requests, run in one of the many ways that must not matter.

arrival     one request after the other, each alone in the engine; all together; shuffled; one more each step
budget      tokens of a step (max_num_batched_tokens)
cache       no prefix cache; an empty one; one that the same requests have filled
pool        ample, or so small that sequences are preempted over and over. A request alone preempts none,
            so those two levels are not combined.
threads     torch.set_num_threads
history     plain; forked: half-way each sample is forked, and a child goes on in the place of its parent,
            or beside it; restored: half-way the state is saved, and goes on in a new process
mode        folo.step, or what folo.compile makes of it: on CUDA also replayed graphs
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import torch

import folo
from folo.bench.pairwise import pairwise
from folo.config import CompileMode
from folo.state.flight import landed

FACTORS: Mapping[str, tuple[Any, ...]] = {
    "arrival": ("alone", "together", "shuffled", "one a step"),
    "budget": (16, 64, 2048),
    "block_size": (8, 16, 32, 64),
    "cache": ("off", "cold", "warm"),
    "pool": ("ample", "small"),
    "threads": (1, 2),
    "history": ("plain", "forked", "restored"),
    "mode": ("eager", "compiled", *(["graph"] if torch.cuda.is_available() else [])),
}
_MODES: Mapping[str, CompileMode] = {"eager": "eager", "compiled": "inductor", "graph": "cudagraph"}
EXCLUDED = ((("arrival", "alone"), ("pool", "small")),)


@dataclass(frozen=True)
class Cell:
    """One level of each of the `FACTORS`."""

    arrival: str
    budget: int
    block_size: int
    cache: str
    pool: str
    threads: int
    history: str
    mode: str


REFERENCE = Cell("alone", 2048, 16, "off", "ample", 1, "plain", "eager")


def array() -> list[Cell]:
    """Cells that cover every pair of levels that can be combined."""
    return [Cell(**row) for row in pairwise(FACTORS, EXCLUDED)]


def every_cell() -> list[Cell]:
    """All cells, in an order that mixes the levels."""
    cells = [Cell(*levels) for levels in product(*FACTORS.values())]
    for (one, level), (other, beside) in EXCLUDED:
        cells = [cell for cell in cells if (getattr(cell, one), getattr(cell, other)) != (level, beside)]
    return random.Random(0).sample(cells, len(cells))


@dataclass(frozen=True)
class Subject:
    """The model under test, and its requests.

    model: where a new process finds it. small_pools: by block size, how many blocks are so few that the
    requests preempt one another.
    """

    params: folo.Params
    model: str | None
    requests: tuple[folo.Request, ...]
    small_pools: Mapping[int, int]


class Output(NamedTuple):
    """One continuation: its tokens, and its logprobs and ranks as text, equal only if all bits are."""

    name: str
    token_ids: list[int]
    scores: list[str]


class Run(NamedTuple):
    """What requests gave, and what happened to them. cached: tokens that were found in the prefix cache."""

    outputs: list[Output]
    preemptions: int
    cached: int


def run(subject: Subject, cell: Cell) -> Run:
    """The subject's requests, run as the cell says."""
    threads = torch.get_num_threads()
    torch.set_num_threads(cell.threads)
    try:
        return _run(subject, cell)
    finally:
        torch.set_num_threads(threads)


def _run(subject: Subject, cell: Cell) -> Run:
    step, asked = _step(cell.mode), list(subject.requests)
    if cell.arrival == "shuffled":
        random.Random(0).shuffle(asked)
    groups = [[request] for request in asked] if cell.arrival == "alone" else [asked]
    rate = 1 if cell.arrival == "one a step" else len(asked)
    start = _start(subject, cell, step)
    if cell.history == "restored":
        with TemporaryDirectory() as directory:
            for number, group in enumerate(groups):
                half = sum((r.sampling.max_tokens or 0) * r.sampling.n for r in group) // 2
                state = _advance(step, start, group, rate, left=half)
                folo.save(state, Path(directory, f"{number:02}.state"))
            parts = _in_new_process(subject, cell, Path(directory))
    else:
        each = _forked if cell.history == "forked" else None
        parts = [_ended(_advance(step, start, group, rate, each)) for group in groups]
    return Run(
        [output for part in parts for output in part.outputs],
        sum(part.preemptions - start.counters.preemptions for part in parts),
        sum(part.cached - start.counters.prefix_hits for part in parts),
    )


def _step(mode: str) -> folo.Step:
    return folo.compile(folo.step, mode=_MODES[mode])


def _start(subject: Subject, cell: Cell, step: folo.Step) -> folo.EngineState:
    """A state without requests. It is held, as all of the cell's runs begin with it: hence the reserve."""
    if cell.pool == "small":
        num_blocks = subject.small_pools[cell.block_size]
    else:  # for all samples, twice over
        lengths = [
            (len(r.prompt_token_ids) + (r.sampling.max_tokens or 0), r.sampling.n) for r in subject.requests
        ]
        num_blocks = 2 * sum(n * -(-length // cell.block_size) for length, n in lengths)
    cache = folo.CacheConfig(
        block_size=cell.block_size,
        num_blocks=num_blocks,
        reserve_blocks=num_blocks,
        enable_prefix_caching=cell.cache != "off",
    )
    state = folo.init(subject.params, cache, folo.SchedulerConfig(max_num_batched_tokens=cell.budget))
    if cell.cache == "warm":
        state, _ = folo.collect(_advance(step, state, subject.requests, len(subject.requests)))
    return state


def _advance(
    step: folo.Step,
    state: folo.EngineState,
    coming: Iterable[folo.Request] = (),
    rate: int = 1,
    each: Callable[[folo.EngineState], folo.EngineState] | None = None,
    left: int = 0,
) -> folo.EngineState:
    """Step until all requests are in and no more than `left` tokens are still to come.

    rate: how many of the coming requests are submitted before each step. each: applied to the state after
    each step.
    """
    waiting = deque(coming)
    while waiting or _to_come(state) > left:
        for _ in range(min(rate, len(waiting))):
            state = folo.submit(state, waiting.popleft())
        batch = folo.schedule(state)
        if batch is None:  # the tokens still to come are in flight
            assert state.flight is not None, "there is something to run"
            state = landed(state)
            continue
        state, _ = step(state.params, state, batch)
        if each is not None:
            state = each(state)
    return state


def _to_come(state: folo.EngineState) -> int:
    return sum(s.origin.max_length - s.tokens.length for s in (*state.running, *state.waiting))


def _forked(state: folo.EngineState) -> folo.EngineState:
    """Fork every sample that is half-way. If the prompt's length is odd, children replace their parent."""
    for s in (*state.running, *state.waiting):
        request, child = s.origin.request, _name(s.id, s.origin.sample)
        if "#" in s.id or 2 * s.num_output < (request.sampling.max_tokens or 0) or _holds(state, child):
            continue
        state = folo.fork(state, s.id, [child], sample=s.origin.sample)
        children = [_name(s.id, sample) for sample in range(request.sampling.n)]
        if s.origin.num_prompt % 2 and all(_holds(state, child) for child in children):
            state = folo.abort(state, s.id)
    return state


def _holds(state: folo.EngineState, id: str) -> bool:
    return id in state.requests or id in state.finished


def _name(id: str, sample: int) -> str:
    """The name of a sample, and the id of the child that is forked from it."""
    return f"{id}#{sample}"


def _ended(state: folo.EngineState) -> Run:
    found: list[Output] = []
    for id, output in folo.outputs(state).items():
        for completion in output.outputs:
            if completion.finish_reason == "abort":
                continue
            name = id if "#" in id else _name(id, completion.index)
            tables = [*(output.prompt_logprobs or ()), *(completion.logprobs or ())]
            scores = [
                " ".join(f"{token} {p.logprob.hex()} {p.rank}" for token, p in (table or {}).items())
                for table in tables
            ]
            total = float.hex(completion.cumulative_logprob or 0.0)
            found.append(Output(name, completion.token_ids, [*scores, total]))
    return Run(found, state.counters.preemptions, state.counters.prefix_hits)


def _in_new_process(subject: Subject, cell: Cell, directory: Path) -> list[Run]:
    """Finish the states saved in the directory in a new process."""
    dtype = str(subject.params.dtype).removeprefix("torch.")
    job = {"model": subject.model, "dtype": dtype, "threads": cell.threads, "mode": cell.mode}
    (directory / "job.json").write_text(json.dumps(job))
    command = [sys.executable, "-m", "folo.bench.cells", "--resume", str(directory)]
    subprocess.run(command, check=True)
    runs = json.loads((directory / "runs.json").read_text())
    return [Run([Output(*output) for output in outputs], *counts) for outputs, *counts in runs]


def resume(directory: Path) -> None:
    """The new process: restore each state of the directory, run it to its end and write down what it gave."""
    job = json.loads((directory / "job.json").read_text())
    torch.set_num_threads(job["threads"])
    params = folo.load(job["model"], dtype=job["dtype"], use_tqdm=False)
    step = _step(job["mode"])
    files = sorted(directory.glob("*.state"))
    runs = [_ended(_advance(step, folo.restore(params, file))) for file in files]
    (directory / "runs.json").write_text(json.dumps(runs))


if __name__ == "__main__":
    _parser = argparse.ArgumentParser()
    _parser.add_argument("--resume", type=Path, required=True)
    resume(_parser.parse_args().resume)
