"""transformers: `generate` where all requests are of one length, else its continuous batching."""

from __future__ import annotations

import importlib
import time
from typing import Any

_BLOCKS, _BATCH_TOKENS = 1024, 1024  # of continuous batching on a CPU: its defaults are made for GPUs
_GPU_SHARE = 0.5  # of the memory that is free: folo's heap lies on the same GPU


class _Transformers:
    def __init__(self, checkpoint: str, dtype: str, threads: int) -> None:
        self._torch: Any = importlib.import_module("torch")
        self._library: Any = importlib.import_module("transformers")
        self._torch.set_num_threads(threads)
        self._device = "cuda" if self._torch.cuda.is_available() else "cpu"
        model = self._library.AutoModelForCausalLM.from_pretrained(
            checkpoint, dtype=dtype, attn_implementation="sdpa"
        )
        self._model = model.to(self._device).eval()
        self._model.generation_config.eos_token_id = None
        self._manager: Any = None
        self.version = f"transformers {self._library.__version__}, torch {self._torch.__version__}"

    def run(self, prompts: Any, cold: bool) -> tuple[float, float, float]:
        lengths = {(len(ids), wanted) for ids, wanted in prompts}
        return self._generate(prompts) if len(lengths) == 1 else self._batched(prompts)

    def _generate(self, prompts: Any) -> tuple[float, float, float]:
        ids = self._torch.tensor([ids for ids, _ in prompts], device=self._device)
        wanted = prompts[0][1]
        clock = _Clock()
        begin = time.perf_counter()
        with self._torch.inference_mode():
            out = self._model.generate(
                input_ids=ids,
                attention_mask=self._torch.ones_like(ids),
                max_new_tokens=wanted,
                min_new_tokens=wanted,
                do_sample=False,
                pad_token_id=0,
                streamer=clock if len(prompts) == 1 else None,
            )
        total = time.perf_counter() - begin
        assert out.shape[1] == ids.shape[1] + wanted
        times = [t - begin for t in clock.times[1:]] or [total]  # the first put is the prompt
        return times[0], times[-1], total

    def _batched(self, prompts: Any) -> tuple[float, float, float]:
        if self._manager is None:
            self._manager = self._model.init_continuous_batching(
                generation_config=self._library.GenerationConfig(
                    max_new_tokens=max(wanted for _, wanted in prompts),
                    do_sample=False,
                    eos_token_id=-1,
                    pad_token_id=0,
                ),
                continuous_batching_config=self._library.ContinuousBatchingConfig(**self._limits()),
            )
            self._manager.start()
        begin = time.perf_counter()
        for number, (ids, wanted) in enumerate(prompts):
            self._manager.add_request(ids, request_id=f"{begin} {number}", max_new_tokens=wanted)
        left, tokens = len(prompts), 0
        while left:
            result = self._manager.get_result(timeout=1)
            if result is None:
                assert self._manager.is_running(), "continuous batching has stopped"
            elif result.is_finished():
                left, tokens = left - 1, tokens + len(result.generated_tokens)
        total = time.perf_counter() - begin
        assert tokens == sum(wanted for _, wanted in prompts)
        return total, total, total

    def _limits(self) -> dict[str, float]:
        if self._device == "cuda":
            return {"max_memory_percent": _GPU_SHARE}
        return {"num_blocks": _BLOCKS, "max_batch_tokens": _BATCH_TOKENS}


class _Clock:
    """A streamer that notes when each token came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None:
        pass


start = _Transformers
