"""The engine that is stepped from outside: it owns a state, a tokenizer and the clocks."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from traceback import walk_tb
from types import TracebackType
from typing import Any, cast

import torch
from tqdm import tqdm

from folo import detokenize
from folo.config import EngineConfig, ModelConfig
from folo.errors import ConfigError, RequestError
from folo.metrics import Clock
from folo.model.load import load
from folo.model.tokenizer import load_tokenizer
from folo.prompt import Prompt, encode, is_prompt, unpacked
from folo.request import Request, RequestOutput, require_id
from folo.sampling import SamplingParams
from folo.state.engine import EngineState, init
from folo.state.flight import landed
from folo.state.lifecycle import abort, collect_known, submit, vacate
from folo.state.outputs import output_of
from folo.state.schedule import schedule
from folo.state.sequence import Sequence as Continuation
from folo.step import compile, step
from folo.texts import Texts


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
        if model.quantization is not None and not self.params.quantized:
            raise ConfigError(
                f"quantization={model.quantization!r}, but {model.model or 'the default model'} is not in "
                "that format: drop the option, or make such a checkpoint with `folo quantize`"
            )
        self.tokenizer: Any = (
            None if model.skip_tokenizer_init else load_tokenizer(model.tokenizer or model.model)
        )
        self.state: EngineState = init(
            self.params,
            config.cache,
            config.scheduler,
            self.tokenizer,
            model.seed,
            model.attention,
            model.deterministic,
        )
        self._step = compile(step, config.model.compile)
        self._next_id = 0
        self._clocks: dict[str, Clock] = {}
        self._texts = Texts()
        self._done: dict[str, RequestOutput] = {}  # finished, and not handed out yet
        self._streams: set[str] = set()  # requests whose outputs belong to an open stream

    def get_default_sampling_params(self) -> SamplingParams:
        """The values of the model's generation_config.json, and folo's defaults for the rest.

        Raises RequestError if one of them is refused.
        """
        try:
            return SamplingParams(**cast("dict[str, Any]", dict(self.params.config.sampling_defaults)))
        except RequestError as error:
            raise RequestError(f"generation_config.json of the model: {error}") from None

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
        """End a request with finish_reason "abort"; the next `step` returns its output.

        Raises RequestError if there is no such request.
        """
        require_id(request_id)
        if request_id not in self._done:  # else it ended by itself, just before
            begun, before = time.perf_counter(), self.state
            self.state = abort(before, request_id)
            if self.state.counters.steps > before.counters.steps:  # a step in flight has landed
                self._note(before.in_flight, begun)
            self._collect()

    def has_unfinished_requests(self) -> bool:
        """Whether `step` has anything left to compute or to hand out."""
        # A request that the step in flight ends counts until `step` lands it. Finished ones are in the state
        # only if it was set from outside: `_collect` takes them out.
        state = self.state
        left = state.running or state.waiting or state.finished.length
        return bool(left) or not self._done.keys() <= self._streams

    def step(self) -> list[RequestOutput]:
        """Run one step: the outputs so far of requests that got tokens, and those that have ended."""
        moved = {id for id in self._advance() if id in self.state.requests} - self._streams
        running = [self._output(id, sequences) for id, sequences in self._unfinished(moved).items()]
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
        leaves the engine's requests and tokens as they were before; their K and V are computed anew.

        Raises:
            RequestError: see `folo.submit`; or not as many sampling_params as prompts.
        """
        if is_prompt(prompts):
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
        before = self._next_id
        try:
            request = self._request(self._unused_id(), prompt, sampling_params)
            if self.tokenizer is None or not request.sampling.detokenize:
                raise RequestError("a stream is text: it needs a tokenizer and detokenize=True")
            if request.sampling.num_samples > 1:
                raise RequestError("a stream is one continuation: it needs n=1 and best_of=None")
            submit(self.state, request)  # refuse now what would be refused at the first piece
        except BaseException:
            self._next_id = before  # or later requests would have other ids, and other seeds
            raise
        return self._stream(request)

    def encode(self, prompt: Prompt) -> Sequence[int]:
        """Token ids of a prompt; ids pass through. Raises RequestError for text without a tokenizer."""
        return encode(self.tokenizer, prompt)

    def _unused_id(self) -> str:
        # A state may have been set from outside, with requests that have no clock here.
        taken = self._clocks, self._done, self.state.requests, self.state.finished
        while any((id := str(self._next_id)) in ids for ids in taken):
            self._next_id += 1
        self._next_id += 1
        return id

    def _request(
        self, id: str, prompt: Prompt, sampling: SamplingParams | None, priority: int = 0
    ) -> Request:
        sampling = self.get_default_sampling_params() if sampling is None else sampling
        prompt = unpacked(prompt)
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
        elif isinstance(sampling_params, (str, Mapping)) or not isinstance(sampling_params, Iterable):
            raise RequestError(
                f"sampling_params must be SamplingParams, or one each, got {sampling_params!r}"
            )
        else:
            each = list(sampling_params)
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
                left[sequence.id] += sequence.origin.max_length - sequence.origin.num_prompt
        num_prompts, total = len(pending), left.total()
        with tqdm(total=total, desc="Generating", unit=" tokens", disable=not use_tqdm) as bar:
            while pending:
                moved = [id for id in self._advance() if id in pending]
                left.subtract(moved)
                finished = pending & self._done.keys()
                pending -= finished
                if not moved:
                    self._check_held(pending)
                total -= sum(left[id] for id in finished)
                bar.total = total
                bar.set_postfix_str(f"{num_prompts - len(pending)}/{num_prompts} prompts", refresh=False)
                bar.update(len(moved))

    def _check_held(self, pending: set[str]) -> None:
        for id in pending:
            if id not in self.state.requests and id not in self._done:
                raise RequestError(
                    f"request {id!r} is no longer in the engine's state: has another thread used the engine? "
                    "It is for one thread: make an LLM for each"
                )

    def _stream(self, request: Request) -> Generator[str, None, RequestOutput]:
        id, shown = request.id, 0
        try:
            self._submit(request)
            self._streams.add(id)
            while id not in self._done:
                self._advance()
                text = "" if id in self._done else self._settled(id)
                safe = detokenize.stream_safe_length(text, cast("Sequence[str]", request.sampling.stop))
                if safe > shown:
                    shown, piece = safe, text[shown:safe]
                    yield piece
            if rest := self._done[id].outputs[0].text[shown:]:
                yield rest
            return self._done[id]
        finally:
            # An interrupted step may have finished it, and not collected it.
            held = self.state.requests.get(id) or self.state.finished.get(id)
            # By id if the stream is open: after a `restore` the request is equal, not identical. By identity
            # if an interrupt came between its submission and its entry in `_streams`.
            if id in self._streams or (held is not None and held.request is request):
                if held is not None:
                    self.abort_request(id)
                self._done.pop(id, None)
            self._streams.discard(id)  # where the id is another's, nothing else here is ours

    def _settled(self, id: str) -> str:
        # Not in the generator, which would hold the sequence, and its blocks, for as long as it is suspended.
        return "".join(self._texts.settled(self.tokenizer, s) for s in self._unfinished({id})[id])

    @contextmanager
    def _unchanged_on_error(self) -> Iterator[None]:
        # Neither the state that is kept for an error nor this frame may hold blocks: they would pin all that
        # is cached now, so that evicting it would free nothing.
        begun, known = time.perf_counter(), self.state.in_flight
        self.state = landed(self.state)
        self._note(known, begun)
        kept = vacate(self.state), self._next_id, dict(self._clocks), dict(self._done)
        try:
            yield
        except BaseException:
            self.state, self._next_id, self._clocks, self._done = kept
            raise

    def _advance(self) -> tuple[str, ...]:
        """Run one step, if there is anything to run -> the request id of each token that became known."""
        try:
            return self._stepped()
        except BaseException as error:
            _forget_states(error.__traceback__)
            raise

    def _stepped(self) -> tuple[str, ...]:
        begun, before = time.perf_counter(), self.state
        batch, known = schedule(before), before.in_flight
        if batch is None:
            self.state = landed(before)
        else:
            self.state, tokens = self._step(self.params, before, batch)
            for item in batch.scheduled:
                if item.admitted:
                    self._clocks[item.sequence.id] = self._clock(item.sequence.id, begun).admit(begun)
            if self.state.flight is None:
                known = (*known, *tokens.request_ids)
        self._note(known, begun)
        self._collect()
        return known

    def _note(self, known: Iterable[str], begun: float) -> None:
        """Record when tokens became known; known: the request id of each, begun: when their step began."""
        now, state = time.perf_counter(), self.state
        for id in known:
            if id in state.requests or id in state.finished:
                self._clocks[id] = self._clock(id, begun).token(now)

    def _clock(self, id: str, now: float | None = None) -> Clock:
        """A request's clock; a new one if `state` was set to a value that holds requests from before."""
        return self._clocks.get(id) or Clock(submitted=time.perf_counter() if now is None else now)

    def _collect(self) -> None:
        before = self.state
        after, done = collect_known(before)
        for id, output in done.items():
            num_samples = before.held(id).num_samples
            self._done[id] = replace(output, metrics=self._clock(id).metrics(num_samples))
            self._clocks.pop(id, None)
        if len(self._clocks) > len(after.requests):  # `state` was set to a value without some of them
            self._clocks = {id: self._clocks[id] for id in self._clocks if id in after.requests}
        self.state = after

    def _unfinished(self, ids: set[str]) -> dict[str, list[Continuation]]:
        """The queued sequences of these requests. A single sample that has just got a token is running."""
        state, found = self.state, {id: list[Continuation]() for id in ids}
        several = any(state.held(id).num_samples > 1 for id in ids)
        for sequence in (*state.running, *state.waiting) if several else state.running:
            if sequence.id in found:
                found[sequence.id].append(sequence)
        return found

    def _output(self, id: str, unfinished: Sequence[Continuation]) -> RequestOutput:
        held = self.state.held(id)
        output = output_of(self.state, held, unfinished, self._texts.text, self._texts.piece)
        return replace(output, metrics=self._clock(id).metrics(held.num_samples))


def _forget_states(traceback: TracebackType | None) -> None:
    """Clear folo's frames and torch's: through them a traceback that is kept, as in a notebook, pins blocks.

    Those of the caller's own code, such as a logits processor's, stay for a debugger to show.
    """
    for frame, _ in walk_tb(traceback):
        if frame.f_globals["__name__"].startswith(("folo.", "torch.")):
            with suppress(RuntimeError):  # it runs on
                frame.clear()
