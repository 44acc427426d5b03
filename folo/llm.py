"""The shell around the pure core: the two classes that own a state, a tokenizer and the clocks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from numbers import Integral
from typing import Any, cast

import torch
from tqdm import tqdm

from folo import detokenize
from folo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from folo.detokenize import TextState
from folo.errors import ConfigError, RequestError
from folo.metrics import Clock
from folo.model.load import load
from folo.model.tokenizer import load_tokenizer
from folo.request import Request, RequestOutput
from folo.sampling import SamplingParams
from folo.state import sequence as state_sequence
from folo.state.engine import EngineState, init
from folo.state.lifecycle import abort, collect, submit, vacate
from folo.state.outputs import has_unfinished, output_of, text_of, token_text_of
from folo.state.schedule import schedule
from folo.step import step

# Text, token ids (a one-dimensional tensor too), or vLLM's {"prompt": ...} or
# {"prompt_token_ids": ...}.
Prompt = str | Sequence[int] | Mapping[str, Any]
Message = Mapping[str, Any]


class LLMEngine:
    """An engine to be stepped: requests go in between steps, outputs come out.

    The engine itself is `state`, a value; the rest is clocks, text and outputs not yet handed over.
    Metrics of an output (`output.metrics["ttft"]`): see `folo.metrics.Clock.metrics`.

    Args:
        config: a ModelConfig, or an EngineConfig for cache and scheduler as well.
        device: overrides the config's device.
        use_tqdm: show progress while loading.

    Raises:
        ConfigError, LoadError: see `folo.init`, `folo.load` and `folo.load_tokenizer`.
    """

    def __init__(
        self,
        config: ModelConfig | EngineConfig | None = None,
        device: str | torch.device | None = None,
        use_tqdm: bool = True,
    ) -> None:
        if not isinstance(config, EngineConfig):
            config = EngineConfig(model=ModelConfig() if config is None else config)
        model, where = config.model, config.model.device if device is None else device
        self.config = config
        self.params = load(model.model, model.dtype, where, use_tqdm=use_tqdm)
        self.tokenizer: Any = (
            None if model.skip_tokenizer_init else load_tokenizer(model.tokenizer or model.model)
        )
        self.state: EngineState = init(
            self.params, config.cache, config.scheduler, self.tokenizer, model.seed
        )
        self._next_id = 0
        self._clocks: dict[str, Clock] = {}
        # By request id and sample: whose text it is, how many tokens it is of, and the text.
        self._texts: dict[tuple[str, int], tuple[Request, int, TextState]] = {}
        self._pieces: dict[int, str | None] = {}  # the text of single tokens, for logprobs
        self._done: dict[str, RequestOutput] = {}  # finished, and not yet given to whoever asked
        self._streams: set[str] = set()  # requests whose outputs belong to an open stream

    def get_default_sampling_params(self) -> SamplingParams:
        """What the model's generation_config.json asks for, folo's defaults elsewhere."""
        return SamplingParams(**cast("dict[str, Any]", dict(self.params.config.sampling_defaults)))

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        priority: int = 0,
    ) -> None:
        """Submit a prompt, text or token ids. Raises RequestError (`folo.submit`), changing nothing."""
        self._submit(self._request(request_id, prompt, sampling_params, priority))

    def abort_request(self, request_id: str) -> None:
        """End a request with finish_reason "abort"; the next `step` hands its output out.

        Raises RequestError if there is no such request.
        """
        if request_id not in self._done:  # else it ended by itself, just before
            self.state = abort(self.state, request_id)
            self._collect()

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to compute or to hand out."""
        return has_unfinished(self.state) or not self._done.keys() <= self._streams

    def step(self) -> list[RequestOutput]:
        """Run one step: the outputs so far of requests that got tokens, and those that have ended."""
        moved = {id for id in self._advance() if id in self.state.requests} - self._streams
        unfinished: dict[str, list[state_sequence.Sequence]] = {id: [] for id in moved}
        for sequence in (*self.state.running, *self.state.waiting) if moved else ():
            if sequence.id in moved:
                unfinished[sequence.id].append(sequence)
        running = [self._output(id, sequences) for id, sequences in unfinished.items()]
        ended = [self._done[id] for id in self._done.keys() - self._streams]
        self._done = {id: self._done[id] for id in self._done.keys() & self._streams}
        return sorted([*ended, *running], key=lambda output: output.metrics["arrival"])

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        use_tqdm: bool = False,
    ) -> RequestOutput | list[RequestOutput]:
        """Run prompts to their end: one prompt in, one RequestOutput out; a list in, a list out.

        A prompt is text or a sequence of token ids. sampling_params: one for all, one each, or None
        for the model's defaults. Open streams and other requests move on as well. A call that raises
        leaves the engine as it was before.

        Raises:
            RequestError: see `folo.submit`; or not as many sampling_params as prompts.
        """
        if _is_prompt(prompts):
            return self._generate([cast("Prompt", prompts)], sampling_params, use_tqdm)[0]
        return self._generate(cast("Sequence[Prompt]", prompts), sampling_params, use_tqdm)

    def stream(
        self, prompt: Prompt, sampling_params: SamplingParams | None = None
    ) -> Generator[str, None, RequestOutput]:
        """The text of one continuation, piece by piece as it comes. Closing the stream aborts its request.

        No part of a stop string shows. Other calls may come between two pieces. The generator returns
        the finished output: `output = yield from llm.stream(...)`, or StopIteration.value.

        Raises:
            RequestError: see `folo.submit`; more than one sample; no text to stream.
        """
        request = self._request(self._unused_id(), prompt, sampling_params)
        if self.tokenizer is None or not request.sampling.detokenize:
            raise RequestError("a stream is text: it needs a tokenizer and detokenize=True")
        if (request.sampling.best_of or request.sampling.n) > 1:
            raise RequestError("a stream is one continuation: it needs n=1 and best_of=None")
        submit(self.state, request)  # refuse now what would be refused at the first piece
        return self._stream(request)

    def encode(self, prompt: Prompt) -> Sequence[int]:
        """Token ids of a prompt; ids pass through. Raises RequestError for text without a tokenizer."""
        prompt = _unpacked(prompt) if isinstance(prompt, Mapping) else prompt
        if not isinstance(prompt, str):
            return prompt.tolist() if isinstance(prompt, torch.Tensor) else prompt
        if self.tokenizer is None:
            raise RequestError(
                "a text prompt needs a tokenizer; give token ids, or skip_tokenizer_init=False"
            )
        return self.tokenizer(prompt, verbose=False)["input_ids"]  # what is too long, `submit` refuses

    def _unused_id(self) -> str:
        while (id := str(self._next_id)) in self._clocks or id in self._done:
            self._next_id += 1
        self._next_id += 1
        return id

    def _request(
        self, id: str, prompt: Prompt, sampling: SamplingParams | None, priority: int = 0
    ) -> Request:
        sampling = self.get_default_sampling_params() if sampling is None else sampling
        prompt = _unpacked(prompt) if isinstance(prompt, Mapping) else prompt
        text = prompt if isinstance(prompt, str) else None
        return Request(self.encode(prompt), sampling, id, priority, prompt=text)

    def _submit(self, request: Request) -> None:
        if request.id in self._done:
            raise RequestError(
                f"request id {request.id!r} has ended and its output is still to be taken by step()"
            )
        state = submit(self.state, request)
        self._clocks[request.id] = Clock()
        self.state = state

    def _generate(
        self,
        prompts: Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None,
        use_tqdm: bool,
    ) -> list[RequestOutput]:
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            each: Sequence[SamplingParams | None] = [sampling_params] * len(prompts)
        else:
            each = sampling_params
        if len(each) != len(prompts):
            raise RequestError(
                f"{len(each)} sampling_params for {len(prompts)} prompts; give one, or one each"
            )
        with self._unchanged_on_error():
            requests = [self._request(self._unused_id(), *pair) for pair in zip(prompts, each, strict=True)]
            for request in requests:
                self._submit(request)
            self._run({request.id for request in requests}, use_tqdm)
        return [self._done.pop(request.id) for request in requests]

    def _run(self, pending: set[str], use_tqdm: bool) -> None:
        left = Counter[str]()  # output tokens that each request may still get
        for sequence in self.state.waiting:
            if sequence.id in pending:
                left[sequence.id] += sequence.origin.max_tokens
        num_prompts, total = len(pending), left.total()
        with tqdm(total=total, desc="Generating", unit=" tokens", disable=not use_tqdm) as bar:
            while pending:
                moved = [id for id in self._advance() if id in pending]
                left.subtract(moved)
                finished = pending & self._done.keys()
                pending -= finished
                total -= sum(left[id] for id in finished)
                bar.total = total
                bar.set_postfix_str(f"{num_prompts - len(pending)}/{num_prompts} prompts", refresh=False)
                bar.update(len(moved))

    def _stream(self, request: Request) -> Generator[str, None, RequestOutput]:
        id, shown = request.id, 0
        try:
            self._streams.add(id)
            self._submit(request)
            while id not in self._done:
                self._advance()
                for sequence in self.state.sequences(id) if id not in self._done else ():
                    text = self._settled_text(sequence)
                    safe = detokenize.stream_safe_length(text, cast("Sequence[str]", request.sampling.stop))
                    if safe > shown:
                        shown, piece = safe, text[shown:safe]
                        yield piece
            if rest := self._done[id].outputs[0].text[shown:]:
                yield rest
            return self._done[id]
        finally:
            if id in self.state.requests:
                self.abort_request(id)
            self._done.pop(id, None)
            self._streams.discard(id)

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        # What is kept for the way back holds no blocks: a state that did would pin the whole cache.
        kept = vacate(self.state), self._next_id, dict(self._clocks), dict(self._texts), dict(self._done)
        try:
            yield
        except BaseException:
            self.state, self._next_id, self._clocks, self._texts, self._done = kept
            raise

    def _advance(self) -> tuple[str, ...]:
        """One step, if there is anything to run; the request of each token that it sampled."""
        batch = schedule(self.state)
        if batch is None:
            return ()
        begun = time.perf_counter()
        self.state, tokens = step(self.params, self.state, batch)
        now = time.perf_counter()
        for item in batch.scheduled:
            if item.admitted:
                self._clocks[item.sequence.id] = self._clock(item.sequence.id).admit(begun)
        for id in tokens.request_ids:
            self._clocks[id] = self._clock(id).token(now)
        self._collect()
        return tokens.request_ids

    def _clock(self, id: str) -> Clock:
        """A request's clock; a new one if `state` was set to a value that holds requests from before."""
        return self._clocks.get(id) or Clock()

    def _collect(self) -> None:
        before = self.state
        after, done = collect(before)
        for id, output in done.items():
            num_samples = before.held(id).num_samples
            self._done[id] = replace(output, metrics=self._clock(id).metrics(num_samples))
            self._clocks.pop(id, None)
            for sample in range(num_samples):
                self._texts.pop((id, sample), None)
        self.state = after

    def _output(self, id: str, unfinished: Sequence[state_sequence.Sequence]) -> RequestOutput:
        held = self.state.held(id)
        output = output_of(self.state, held, unfinished, self._text, self._token_text)
        return replace(output, metrics=self._clock(id).metrics(held.num_samples))

    def _token_text(self, tokenizer: Any, token: int) -> str | None:
        known = self._pieces.get(token)
        if known is None:
            known = self._pieces[token] = token_text_of(tokenizer, token)
        return known

    def _text(self, tokenizer: Any, sequence: state_sequence.Sequence) -> str:
        """`text_of`, decoding only the tokens that are new since the last call."""
        if tokenizer is None or not sequence.origin.request.sampling.detokenize or sequence.text is not None:
            return text_of(tokenizer, sequence)
        return self._decoded(tokenizer, sequence).final_text

    def _settled_text(self, sequence: state_sequence.Sequence) -> str:
        text = sequence.text
        return (self._decoded(self.tokenizer, sequence) if text is None else text).text

    def _decoded(self, tokenizer: Any, sequence: state_sequence.Sequence) -> TextState:
        request, key, ids = sequence.origin.request, (sequence.id, sequence.origin.sample), sequence.text_ids
        owner, seen, text = self._texts.get(key) or (None, 0, None)
        if text is None or owner is not request or seen > len(ids):  # `state` was set to an older value
            skip = request.sampling.skip_special_tokens
            seen, text = 0, detokenize.begin(tokenizer, request.prompt_token_ids, skip)
        text = detokenize.advance(tokenizer, text, ids[seen:])
        self._texts[key] = request, len(ids), text
        return text


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
        batch = [prompts] if _is_prompt(prompts) else prompts
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
            RequestError: no tokenizer or no chat template; and see `generate`.
        """
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


def _is_prompt(prompts: Prompt | Sequence[Prompt]) -> bool:
    if isinstance(prompts, (str, Mapping)):
        return True
    if isinstance(prompts, torch.Tensor):
        return prompts.ndim == 1
    return len(prompts) > 0 and isinstance(prompts[0], Integral)


def _unpacked(prompt: Mapping[str, Any]) -> str | Sequence[int]:
    for key in ("prompt", "prompt_token_ids"):
        if prompt.keys() == {key}:
            return prompt[key]
    raise RequestError(
        f'a prompt is text, token ids, {{"prompt": text}} or {{"prompt_token_ids": ids}}; got the keys '
        f"{', '.join(map(repr, prompt))}"
    )


def _engine_config(
    model: str | None, config: EngineConfig | None, options: Mapping[str, Any]
) -> EngineConfig:
    if config is not None:
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
