"""A seeded experiment: is the majority of several samples better at addition than greedy decoding?

    python examples/seeded_experiment.py [--model MODEL] [--samples N]

A sample is a function of its prompt, its parameters and its seed. So an experiment can be shuffled, cut up
and spread as is convenient: the digest over all tokens and the bits of their log-probabilities stays what it
was. Here it is run twice, the second time in another order and by an engine that is set up otherwise.
"""

import argparse
import random
from collections import Counter
from dataclasses import replace
from hashlib import sha256
from itertools import product
from struct import pack

import folo

SHOTS = "2 + 1 = 3\n4 + 4 = 8\n1 + 6 = 7\n5 + 4 = 9\n"
QUESTIONS = [(a, b) for a, b in product(range(2, 10), repeat=2) if a + b < 14]


def experiment(llm: folo.LLM, order: list[int], samples: int) -> tuple[list[float], str]:
    """The shares of right answers, [greedy, majority of samples], and a digest of all tokens and logprobs."""
    arms = [folo.SamplingParams(temperature=0), folo.SamplingParams(temperature=0.8, n=samples)]
    prompts = [f"{SHOTS}{QUESTIONS[i][0]} + {QUESTIONS[i][1]} =" for i in order]
    shares, digest = [], sha256()
    for arm in arms:
        sampling = [replace(arm, seed=i, max_tokens=4, stop="\n", logprobs=0) for i in order]
        outputs = dict(zip(order, llm.generate(prompts, sampling, use_tqdm=False), strict=True))
        right = 0
        for i, (a, b) in enumerate(QUESTIONS):
            answers = Counter(completion.text.strip() for completion in outputs[i].outputs)
            right += answers.most_common(1)[0][0] == str(a + b)
            for completion in outputs[i].outputs:
                for token, entries in zip(completion.token_ids, completion.logprobs or [], strict=True):
                    digest.update(pack("<qf", token, entries[token].logprob))
        shares.append(right / len(QUESTIONS))
    return shares, digest.hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Greedy answers beside majorities of seeded samples")
    parser.add_argument("--model", default=None)
    parser.add_argument("--samples", type=int, default=8)
    args = parser.parse_args()
    order = list(range(len(QUESTIONS)))
    runs = {
        "in order": (order, folo.LLM(args.model, use_tqdm=False)),
        "shuffled, 64 tokens a step, blocks of 8, no prefix cache": (
            random.Random(0).sample(order, len(order)),
            folo.LLM(
                args.model,
                use_tqdm=False,
                max_num_batched_tokens=64,
                block_size=8,
                enable_prefix_caching=False,
            ),
        ),
    }
    digests = set()
    for name, (questions, llm) in runs.items():
        (greedy, majority), digest = experiment(llm, questions, args.samples)
        digests.add(digest)
        print(f"{name}:\n    greedy {greedy:.1%} right, majority of {args.samples} samples {majority:.1%}")
        print(f"    digest {digest[:16]}")
    assert len(digests) == 1
