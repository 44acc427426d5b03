"""Many prompts of mixed lengths in one call, each with parameters of its own.

    python examples/batch_inference.py [--model MODEL]

What a request gets does not depend on what else is in the batch: each of them, run again alone, comes to
the very same tokens. That needs a seed in its parameters, or greedy sampling: a request without a seed
gets one that is derived from its id.
"""

import argparse

import folo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=None)
args = parser.parse_args()

llm = folo.LLM(args.model)

sentence = "A train leaves the station at noon and stops in every village on its way to the sea. "
requests = [
    ("Once", folo.SamplingParams(temperature=1.0, seed=1, max_tokens=16)),
    ("The best way to learn a language is", folo.SamplingParams(temperature=0.7, seed=2, max_tokens=8)),
    ("In the year 2050,", folo.SamplingParams(top_p=0.9, top_k=40, seed=3, max_tokens=12)),
    ("人工智能是", folo.SamplingParams(temperature=0, max_tokens=12)),
    (sentence * 8 + "When it arrives,", folo.SamplingParams(temperature=0.8, seed=4, max_tokens=12)),
    ("1, 2, 3, 4,", folo.SamplingParams(temperature=0, max_tokens=16, stop="9")),
]
prompts = [prompt for prompt, _ in requests]
params = [param for _, param in requests]

together = llm.generate(prompts, params)

for prompt, output in zip(prompts, together, strict=True):
    completion = output.outputs[0]
    print(f"\n{len(output.prompt_token_ids)} prompt tokens: {prompt[-40:]!r}")
    print(f"    {completion.text!r}")
    print(f"    {len(completion.token_ids)} tokens, finish_reason {completion.finish_reason!r}")

print("\nEach request alone:")
for (prompt, param), output in zip(requests, together, strict=True):
    (alone,) = llm.generate(prompt, param, use_tqdm=False)
    same = alone.outputs[0].token_ids == output.outputs[0].token_ids
    print(f"    {prompt[-40:]!r}: {'the same tokens' if same else 'OTHER TOKENS'}")
    assert same
