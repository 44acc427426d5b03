"""A conversation: `extend` makes all that was said the prompt of the next answer.

    python examples/conversation.py [--model MODEL]

A turn computes only what is new in it. K and V of the turns before come from the prefix cache, which keeps
whole blocks of 16 tokens; `num_cached_tokens` of an output says how many tokens came from there. At the end
the last prompt is run once more, in a state in which nothing is cached: it gets the same answer.
"""

import argparse

import folo

QUESTIONS = ["What is gravity?", "Thank you!", "Who discovered it?"]
ANSWER = "<answer>"  # stands for an answer, which the state has as tokens

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=None)
args = parser.parse_args()

params, tokenizer = folo.load(args.model), folo.load_tokenizer(args.model)
sampling = folo.SamplingParams(temperature=0, max_tokens=32)


def run(state: folo.EngineState) -> tuple[folo.EngineState, folo.RequestOutput]:
    """Step to the end; the state, and the output of its one request."""
    while (batch := folo.schedule(state)) is not None:
        state, _ = folo.step(params, state, batch)
    return state, folo.outputs(state)["chat"]


empty = folo.init(params, tokenizer=tokenizer)
state, output, messages = empty, None, []
for question in QUESTIONS:
    messages.append({"role": "user", "content": question})
    rendered = str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    new = rendered.rpartition(ANSWER)[2]  # what follows the last answer; everything if there is none yet
    if output is not None and output.outputs[0].finish_reason == "stop":
        new = new.removeprefix(str(tokenizer.eos_token))  # the answer ended itself with this token
    token_ids = tokenizer(new, add_special_tokens=False)["input_ids"]
    if output is None:
        state = folo.submit(state, folo.Request(token_ids, sampling, id="chat"))
    else:
        state = folo.extend(state, "chat", token_ids)
    state, output = run(state)
    messages.append({"role": "assistant", "content": ANSWER})
    print(f"user:      {question}")
    print(f"assistant: {output.outputs[0].text}")
    print(f"({len(output.prompt_token_ids)} prompt tokens, {output.num_cached_tokens} of them cached)\n")

assert output is not None
_, fresh = run(folo.submit(empty, folo.Request(output.prompt_token_ids, sampling, id="chat")))
assert fresh.outputs == output.outputs
print(f"The last prompt, as the model sees it:\n{tokenizer.decode(output.prompt_token_ids)}")
print(f"Its answer, with {fresh.num_cached_tokens} tokens cached: {fresh.outputs[0].text}")
