"""Offline inference in one call: generate, stream, chat."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any, cast

from folo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig, require_kind
from folo.engine import LLMEngine
from folo.errors import ConfigError, RequestError
from folo.prompt import Prompt, is_prompt
from folo.request import RequestOutput
from folo.sampling import SamplingParams

Message = Mapping[str, Any]


class LLM(LLMEngine):
    """Offline inference, with vLLM's names.

    Args:
        model: a Hugging Face directory, a hub id, a .gguf file, or None for the default model.
        engine_config: the whole configuration, instead of model and options.
        use_tqdm: show progress while loading.
        **options: any field of ModelConfig, CacheConfig and SchedulerConfig: dtype, device, seed,
            block_size, num_blocks, kv_cache_gib, max_num_seqs, max_num_batched_tokens, max_model_len,
            enable_prefix_caching, ...

    Raises:
        ConfigError: an unknown option or a value out of range. LoadError: see `folo.load`.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        engine_config: EngineConfig | None = None,
        use_tqdm: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(_engine_config(model, engine_config, options), use_tqdm=use_tqdm)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
    ) -> list[RequestOutput]:
        """As `LLMEngine.generate`, but the outputs are always a list, and progress is shown."""
        batch = [prompts] if is_prompt(prompts) else prompts
        return self._generate(cast("Sequence[Prompt]", batch), sampling_params, use_tqdm)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = True,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several, through the model's chat template.

        messages: [{"role": "user", "content": "..."}, ...], or a list of such lists.

        Raises:
            RequestError: no list of messages; no tokenizer or no chat template; and see `generate`.
        """
        if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
            raise RequestError(f'messages must be [{{"role": ..., "content": ...}}, ...], got {messages!r}')
        single = bool(messages) and isinstance(messages[0], Mapping)
        conversations = cast("Sequence[Sequence[Message]]", [messages] if single else messages)
        prompts = [self.apply_chat_template(c, chat_template, add_generation_prompt) for c in conversations]
        return self._generate(prompts, sampling_params, use_tqdm)

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
    ) -> list[int]:
        """The token ids of a conversation. Raises RequestError without a tokenizer or a template."""
        if self.tokenizer is None:
            raise RequestError("a conversation needs a tokenizer (skip_tokenizer_init=False)")
        if chat_template is None and self.tokenizer.chat_template is None:
            raise RequestError("this model has no chat template; give chat_template=..., or use generate()")
        try:
            encoded = self.tokenizer.apply_chat_template(
                list(messages),
                chat_template=chat_template,
                add_generation_prompt=add_generation_prompt,
                tokenize=True,
                return_dict=True,
                tokenizer_kwargs={"verbose": False},
            )
        except Exception as error:  # a template is a program of the model's: it may raise anything
            raise RequestError(f"the chat template does not take this conversation: {error}") from error
        return encoded["input_ids"]


def _engine_config(
    model: str | None, config: EngineConfig | None, options: Mapping[str, Any]
) -> EngineConfig:
    if config is not None:
        require_kind("engine_config", config, EngineConfig)
        if model is not None or options:
            given = [*(["model"] if model is not None else []), *options]
            raise ConfigError(f"engine_config is the whole configuration: drop {', '.join(given)}")
        return config
    parts: dict[str, Any] = {}
    left = {"model": model, **options}
    for name, kind in (("model", ModelConfig), ("cache", CacheConfig), ("scheduler", SchedulerConfig)):
        names = {field.name for field in fields(kind)}
        parts[name] = kind(**{key: left.pop(key) for key in list(left) if key in names})
    if left:
        known = sorted(f.name for k in (ModelConfig, CacheConfig, SchedulerConfig) for f in fields(k))
        raise ConfigError(f"unknown option {', '.join(left)}; the options are {', '.join(known)}")
    return EngineConfig(**parts)
