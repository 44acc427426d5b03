"""What a state has to show for its requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from folo import detokenize
from folo.request import CompletionOutput, Logprob, RequestOutput
from folo.state.engine import EngineState, Held
from folo.state.flight import landed_or_before
from folo.state.sequence import Sequence, TokenLogprobs


def has_unfinished(state: EngineState) -> bool:
    """Whether any sequence still waits or runs."""
    state = landed_or_before(state)
    return bool(state.running or state.waiting)


def outputs(state: EngineState) -> dict[str, RequestOutput]:
    """The output so far of every request that the state holds, finished or not, in order of arrival."""
    state = landed_or_before(state)
    unfinished = state.unfinished()
    return {
        held.request.id: output_of(state, held, unfinished.get(held.request.id, ()))
        for held in state.all_held()
    }


def text_of(tokenizer: Any, sequence: Sequence) -> str:
    """The text of a sequence's output; "" without a tokenizer."""
    params = sequence.origin.request.sampling
    if tokenizer is None or not params.detokenize:
        return ""
    if sequence.text is None:
        prompt = sequence.origin.request.prompt_token_ids
        return detokenize.text_of(tokenizer, prompt, sequence.text_ids, params.skip_special_tokens)
    return sequence.text.final_text


def token_text_of(tokenizer: Any, token: int) -> str | None:
    """One token on its own, as it shows in logprobs; None without a tokenizer."""
    return None if tokenizer is None else tokenizer.decode([token])


def output_of(
    state: EngineState,
    held: Held,
    unfinished: Iterable[Sequence] = (),
    text: Callable[[Any, Sequence], str] = text_of,
    token_text: Callable[[Any, int], str | None] = token_text_of,
) -> RequestOutput:
    """One request's output, given those of its sequences that stand in the queues.

    text, token_text: replacements for `text_of` and `token_text_of`, for a caller that caches text.
    """
    request = held.request
    sequences = sorted((*held.ended, *unfinished), key=lambda s: s.origin.sample)
    first = sequences[0]
    shown = sequences
    if held.finished:
        chosen = sorted(sequences, key=_merit) if request.sampling.best_of else sequences
        shown = chosen[: request.sampling.n]

    def piece(token: int) -> str | None:
        return token_text(state.tokenizer, token)

    return RequestOutput(
        request_id=request.id,
        prompt=request.prompt,
        prompt_token_ids=list(request.prompt_token_ids),
        prompt_logprobs=_prompt_logprobs(first, piece),
        outputs=[_completion(index, s, text(state.tokenizer, s), piece) for index, s in enumerate(shown)],
        finished=held.finished,
        num_cached_tokens=first.num_cached or 0,
        lineage=first.origin.lineage,
    )


def _merit(sequence: Sequence) -> tuple[bool, bool, float, int]:
    """The sort key of best_of. An aborted sample summed fewer logprobs: only empty ones rank below it."""
    cut = sequence.finish_reason == "abort"
    return not sequence.num_output, cut, -sequence.cumulative_logprob, sequence.origin.sample


def _completion(
    index: int, sequence: Sequence, text: str, piece: Callable[[int], str | None]
) -> CompletionOutput:
    origin, ids = sequence.origin, sequence.output_ids
    params, logprobs = origin.request.sampling, None
    scored = sequence.output_scores
    if params.logprobs is not None:  # those of forced tokens may still be to come
        pairs = zip(ids, scored, strict=False)
        logprobs = [_table(token, scores, params.logprobs, piece) for token, scores in pairs]
    return CompletionOutput(
        index=index,
        text=text,
        token_ids=ids,
        cumulative_logprob=sequence.cumulative_logprob if scored else None,
        logprobs=logprobs,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        seed=origin.seed,
        sample_index=origin.sample,
    )


def _prompt_logprobs(
    sequence: Sequence, piece: Callable[[int], str | None]
) -> list[dict[int, Logprob] | None] | None:
    request = sequence.origin.request
    count = request.sampling.prompt_logprobs
    if count is None:
        return None
    scored = zip(request.prompt_token_ids[1:], sequence.prompt_scores, strict=False)
    return [None, *(_table(token, scores, count, piece) for token, scores in scored)]


def _table(
    token: int, scores: TokenLogprobs, count: int, piece: Callable[[int], str | None]
) -> dict[int, Logprob]:
    """The token itself first, then the `count` likeliest, as vLLM orders them."""
    table = {token: Logprob(scores.logprob, scores.rank, piece(token))}
    likeliest = zip(scores.top_ids[:count], scores.top_logprobs[:count], strict=True)
    for rank, (other, logprob) in enumerate(likeliest, 1):
        table.setdefault(other, Logprob(logprob, rank, piece(other)))
    return table
