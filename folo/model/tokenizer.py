"""Tokenizers: transformers' for a directory or hub id, and one rebuilt from the metadata of a GGUF file."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers, processors
from tokenizers.models import BPE

from folo.errors import LoadError
from folo.model.gguf import read_metadata
from folo.model.locate import locate

if TYPE_CHECKING:  # imported where a tokenizer is made: `import folo` is half a second faster
    from transformers import PreTrainedTokenizerBase

_CONTROL, _USER_DEFINED = 3, 4  # llama.cpp's llama_token_type
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class _Pretokenizer:
    """How text is cut before merging: `tokenizer.ggml.pre`, as `llama-vocab.cpp` of llama.cpp defines it.

    `pattern` None is GPT-2's. `whole_words`: a word that is in the vocabulary is not merged from its parts.
    """

    pattern: str | None = None
    individual_digits: bool = False
    whole_words: bool = False
    nfc: bool = False
    add_bos: bool = False


_LLAMA3 = _Pretokenizer(
    pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    whole_words=True,
    add_bos=True,
)
_QWEN2 = _Pretokenizer(
    pattern=r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
    nfc=True,  # not in GGUF, but in the tokenizer that the models were trained with
)
_PRETOKENIZERS = {
    "smollm": _Pretokenizer(individual_digits=True),
    "gpt-2": _Pretokenizer(),
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
}


def load_tokenizer(model: str | os.PathLike[str] | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of `model`, which is whatever `load` takes. No code from the model's files is run.

    Raises LoadError if the model cannot be found, or has no tokenizer that can be read.
    """
    path = locate(model, weights=False)
    if path.suffix != ".gguf" and not any((path / name).exists() for name in _FILES):
        raise LoadError(f"{path} has no tokenizer: none of {', '.join(_FILES)}.")
    try:
        return _from_gguf(path) if path.suffix == ".gguf" else _from_directory(path)
    except LoadError:
        raise
    except Exception as error:  # the many readers below share no class of errors
        raise LoadError(f"{path}: the tokenizer cannot be read: {error!r}") from error


def _from_directory(path: Path) -> PreTrainedTokenizerBase:
    """`tokenizer.json` is taken as it stands: for some of the classes that a configuration names,
    AutoTokenizer rebuilds the pre-tokenizer, and SmolLM2's would no longer split digits."""
    if not (path / "tokenizer.json").exists():
        return _by_its_class(path)
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def _by_its_class(path: Path, **options: Any) -> PreTrainedTokenizerBase:
    from transformers import AutoTokenizer  # here, since it may import every model, and torch's compiler

    return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False, **options)


def _from_gguf(path: Path) -> PreTrainedTokenizerBase:
    from transformers import PreTrainedTokenizerFast

    metadata = read_metadata(path)
    kind = metadata.get("tokenizer.ggml.model")
    if kind not in ("gpt2", "llama"):
        raise LoadError(f"{path} has no tokenizer of the kinds 'gpt2' and 'llama', but {kind!r}.")
    tokens = metadata["tokenizer.ggml.tokens"]
    ids = {
        f"{role}_token": metadata.get(f"tokenizer.ggml.{key}_token_id")
        for role, key in {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}.items()
    }
    special = {role: tokens[index] for role, index in ids.items() if index is not None}
    if kind == "llama":  # sentencepiece, rebuilt by transformers, whose versions do not all find every token
        tokenizer: Any = _by_its_class(path.parent, gguf_file=path.name)
        for role, token in special.items():
            setattr(tokenizer, role, token)
        _space_as_sentencepiece(tokenizer.backend_tokenizer, metadata)
        tokenizer.backend_tokenizer.post_processor = _ends(metadata, add_bos=True)
        return tokenizer
    return PreTrainedTokenizerFast(
        tokenizer_object=_byte_level_bpe(path, metadata),
        chat_template=metadata.get("tokenizer.chat_template"),
        clean_up_tokenization_spaces=False,
        model_max_length=metadata.get(f"{metadata.get('general.architecture')}.context_length"),
        **special,
    )


def _space_as_sentencepiece(tokenizer: Tokenizer, metadata: dict[str, Any]) -> None:
    """A space before every text, and behind every special token, unless the file says otherwise.

    transformers adds none where the text begins with one already, and ignores the file's flag.
    """
    spaces: list[Any] = [normalizers.Replace(" ", "▁")]
    pieces: list[Any] = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        spaces.insert(0, normalizers.Prepend("▁"))
        pieces.append(decoders.Strip(" ", 1, 0))
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(spaces)
    tokenizer.decoder = decoders.Sequence(pieces)


def _byte_level_bpe(path: Path, metadata: dict[str, Any]) -> Tokenizer:
    name = metadata.get("tokenizer.ggml.pre")
    if name not in _PRETOKENIZERS:
        known = ", ".join(_PRETOKENIZERS)
        raise LoadError(f"{path}: the pre-tokenizer {name!r} is not supported; supported: {known}.")
    pre = _PRETOKENIZERS[name]
    tokens = metadata["tokenizer.ggml.tokens"]
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    vocab = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(BPE(vocab, merges, ignore_merges=pre.whole_words))
    tokenizer.pre_tokenizer = _pre_tokenizer(pre)
    tokenizer.decoder = decoders.ByteLevel()
    if pre.nfc:
        tokenizer.normalizer = normalizers.NFC()
    kinds = dict(zip(tokens, metadata.get("tokenizer.ggml.token_type", ()), strict=False))
    added = [token for token, kind in kinds.items() if kind in (_CONTROL, _USER_DEFINED)]
    tokenizer.add_tokens(
        [AddedToken(token, special=kinds[token] == _CONTROL, normalized=False) for token in added]
    )
    tokenizer.post_processor = _ends(metadata, pre.add_bos)
    return tokenizer


def _ends(metadata: dict[str, Any], add_bos: bool) -> processors.TemplateProcessing:
    """The tokens to add before and behind a text. add_bos: whether to, if the file does not say."""

    def added(role: str, default: bool) -> dict[str, int]:
        index = metadata.get(f"tokenizer.ggml.{role}_token_id")
        wanted = metadata.get(f"tokenizer.ggml.add_{role}_token", default)
        return {metadata["tokenizer.ggml.tokens"][index]: index} if wanted and index is not None else {}

    bos, eos = added("bos", add_bos), added("eos", False)
    single = [*bos, "$A", *eos]
    pair = [*single, *(f"{part}:1" for part in (*bos, "$B", *eos))]
    return processors.TemplateProcessing(single=single, pair=pair, special_tokens=[*(bos | eos).items()])


def _pre_tokenizer(pre: _Pretokenizer) -> pre_tokenizers.PreTokenizer:
    cut: list[Any] = []
    if pre.individual_digits:
        cut.append(pre_tokenizers.Digits(individual_digits=True))
    if pre.pattern is not None:
        cut.append(pre_tokenizers.Split(Regex(pre.pattern), behavior="isolated"))
    cut.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=pre.pattern is None))
    return pre_tokenizers.Sequence(cut)
