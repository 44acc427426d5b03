"""Few-shot prompts: examples show what is wanted, and a stop string ends the answer with its line.

    python examples/few_shot.py [--model MODEL]

All prompts of a task begin with the same examples. Their K and V are computed once and come from the
prefix cache afterwards; `num_cached_tokens` of an output says how many tokens came from there.
"""

import argparse

import folo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=None)
args = parser.parse_args()

llm = folo.LLM(args.model)

sentiment = """\
Review: The food was cold and the waiter was rude.
Sentiment: negative
Review: A wonderful evening, we will come back!
Sentiment: positive
Review: The room smelled and the bed was broken.
Sentiment: negative
Review: Great value, friendly staff, lovely view.
Sentiment: positive
Review: {}
Sentiment:"""

translation = """\
English: Good morning.
French: Bonjour.
English: Thank you very much.
French: Merci beaucoup.
English: Where is the station?
French: Où est la gare ?
English: {}
French:"""

tasks = [
    (sentiment, ["I loved every minute of it.", "The worst film of the year.", "What a lovely surprise!"]),
    (translation, ["Good evening.", "Where is the hotel?"]),
]
params = folo.SamplingParams(temperature=0, max_tokens=16, stop="\n")

for template, inputs in tasks:
    outputs = llm.generate([template.format(text) for text in inputs], params)
    for text, output in zip(inputs, outputs, strict=True):
        completion = output.outputs[0]
        print(f"{text:30} -> {completion.text.strip():20} (stop_reason {completion.stop_reason!r})")
    cached = [output.num_cached_tokens for output in outputs]
    total = [len(output.prompt_token_ids) for output in outputs]
    print(f"prompt tokens {total}, of which from the prefix cache {cached}\n")
