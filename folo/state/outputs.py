"""What a state has to show for its requests."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from folo import detokenize
from folo.request import CompletionOutput, Logprob, RequestOutput
from folo.state.engine import Admitted, EngineState
from folo.state.sequence import Sequence, TokenLogprobs


def has_unfinished(state: EngineState) -> bool:
    """Whether any sequence still waits or runs."""
    return bool(state.running or state.waiting)


def outputs(state: EngineState) -> dict[str, RequestOutput]:
    """The output so far of every request that the state holds, finished or not, in order of arrival."""
    both = (a for requests in (state.requests, state.finished) for _, a in requests.items())
    unfinished: dict[str, list[Sequence]] = {}
    for sequence in (*state.running, *state.waiting):
        unfinished.setdefault(sequence.id, []).append(sequence)
    return {
        a.request.id: output_of(state, a, unfinished.get(a.request.id, ()))
        for a in sorted(both, key=lambda a: a.arrival)
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


def output_of(
    state: EngineState,
    admitted: Admitted,
    unfinished: Iterable[Sequence] = (),
    text: Callable[[Any, Sequence], str] = text_of,
) -> RequestOutput:
    """One request's output, given those of its sequences that stand in the queues.

    text: stands in for `text_of` where a caller has most of the text already.
    """
    request = admitted.request
    sequences = sorted((*admitted.ended, *unfinished), key=lambda s: s.origin.sample)
    first = sequences[0]
    finished = len(admitted.ended) == admitted.num_samples
    shown = sequences
    if finished:
        best = sorted(sequences, key=lambda s: (-s.cumulative_logprob, s.origin.sample))
        chosen = best if request.sampling.best_of else sequences
        shown = chosen[: request.sampling.n]
    return RequestOutput(
        request_id=request.id,
        prompt=request.prompt,
        prompt_token_ids=list(request.prompt_token_ids),
        prompt_logprobs=_prompt_logprobs(state.tokenizer, first),
        outputs=[_completion(state.tokenizer, index, s, text) for index, s in enumerate(shown)],
        finished=finished,
        num_cached_tokens=first.num_cached,
    )


def _completion(
    tokenizer: Any, index: int, sequence: Sequence, text: Callable[[Any, Sequence], str]
) -> CompletionOutput:
    origin = sequence.origin
    params = origin.request.sampling
    wanted = params.logprobs is not None
    scored = wanted or params.best_of is not None
    return CompletionOutput(
        index=index,
        text=text(tokenizer, sequence),
        token_ids=sequence.output_ids,
        cumulative_logprob=sequence.cumulative_logprob if scored else None,
        logprobs=[
            _table(tokenizer, token, scores, params.logprobs)
            for token, scores in zip(sequence.output_ids, sequence.logprobs, strict=True)
        ]
        if params.logprobs is not None
        else None,
        finish_reason=sequence.finish_reason,
        stop_reason=sequence.stop_reason,
        seed=origin.seed,
        lineage=origin.lineage,
    )


def _prompt_logprobs(tokenizer: Any, sequence: Sequence) -> list[dict[int, Logprob] | None] | None:
    request = sequence.origin.request
    count = request.sampling.prompt_logprobs
    if count is None:
        return None
    scored = zip(request.prompt_token_ids[1:], sequence.prompt_logprobs, strict=False)
    return [None, *(_table(tokenizer, token, scores, count) for token, scores in scored)]


def _table(tokenizer: Any, token: int, scores: TokenLogprobs, count: int) -> dict[int, Logprob]:
    """The token itself first, then the `count` likeliest, as vLLM orders them."""

    def entry(token: int, logprob: float, rank: int) -> Logprob:
        return Logprob(logprob, rank, None if tokenizer is None else tokenizer.decode([token]))

    table = {token: entry(token, scores.logprob, scores.rank)}
    for rank, (other, logprob) in enumerate(
        zip(scores.top_ids[:count], scores.top_logprobs[:count], strict=True), 1
    ):
        table.setdefault(other, entry(other, logprob, rank))
    return table
