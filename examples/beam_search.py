"""Beam search from `fork`, forced tokens and logprobs.

    python examples/beam_search.py [--model MODEL] [--beams K] [--max-tokens N]

The beams are requests in one state, and one step computes them all. Each that goes on is then forked: the
child keeps all but the token just sampled, and is forced to take the one that the search chose. Children
share their parent's blocks: nothing is computed twice; a block is copied only if several write in it.
In float32 the hypotheses are those of transformers' `generate(num_beams=K)`, token for token.
"""

import argparse
from functools import reduce

import folo


def beam_search(
    params: folo.Params, prompt_ids: list[int], num_beams: int, max_tokens: int, length_penalty: float = 1.0
) -> list[tuple[float, list[int]]]:
    """The best hypotheses, best first: (log-probability / length**length_penalty, token ids)."""
    eos = params.config.eos_token_ids
    enough = num_beams + len(eos)  # likeliest tokens: at least num_beams are not eos
    sampling = folo.SamplingParams(temperature=0, max_tokens=max_tokens, logprobs=enough, ignore_eos=True)
    state = folo.submit(folo.init(params), folo.Request(prompt_ids, sampling, id="0"))
    beams, finished = {"0": (0.0, "", [])}, []
    for length in range(1, max_tokens + 1):
        tables = {}  # by beam: the likeliest tokens at each position
        while min(map(len, tables.values()), default=0) < length and (batch := folo.schedule(state)):
            state, _ = folo.step(params, state, batch)
            tables = {id: output.outputs[0].logprobs or [] for id, output in folo.outputs(state).items()}
        candidates = [
            (logprob + entry.logprob, id, [*ids, token])
            for id, (logprob, _, ids) in beams.items()
            for token, entry in tables[id][length - 1].items()
        ]
        candidates.sort(reverse=True)
        norm, last = length**length_penalty, length == max_tokens
        ended = [(total / norm, ids) for total, _, ids in candidates[:num_beams] if last or ids[-1] in eos]
        finished = sorted(finished + ended, reverse=True)[:num_beams]
        alive = [(total, id, ids) for total, id, ids in candidates if ids[-1] not in eos][:num_beams]
        if last or (len(finished) == num_beams and finished[-1][0] >= alive[0][0] / norm):
            break  # as transformers does: were the best beam to end here, it would not make the list
        parents, beams = beams, {f"{length}.{rank}": beam for rank, beam in enumerate(alive)}
        for child, (_, parent, ids) in beams.items():
            state = folo.fork(state, parent, [child], keep=len(prompt_ids) + length - 1, append=ids[-1:])
        state, _ = folo.collect(reduce(folo.abort, parents, state))
    return finished


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Beam search over folo.fork")
    parser.add_argument("--model", default=None)
    parser.add_argument("--beams", type=int, default=4)
    parser.add_argument("--max-tokens", type=int, default=24)
    args = parser.parse_args()
    params, tokenizer = folo.load(args.model), folo.load_tokenizer(args.model)
    prompt_ids = tokenizer("The best thing about winter is")["input_ids"]
    for score, ids in beam_search(params, prompt_ids, args.beams, args.max_tokens):
        print(f"{score:8.3f} {tokenizer.decode(ids)!r}")
