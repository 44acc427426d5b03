"""The shortest way to text: `LLM.generate` continues a few prompts, `LLM.chat` answers a question.

    python examples/basic_inference.py [--model MODEL]

MODEL is a Hugging Face directory or id, or a .gguf file; SmolLM2-135M-Instruct if it is not given.
"""

import argparse

import folo

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--model", default=None)
args = parser.parse_args()

llm = folo.LLM(args.model)

prompts = [
    "The capital of France is",
    "def fibonacci(n):",
    "The three primary colours are",
]
params = folo.SamplingParams(temperature=0, max_tokens=24)

for output in llm.generate(prompts, params):
    completion = output.outputs[0]
    print(f"\nprompt:        {output.prompt!r}")
    print(f"text:          {completion.text!r}")
    print(f"finish_reason: {completion.finish_reason}")

question = [{"role": "user", "content": "What is gravity? Answer in one sentence."}]
(output,) = llm.chat(question, params)
print(f"\nquestion:      {question[0]['content']!r}")
print(f"text:          {output.outputs[0].text!r}")
print(f"finish_reason: {output.outputs[0].finish_reason}")
