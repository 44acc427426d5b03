"""Best-first tree search: the likeliest ways for a line to go on, in their order. Every node is a state.

    python examples/tree_search.py [--model MODEL] [--lines N] [--width W]

A node is expanded by one step of its state, and by a fork for each of the W likeliest tokens. The likeliest
node is always next. Probability only falls along a branch, so when a line that has ended comes up, no line
that is still to come is likelier. Nodes are cheap to hold: as far as their texts agree, they share blocks.
"""

import argparse
from heapq import heappop, heappush
from math import exp

import folo

PROMPT = """Proverb: All that glitters is not gold.
Proverb: A bird in the hand is worth two in the bush.
Proverb: The early"""


def expand(params: folo.Params, state: folo.EngineState) -> list[tuple[float, str, str, folo.EngineState]]:
    """The children, likeliest first: the token's log-probability, its text, the child's id, its state."""
    batch = folo.schedule(state)
    assert batch is not None
    state, _ = folo.step(params, state, batch)
    ((parent, output),) = folo.outputs(state).items()
    keep = len(output.prompt_token_ids) + len(output.outputs[0].token_ids) - 1  # all but the sampled token
    children = []
    for token, entry in (output.outputs[0].logprobs or [])[-1].items():
        id = f"{parent} {token}"
        child = folo.abort(folo.fork(state, parent, [id], keep=keep, append=[token]), parent)
        children.append((entry.logprob, entry.decoded_token, id, folo.collect(child)[0]))
    return children


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Best-first tree search in which every node is a state")
    parser.add_argument("--model", default=None)
    parser.add_argument("--lines", type=int, default=8)
    parser.add_argument("--width", type=int, default=16)
    args = parser.parse_args()
    params, tokenizer = folo.load(args.model), folo.load_tokenizer(args.model)
    state = folo.init(params, folo.CacheConfig(num_blocks=64, reserve_blocks=1000), tokenizer=tokenizer)
    sampling = folo.SamplingParams(temperature=0, max_tokens=None, logprobs=args.width, ignore_eos=True)
    state = folo.submit(state, folo.Request(tokenizer(PROMPT)["input_ids"], sampling, id="0"))
    frontier, cost, lines, left_out = [(0.0, "0", "", state)], 0.0, 0, 0.0  # cost: -log-probability
    while lines < args.lines:
        cost, id, text, state = heappop(frontier)
        if "\n" in text or text.endswith(str(tokenizer.eos_token)):
            lines += 1
            print(f"{exp(-cost):7.2%}  ...{text.rstrip()}")
            continue
        for logprob, token, id, child in (children := expand(params, state)):
            heappush(frontier, (cost - logprob, id, text + token, child))
        left_out = max(left_out, exp(children[-1][0] - cost))  # a child not made is at most as likely
    print(f"No other line has more than {max(left_out, exp(-cost)):.2%}.")
    alone = sum(folo.stats(node).blocks_used for *_, node in frontier)
    held = state.heap.num_blocks - state.heap.num_free
    print(f"{len(frontier)} nodes hold {held} blocks; if none were shared, it would be {alone}.")
