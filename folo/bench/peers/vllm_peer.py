"""vLLM on the CPU."""

from __future__ import annotations

import importlib
import os
import time
from typing import Any


class _VLLM:
    def __init__(self, checkpoint: str, dtype: str, threads: int) -> None:
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", f"0-{threads - 1}")
        self._library: Any = importlib.import_module("vllm")
        self._prompt: Any = importlib.import_module("vllm.inputs").TokensPrompt
        self._engine = self._library.LLM(
            model=checkpoint,
            dtype=dtype,
            max_model_len=4096,
            enable_prefix_caching=True,
            disable_log_stats=False,
            skip_tokenizer_init=True,
            seed=0,
        )
        preloaded = " (preloaded)" if "LD_PRELOAD" in os.environ else ""
        self.version = f"vLLM {self._library.__version__}{preloaded}"

    def run(self, prompts: Any, cold: bool) -> tuple[float, float, float]:
        self._engine.reset_prefix_cache()
        sampling = [
            self._library.SamplingParams(temperature=0, max_tokens=wanted, ignore_eos=True, detokenize=False)
            for _, wanted in prompts
        ]
        inputs = [self._prompt(prompt_token_ids=ids) for ids, _ in prompts]
        begin = time.perf_counter()
        outputs = self._engine.generate(inputs, sampling, use_tqdm=False)
        total = time.perf_counter() - begin
        assert [len(out.outputs[0].token_ids) for out in outputs] == [wanted for _, wanted in prompts]
        metrics = outputs[0].metrics
        first = metrics.first_token_latency
        return first, first + metrics.last_token_ts - metrics.first_token_ts, total


start = _VLLM
