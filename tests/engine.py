"""Short ways to drive the functional API in tests, and the oracle that its outputs are compared with."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from collections.abc import Sequence as Items
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import torch
from torch import Tensor

import folo
from folo import detokenize, ops
from folo.sampling import Context

Table = dict[int, folo.Logprob]


def prompt(length: int, seed: int = 0, vocab_size: int = 300) -> list[int]:
    """Random token ids, away from the special ones."""
    return random.Random(seed * 1000 + length).choices(range(3, vocab_size), k=length)


def finish_all(
    params: folo.Params,
    state: folo.EngineState,
    each: Callable[[folo.EngineState], None] = folo.check,
) -> folo.EngineState:
    """Step until nothing is left to run, with `each` called on every state."""
    while (batch := folo.schedule(state)) is not None:
        state, _ = folo.step(params, state, batch)
        each(state)
    return state


def stepped(params: folo.Params, state: folo.EngineState, count: int = 1) -> folo.EngineState:
    """The state after this many steps, each of them checked."""
    for _ in range(count):
        batch = folo.schedule(state)
        assert batch is not None, "nothing is left to run"
        state, _ = folo.step(params, state, batch)
        folo.check(state)
    return state


def ids_of(state: folo.EngineState, id: str, sample: int = 0) -> list[int]:
    """The output tokens of a sample so far."""
    return folo.outputs(state)[id].outputs[sample].token_ids


def run(
    params: folo.Params,
    requests: Iterable[folo.Request],
    cache: folo.CacheConfig | None = None,
    scheduler: folo.SchedulerConfig | None = None,
    **options: object,
) -> dict[str, folo.RequestOutput]:
    """The outputs of these requests, submitted together to a fresh state."""
    cache = folo.CacheConfig(num_blocks=64) if cache is None else cache
    state = folo.init(params, cache, scheduler, **options)  # pyright: ignore[reportArgumentType]
    for request in requests:
        state = folo.submit(state, request)
    return folo.outputs(finish_all(params, state))


@dataclass(frozen=True)
class Recipe:
    """All that decides one sample, besides the weights.

    given: output tokens that are there before the first one is sampled: kept by a fork, or forced.
    limit: max_model_len.
    """

    prompt: tuple[int, ...]
    sampling: folo.SamplingParams
    seed: int
    stream: int = 0
    given: tuple[int, ...] = ()
    limit: int = 256

    @property
    def max_length(self) -> int:
        wanted = self.sampling.max_tokens
        return self.limit if wanted is None else min(self.limit, len(self.prompt) + wanted)

    @staticmethod
    def of(state: folo.EngineState, request: folo.Request, sample: int = 0) -> Recipe:
        """The recipe of a request that is submitted to this state."""
        seed = request.sampling.seed
        if seed is None:
            seed = folo.sampling.derive_seed(state.seed, request.id)
        prompt = tuple(request.prompt_token_ids)
        return Recipe(prompt, request.sampling, seed, sample, limit=state.max_model_len)

    def forked(self, keep: int, forced: Iterable[int] = (), seed: int | None = None) -> Recipe:
        """The recipe of a child that keeps this many tokens: the prompt's, then those in `given`."""
        given = (*self.given[: keep - len(self.prompt)], *forced)
        if seed is None:
            return replace(self, given=given)
        return replace(self, given=given, seed=seed, stream=0)


class Oracle:
    """What each sample has to be, recomputed without a state: row by row from the model's logits.

    A token is right if it is what the tokens before it give; so an output is right if all of its
    tokens are, and one pass of the model over all of it shows that.
    """

    def __init__(self, params: folo.Params, tokenizer: Any = None) -> None:
        self.params, self.tokenizer = params, tokenizer
        self._known: dict[Any, dict[tuple[int, ...], tuple[int, Table]]] = {}
        self._prompts: dict[Any, list[Table | None]] = {}
        self._pieces: dict[int, str] = {}

    def verify(self, recipes: Items[Recipe], mine: folo.RequestOutput, cut: bool = False) -> None:
        """Assert that a request's output so far is what its samples' recipes say; cut: someone ended it."""
        assert len(mine.outputs) == len(recipes)
        for index, (recipe, completion) in enumerate(zip(recipes, mine.outputs, strict=True)):
            assert completion.index == index
            self.verify_sample(recipe, completion, cut)
        first, count = recipes[0], recipes[0].sampling.prompt_logprobs
        assert mine.prompt_token_ids == list(first.prompt)
        if count is None or mine.prompt_logprobs is None:
            assert mine.prompt_logprobs is count is None
            return
        expected = self._prompt(first.prompt, count)
        if len(mine.outputs[0].token_ids) > len(first.given):
            assert mine.prompt_logprobs == expected
        assert mine.prompt_logprobs == expected[: len(mine.prompt_logprobs)]

    def verify_sample(self, recipe: Recipe, mine: folo.CompletionOutput, cut: bool = False) -> None:
        ids, num_given, sampling = mine.token_ids, len(recipe.given), recipe.sampling
        rows = self._rows(recipe, tuple(ids))
        assert ids == [*recipe.given, *(token for token, _ in rows[num_given:])]
        assert mine.seed == recipe.seed
        if sampling.logprobs is None:
            assert mine.logprobs is None
        else:
            assert mine.logprobs is not None
            scored = len(mine.logprobs)
            assert scored == len(ids) or len(ids) == num_given, "only forced tokens may still be unscored"
            tables = [table for _, table in rows[:scored]]
            assert mine.logprobs == tables
            total = 0.0
            for token, table in zip(ids, tables, strict=False):
                total += table[token].logprob
            assert mine.cumulative_logprob == (total if tables else None)
        text, reason, stop = self._ending(recipe, ids)
        if reason is None and cut:
            assert mine.finish_reason is not None
        else:
            assert (mine.finish_reason, mine.stop_reason) == (reason, stop)
        assert mine.text == text

    def _rows(self, recipe: Recipe, output: tuple[int, ...]) -> list[tuple[int, Table]]:
        """For each place in an output: the token that is sampled there, and the scores of the one given."""
        key = recipe.prompt, recipe.sampling, recipe.seed, recipe.stream
        known = self._known.setdefault(key, {})
        missing = [n for n in range(len(output)) if output[: n + 1] not in known]
        if missing:
            tokens = (*recipe.prompt, *output[:-1])
            logits = folo.model.forward(self.params, torch.tensor(tokens))
            for n in missing:
                raw = logits[len(recipe.prompt) + n - 1]
                drawn, processed = draw(recipe, output[:n], raw, self.stop_ids(recipe))
                scored = processed if recipe.sampling.logprobs_mode == "processed" else raw
                table = self._table(scored, output[n], recipe.sampling.logprobs or 0)
                known[output[: n + 1]] = drawn, table
        return [known[output[: n + 1]] for n in range(len(output))]

    def stop_ids(self, recipe: Recipe) -> set[int]:
        ends = () if recipe.sampling.ignore_eos else self.params.config.eos_token_ids
        return {*ends, *(recipe.sampling.stop_token_ids or ())}

    def _prompt(self, prompt: tuple[int, ...], count: int) -> list[Table | None]:
        if (prompt, count) not in self._prompts:
            logits = folo.model.forward(self.params, torch.tensor(prompt))
            rows = zip(logits[:-1], prompt[1:], strict=True)
            tables = [self._table(row, token, count) for row, token in rows]
            self._prompts[prompt, count] = [None, *tables]
        return self._prompts[prompt, count]

    def _table(self, logits: Tensor, token: int, count: int) -> Table:
        columns = ops.pick_logprobs(logits[None], torch.tensor([token]), count)
        logprob, rank, top_ids, top_logprobs = (column[0].tolist() for column in columns)
        table = {token: folo.Logprob(logprob, rank, self._piece(token))}
        for place, (id, value) in enumerate(zip(top_ids, top_logprobs, strict=True), 1):
            table.setdefault(id, folo.Logprob(value, place, self._piece(id)))
        return table

    def _piece(self, token: int) -> str | None:
        if self.tokenizer is None:
            return None
        if token not in self._pieces:
            self._pieces[token] = self.tokenizer.decode([token])
        return self._pieces[token]

    def _ending(self, recipe: Recipe, ids: list[int]) -> tuple[str, str | None, int | str | None]:
        """The text of an output, and why it ends with its last token if it does; no other may end it."""
        sampling, tokenizer, stop_ids = recipe.sampling, self.tokenizer, self.stop_ids(recipe)
        reason = stop = None
        shown = ids
        text = detokenize.begin(tokenizer, recipe.prompt) if sampling.stop else None
        for place, token in enumerate(ids):
            assert reason is None, "it goes on beyond its end"
            count = place + 1
            sampled, may_stop = place >= len(recipe.given), count >= sampling.min_tokens
            before = text
            text = text and detokenize.advance(tokenizer, text, [token])
            if not sampled:
                continue
            if may_stop and token in stop_ids:
                reason, stop = "stop", token if token in (sampling.stop_token_ids or ()) else None
                if not sampling.include_stop_str_in_output:
                    text, shown = before, ids[:place]
                continue
            if text and before and may_stop:
                is_last = len(recipe.prompt) + count >= recipe.max_length
                readable = text.final_text if is_last else text.certain_text
                found = detokenize.find_stop(readable, len(before.certain_text), sampling.stop or ())
                if found is not None:
                    reason, (at, stop) = "stop", found
                    end = at + len(stop) * sampling.include_stop_str_in_output
                    text = replace(text, text=readable[:end], pending="")
                    continue
            if len(recipe.prompt) + count >= recipe.max_length:
                reason = "length"
        if text is not None:
            return text.final_text, reason, stop
        whole = "" if tokenizer is None else detokenize.text_of(tokenizer, recipe.prompt, shown)
        return whole, reason, stop


def draw(recipe: Recipe, output: Items[int], raw: Tensor, stop_ids: Iterable[int]) -> tuple[int, Tensor]:
    """The token that follows prompt and output, and the processed logits `[V]` that it is drawn from."""
    sampling, length = recipe.sampling, len(recipe.prompt) + len(output)
    bias = dict(sampling.logit_bias or ())
    if len(output) < sampling.min_tokens:
        bias |= dict.fromkeys(stop_ids, -math.inf)
    penalties = sampling.repetition_penalty, sampling.presence_penalty, sampling.frequency_penalty
    processed = ops.penalize(
        raw[None],
        torch.tensor([*recipe.prompt, *output]),
        torch.tensor([0, length]),
        torch.tensor([len(recipe.prompt)]),
        *map(column, penalties),
        torch.zeros(len(bias), dtype=torch.int64),
        torch.tensor(list(bias), dtype=torch.int64),
        torch.tensor(list(bias.values()), dtype=torch.float32),
    )
    temperature, min_p, top_p = map(column, (sampling.temperature, sampling.min_p, sampling.top_p))
    processed = ops.warp(processed, temperature, min_p, torch.tensor([sampling.top_k]), top_p)
    context = Context(recipe.prompt, tuple(output), length, recipe.stream)
    for transform in sampling.logits_processors:
        processed = transform(processed[0], context)[None]
    u = _uniform(recipe.seed, length, recipe.stream)
    return int(ops.draw(processed, temperature == 0, u)), processed[0]


@cache
def column(value: float) -> Tensor:
    """A column for a batch of one row. Cached: very many rows have few values."""
    return torch.tensor([value], dtype=torch.float32)


@cache
def _uniform(seed: int, position: int, stream: int) -> Tensor:
    words = [seed - 2**64 if seed >= 2**63 else seed, position, stream]
    return ops.philox(*(torch.tensor([word]) for word in words), 0)
