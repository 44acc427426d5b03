"""OpenVINO GenAI's continuous batching, with weights that optimum-intel exports beside the checkpoint.

Weights in bfloat16 are exported as float16: the exporter has no such format.
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

_BATCH_TOKENS, _CACHE_GIB = 4096, 4
_PRECISIONS = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


class _OpenVINO:
    def __init__(self, checkpoint: str, dtype: str, threads: int) -> None:
        self._genai: Any = importlib.import_module("openvino_genai")
        self._tensor: Any = importlib.import_module("openvino").Tensor
        self._numpy: Any = importlib.import_module("numpy")
        importlib.import_module("optimum.intel")
        self._threads, self._precision = threads, _PRECISIONS[dtype]
        self._model = _exported(checkpoint, dtype)
        self._pipeline = self._new_pipeline(cold=False)
        self.version = f"OpenVINO GenAI {self._genai.__version__}"

    def _new_pipeline(self, cold: bool) -> Any:
        scheduler = self._genai.SchedulerConfig()
        scheduler.cache_size = _CACHE_GIB
        scheduler.max_num_batched_tokens = _BATCH_TOKENS
        scheduler.max_num_seqs = 64
        scheduler.dynamic_split_fuse = True
        scheduler.enable_prefix_caching = cold
        options = {
            "INFERENCE_PRECISION_HINT": self._precision,
            "KV_CACHE_PRECISION": self._precision,
            "INFERENCE_NUM_THREADS": self._threads,
        }
        return self._genai.ContinuousBatchingPipeline(self._model, scheduler, "CPU", options)

    def run(self, prompts: Any, cold: bool) -> tuple[float, float, float]:
        if not cold:
            return self._serve(self._pipeline, prompts)
        pipeline = self._new_pipeline(cold=True)  # nothing else empties the prefix cache
        self._serve(pipeline, [([1 + n % 97 for n in range(len(prompts[0][0]))], 8)])  # compiled, allocated
        return self._serve(pipeline, prompts)

    def _serve(self, pipeline: Any, prompts: Any) -> tuple[float, float, float]:
        inputs = [self._tensor(self._numpy.array([ids], dtype="int64")) for ids, _ in prompts]
        configs = [self._config(wanted) for _, wanted in prompts]
        begin = time.perf_counter()
        handles = [pipeline.add_request(n, *both) for n, both in enumerate(zip(inputs, configs, strict=True))]
        counts, first, last = [0] * len(handles), 0.0, 0.0
        while pipeline.has_non_finished_requests():
            pipeline.step()
            now = time.perf_counter() - begin
            for n, handle in enumerate(handles):
                while handle.can_read():
                    counts[n] += sum(len(out.generated_ids) for out in handle.read().values())
                    first, last = first or now, now
        total = time.perf_counter() - begin
        assert counts == [wanted for _, wanted in prompts]
        return first, last, total

    def _config(self, wanted: int) -> Any:
        config = self._genai.GenerationConfig()
        config.max_new_tokens = config.min_new_tokens = wanted
        config.ignore_eos, config.do_sample, config.apply_chat_template = True, False, False
        return config


def _exported(checkpoint: str, dtype: str) -> str:
    """The checkpoint in OpenVINO's format: made once, in its folder `openvino`."""
    folder = Path(checkpoint) / "openvino"
    if not (folder / "openvino_model.bin").exists():
        command = [str(Path(sys.executable).parent / "optimum-cli"), "export", "openvino", "-m", checkpoint]
        weights = "fp32" if dtype == "float32" else "fp16"
        command += ["--task", "text-generation-with-past", "--weight-format", weights, str(folder)]
        subprocess.run(command, check=True)
    return str(folder)


start = _OpenVINO
