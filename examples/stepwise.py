"""The functional API: one request stepped by hand, then branched by using one state twice.

    python examples/stepwise.py [--model MODEL]

The engine is a value. `step` returns a new state and leaves the old one as it was, so you can continue from a
state that you hold as often as you like, and get the same result each time.
"""

import argparse

import folo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=None)
args = parser.parse_args()

params, tokenizer = folo.load(args.model), folo.load_tokenizer(args.model)
prompt = tokenizer("My grandmother's house stood at the edge of the forest, and every")["input_ids"]


def run(state: folo.EngineState) -> dict[str, folo.RequestOutput]:
    """Step to the end; the outputs by request id."""
    while (batch := folo.schedule(state)) is not None:
        state, _ = folo.step(params, state, batch)
    return folo.outputs(state)


# One request, eight steps by hand: the first computes the prompt, and each samples one token.
state = folo.init(params, tokenizer=tokenizer)
state = folo.submit(state, folo.Request(prompt, folo.SamplingParams(seed=1, max_tokens=24), id="a"))
for _ in range(8):
    batch = folo.schedule(state)
    assert batch is not None
    state, tokens = folo.step(params, state, batch)
    print(f"{tokens.ids.item():6} {tokenizer.decode(tokens.ids)!r}")

# Branch one: go on from `state` as it is.
one = run(state)

# Branch two: go on from the same `state`, with a second request beside the first. Its prompt is the tokens
# so far (their K and V are there already, in the prefix cache), and it goes on with another seed.
held = folo.outputs(state)["a"].outputs[0]
so_far = [*prompt, *held.token_ids]
other = folo.Request(so_far, folo.SamplingParams(seed=2, max_tokens=16), id="b")
two = run(folo.submit(state, other))

print(f"\nSo far:     {tokenizer.decode(so_far)}")
print(f"Branch one: ...{one['a'].outputs[0].text[len(held.text) :]}")
print(f"Branch two: ...{two['b'].outputs[0].text}")
print(f"            ({two['b'].num_cached_tokens} of its {len(so_far)} prompt tokens were in the cache)")

# The held state still stands at the eighth token, and "a" goes on from it in the same way every time.
again = run(state)
assert folo.outputs(state)["a"].outputs[0] == held
assert one["a"].outputs[0] == two["a"].outputs[0] == again["a"].outputs[0]
print('Request "a" came to the same tokens alone, beside "b", and once more from the held state.')
