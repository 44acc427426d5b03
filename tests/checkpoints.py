"""Small random checkpoints, written by transformers itself, for tests to load and compare with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from folo.model.export import named_tensors
from folo.model.params import Params
from folo.ops.packed import Packed

_CLASSES: dict[str, tuple[type, type]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
ARCHITECTURES = tuple(_CLASSES)
VOCAB_SIZE = 300
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def tiny_checkpoint(
    path: Path,
    architecture: str = "llama",
    *,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    tokenizer: bool = False,
    generation: dict[str, Any] | None = None,
    max_shard_size: str = "1GB",
    **overrides: Any,
) -> PreTrainedModel:
    """Write a random checkpoint into the directory `path`, and return its model in float32, in eval mode.

    Two layers, hidden size 64, 4 query and 2 KV heads of 16, 128 inner, `VOCAB_SIZE` tokens, 256 positions,
    untied; biases and norms are random too, so that a loader that drops one is found out.

    Args:
        architecture: "llama", "mistral", "qwen2" or "qwen3".
        seed: of the weights; the global random state is left as it was.
        dtype: of the stored weights. What the model holds has been rounded to it.
        tokenizer: write `tiny_tokenizer()` as well.
        generation: write this as generation_config.json, and nothing else into it.
        max_shard_size: a small one ("100KB") makes shards with an index.
        **overrides: keys of the transformers configuration class, such as `tie_word_embeddings=True`.
    """
    model = random_model(architecture, seed, **overrides)
    model.to(dtype=dtype)  # pyright: ignore[reportCallIssue]
    model.save_pretrained(path, max_shard_size=max_shard_size)
    if generation is not None:
        (path / "generation_config.json").write_text(json.dumps(generation))
    if tokenizer:
        tiny_tokenizer().save_pretrained(path)
    return model.float().eval()


def random_model(architecture: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The model of `tiny_checkpoint`, float32, not written anywhere."""
    config_class, model_class = _CLASSES[architecture]
    settings: dict[str, Any] = {
        "vocab_size": VOCAB_SIZE,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    }
    if architecture == "mistral":
        settings["sliding_window"] = None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config_class(**settings | overrides))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                center = 1.0 if name.endswith("norm.weight") else 0.0
                parameter.normal_(center, 0.1)
    return model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE of at most `VOCAB_SIZE` tokens: three special ones, the 256 bytes, a few merges."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["the cat and the hat and the other thing in the end"] * 4, trainer)
    template = (
        "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=template,
        clean_up_tokenization_spaces=False,
    )


def plain(weight: Tensor | Packed) -> Tensor:
    return weight.plain() if isinstance(weight, Packed) else weight


def state_dict(params: Params) -> dict[str, Tensor]:
    """The weights under transformers' names, with fused projections taken apart."""
    return dict(named_tensors(params))
