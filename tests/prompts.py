"""Sixteen prompts for the default model: English, Chinese, code, emoji; 1 to 700 tokens."""

from __future__ import annotations

_STORY = (
    "The lighthouse keeper counted the ships that passed each evening and wrote their names in a ledger. "
    "On calm days he could read the painted letters with his glass; in fog he listened for the bells. "
)
_CODE = """
def merge(left, right):
    result = []
    while left and right:
        result.append(left.pop(0) if left[0] <= right[0] else right.pop(0))
    return result + left + right
"""
_CHINESE = "人工智能是计算机科学的一个分支，它企图了解智能的实质。"

TEXTS = (
    "The",
    "Once upon a time",
    "The capital of France is Paris, and the capital of Germany is",
    "def fibonacci(n):\n    ",
    "SELECT name, COUNT(*) FROM orders WHERE",
    '{"user": {"id": 17, "tags": ["a", "b"], "email":',
    "你好，请问今天天气怎么样？",
    _CHINESE * 6,
    "🎉🎂 Happy birthday 🥳! Here is a poem with emoji: 🌹",
    "Q: What is 17 times 23?\nA: Let us work step by step.",
    "Translate to Spanish: Good morning, how are you?\nTranslation:",
    "<|im_start|>user\nGive me three tips for sleeping well.<|im_end|>\n<|im_start|>assistant\n",
    _CODE * 2 + "\n# The same in C++, with iterators:\n",
    "Meine Großmutter erzählte mir früher oft, dass",
    _STORY * 7 + "One night,",
    _STORY * 18 + "In the end,",
)


def token_ids(tokenizer: object) -> list[list[int]]:
    """The prompts as token ids; the lengths are what the module promises."""
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]  # pyright: ignore[reportCallIssue]
    lengths = sorted(len(i) for i in ids)
    assert lengths[0] == 1
    assert 690 <= lengths[-1] <= 710
    return ids
