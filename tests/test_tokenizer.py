"""Tokenizers give the ids that the model was trained with, from a directory and from a GGUF file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import pytest
from checkpoints import tiny_checkpoint, tiny_tokenizer
from gguf_files import tiny_gguf
from tokenizers import pre_tokenizers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from folo.errors import LoadError
from folo.model.tokenizer import load_tokenizer

TEXTS = (
    "Hello world, it's a fine day.",
    "你好世界。",
    "🙂 👩‍👩‍👧 done",
    "def f(x):\n    return x\t+ 1\n\n\nprint( f(12345) )  # 3.14\r\n",
    "  leading and trailing  ",
    "naïve café Straße Ελλάδα",
    "",
)


@pytest.fixture(scope="module")
def smollm2() -> PreTrainedTokenizerBase:
    return load_tokenizer()


def pieces(tokenizer: PreTrainedTokenizerBase, text: str) -> list[str]:
    assert isinstance(tokenizer, PreTrainedTokenizerFast)
    pre_tokenizer = tokenizer.backend_tokenizer.pre_tokenizer
    assert pre_tokenizer is not None
    return [piece for piece, _ in pre_tokenizer.pre_tokenize_str(text)]


@pytest.mark.parametrize("text", TEXTS)
def test_text_round_trips(smollm2: PreTrainedTokenizerBase, text: str) -> None:
    assert smollm2.decode(smollm2.encode(text)) == text


def test_special_tokens_are_single_ids(smollm2: PreTrainedTokenizerBase) -> None:
    assert smollm2.encode("<|im_start|>user\nhi<|im_end|>") == [1, 4093, 198, 6004, 2]
    assert smollm2.encode("<|endoftext|><file_sep>") == [0, 5]
    assert smollm2.decode([1, 6004, 2, 5], skip_special_tokens=True) == "hi"
    assert (smollm2.bos_token_id, smollm2.eos_token_id, smollm2.pad_token_id) == (1, 2, 2)
    assert (len(smollm2), smollm2.model_max_length) == (49152, 8192)


def test_chat_template_comes_with_the_file(smollm2: PreTrainedTokenizerBase) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    text = smollm2.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_smollm_splits_digits_before_words(smollm2: PreTrainedTokenizerBase) -> None:
    """llama.cpp cuts at every digit first: the two spaces are then one piece, as they end their stretch."""
    assert pieces(smollm2, "a  12 b3") == ["a", "ĠĠ", "1", "2", "Ġb", "3"]
    assert smollm2.convert_ids_to_tokens(smollm2.encode("a  12 b3")) == ["a", "ĠĠ", "1", "2", "Ġb", "3"]


@pytest.mark.parametrize(
    ("pre", "expected"),
    [
        ("gpt-2", ["It", "'s", "Ġ12345", "ĠĠ", "Ġ(", "ok", ")", "Ċ", "Ċ", "x"]),
        ("llama-bpe", ["It", "'s", "Ġ", "123", "45", "ĠĠ", "Ġ(", "ok", ")ĊĊ", "x"]),
        ("qwen2", ["It", "'s", "Ġ", "1", "2", "3", "4", "5", "ĠĠ", "Ġ(", "ok", ")ĊĊ", "x"]),
    ],
)
def test_pre_tokenizers_cut_as_llama_cpp_does(tmp_path: Path, pre: str, expected: list[str]) -> None:
    tiny_gguf(tmp_path / "model.gguf", tokenizer=True, metadata={"tokenizer.ggml.pre": pre})
    tokenizer = load_tokenizer(tmp_path / "model.gguf")
    assert pieces(tokenizer, "It's 12345   (ok)\n\nx") == expected


def test_loading_leaves_the_weights_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a tokenizer has no use for a weight")

    for name in ("dequantize", "GGUFReader"):  # which takes seconds to list the tensors and the vocabulary
        monkeypatch.setattr(gguf, name, refuse)
    assert load_tokenizer().encode(" the") == [260]


@pytest.mark.parametrize("text", TEXTS)
def test_gguf_gives_the_ids_of_the_tokenizer_it_was_made_from(tmp_path: Path, text: str) -> None:
    tiny_gguf(tmp_path / "model.gguf", tokenizer=True)
    tokenizer, original = load_tokenizer(tmp_path / "model.gguf"), tiny_tokenizer()
    text = f"<|im_start|>{text}the other hat"
    assert tokenizer.encode(text) == original.encode(text)
    assert tokenizer.chat_template == original.chat_template


@pytest.mark.parametrize(
    ("pre", "flag", "added"),
    [("llama-bpe", None, True), ("llama-bpe", False, False), ("gpt-2", None, False), ("gpt-2", True, True)],
)
def test_bos_is_added_where_the_file_or_its_kind_says_so(
    tmp_path: Path, pre: str, flag: bool | None, added: bool
) -> None:
    metadata = {"tokenizer.ggml.pre": pre, "tokenizer.ggml.add_bos_token": flag}
    tiny_gguf(tmp_path / "model.gguf", tokenizer=True, metadata=metadata)
    tokenizer = load_tokenizer(tmp_path / "model.gguf")
    assert (tokenizer.encode("the")[0] == 1) == added
    assert tokenizer.encode("the", add_special_tokens=False)[0] != 1


def sentencepiece_metadata(words: list[str], **options: Any) -> dict[str, Any]:
    """A vocabulary in which an earlier word has a better score."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *words]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [-float(index) for index in range(len(tokens))],
        "tokenizer.ggml.token_type": [2, 3, 3] + [6] * 256 + [1] * len(words),
        "tokenizer.ggml.unknown_token_id": 0,
        **{f"tokenizer.ggml.{key}": value for key, value in options.items()},
    }


@pytest.mark.parametrize(
    ("ends", "expected"),
    [
        ({}, ["<s>", "▁hi", "▁ho"]),
        ({"add_bos_token": True, "add_eos_token": True}, ["<s>", "▁hi", "▁ho", "</s>"]),
        ({"add_bos_token": False}, ["▁hi", "▁ho"]),
    ],
)
def test_sentencepiece_in_gguf(ends: dict[str, bool], expected: list[str], tmp_path: Path) -> None:
    words = ["▁", "h", "i", "o", "hi", "▁hi", "ho", "▁ho"]
    tiny_gguf(tmp_path / "model.gguf", metadata=sentencepiece_metadata(words, **ends))
    tokenizer = load_tokenizer(tmp_path / "model.gguf")
    assert tokenizer.convert_ids_to_tokens(tokenizer.encode("hi ho")) == expected
    assert tokenizer.decode(tokenizer.encode("hi ho é"), skip_special_tokens=True) == "hi ho é"


WORDS = [*"▁thecandé", "▁t", "he", "▁the", "ca", "▁c", "▁▁", "▁a", "▁▁▁▁", "nd", "at", "cat", "▁and"]
SPACED = (" the", "   the cat", "the  cat     and", "  ", "the cat ", "éñ 世🙂", "\n the\t ca", "▁the", "")


def merged_by_score(text: str, words: list[str]) -> list[str]:
    """sentencepiece's BPE: the neighbours whose union has the best score are joined, until there are none."""
    pieces = list(text.replace(" ", "▁"))
    while True:
        unions = {at: "".join(pieces[at : at + 2]) for at in range(len(pieces) - 1)}
        known = [(words.index(union), at) for at, union in unions.items() if union in words]
        if not known:
            break
        at = min(known)[1]
        pieces[at : at + 2] = [unions[at]]
    split = ([p] if p in words else [f"<0x{byte:02X}>" for byte in p.encode()] for p in pieces)
    return [piece for parts in split for piece in parts]


@pytest.mark.parametrize("prefix", [None, True, False])
def test_sentencepiece_keeps_every_space(prefix: bool | None, tmp_path: Path) -> None:
    metadata = sentencepiece_metadata(WORDS, add_space_prefix=prefix)
    tiny_gguf(tmp_path / "model.gguf", metadata=metadata)
    tokenizer = load_tokenizer(tmp_path / "model.gguf")

    def expected(text: str) -> list[str]:
        return merged_by_score(text if prefix is False or not text else f" {text}", WORDS)

    for text in (*SPACED, *TEXTS):
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert tokenizer.convert_ids_to_tokens(ids) == expected(text)
        assert tokenizer.decode(ids) == text.replace("▁", " ")
        around = tokenizer.convert_ids_to_tokens(tokenizer.encode(f"the</s>{text}<s>"))
        assert around == ["<s>", *expected("the"), "</s>", *expected(text), "<s>"]


def test_directory_has_its_own_tokenizer(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, tokenizer=True)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("<|im_start|>the cat") == tiny_tokenizer().encode("<|im_start|>the cat")
    assert tokenizer.chat_template == tiny_tokenizer().chat_template


def test_tokenizer_json_is_taken_as_it_stands(tmp_path: Path) -> None:
    """SmolLM2 names GPT2Tokenizer, for which AutoTokenizer would drop the digits of its tokenizer.json."""
    tiny_checkpoint(tmp_path)
    tokenizer = tiny_tokenizer()
    digits = pre_tokenizers.Digits(individual_digits=True)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps(settings | {"tokenizer_class": "GPT2Tokenizer"})
    )
    assert pieces(load_tokenizer(tmp_path), "a  12") == ["a", "ĠĠ", "1", "2"]


def test_remote_code_is_not_run(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, tokenizer=True)
    marker = tmp_path / "ran"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: ...\n")
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings |= {"auto_map": {"AutoTokenizer": [None, "evil.Evil"]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    assert load_tokenizer(tmp_path).encode("the")
    (tmp_path / "tokenizer.json").rename(tmp_path / "vocab.json")
    with pytest.raises(LoadError, match="the tokenizer cannot be read"):
        load_tokenizer(tmp_path)
    assert not marker.exists()


def test_directory_without_a_tokenizer(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path)
    with pytest.raises(LoadError, match=r"has no tokenizer: none of tokenizer\.json"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"tokenizer.ggml.model": None}, "has no tokenizer of the kinds 'gpt2' and 'llama', but None"),
        ({"tokenizer.ggml.model": "bert"}, "but 'bert'"),
        ({"tokenizer.ggml.pre": "runes"}, "the pre-tokenizer 'runes' is not supported; supported: smollm"),
        ({"tokenizer.ggml.tokens": None}, "the tokenizer cannot be read.*tokenizer.ggml.tokens"),
        ({"tokenizer.ggml.merges": ["no such"]}, "the tokenizer cannot be read"),
    ],
    ids=str,
)
def test_gguf_without_a_tokenizer_that_can_be_read(
    tmp_path: Path, metadata: dict[str, Any], message: str
) -> None:
    tiny_gguf(tmp_path / "model.gguf", tokenizer=True, metadata=metadata)
    with pytest.raises(LoadError, match=message):
        load_tokenizer(tmp_path / "model.gguf")
