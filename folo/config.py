"""How an engine is set up: frozen values, validated when they are made."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal, get_args

import torch

from folo.errors import ConfigError

CompileMode = Literal["auto", "eager", "inductor", "cudagraph"]
COMPILE_MODES: tuple[str, ...] = get_args(CompileMode)


def _require(ok: bool, name: str, value: Any, expected: str) -> None:
    if not ok:
        raise ConfigError(f"{name}={value!r}: expected {expected}")


def require_kind(name: str, value: Any, kind: type) -> None:
    """Raises ConfigError for a value of another type."""
    _require(isinstance(value, kind), name, value, f"a {kind.__name__}")


def require_seed(seed: Any) -> int:
    """The seed as an int. Raises ConfigError for what is no 64-bit unsigned number."""
    _require(_is_count(seed, 0) and seed < 2**64, "seed", seed, "an int in [0, 2**64)")
    return int(seed)


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _is_finite(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < math.inf


def _plain(config: Any) -> None:
    """Turn numpy's numbers among the fields into Python's: a saved state can hold no others."""
    for one in fields(config):
        value = getattr(config, one.name)
        if isinstance(value, Real) and not isinstance(value, bool):
            plain: Any = int if isinstance(value, Integral) else float
            object.__setattr__(config, one.name, plain(value))


def _require_flags(config: Any, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        _require(isinstance(value, bool), name, value, "True or False")


@dataclass(frozen=True)
class ModelConfig:
    """Which weights to run.

    Args:
        model: a Hugging Face directory, a hub id, a .gguf file, or None for the default model.
        tokenizer: where the tokenizer lies, if not with the model.
        dtype: "auto" (the checkpoint's own), "float32", "float16", "bfloat16", or a torch.dtype.
        device: "auto" (CUDA if present), or any torch device.
        quantization: "gptq" refuses a checkpoint in any other format; None takes it as it is.
        skip_tokenizer_init: load no tokenizer: prompts and outputs are token ids only.
        seed: the engine seed, from which requests without a seed of their own get theirs.
        compile: how the step runs, as `folo.compile` takes it.
        attention: who computes attention, as `folo.init` takes it.
        deterministic: refuse an attention backend that is not known to keep folo's promise of invariance.
        trust_remote_code: accepted for compatibility; folo never runs remote code.

    Raises:
        ConfigError: a value out of range.
    """

    model: str | None = None
    tokenizer: str | None = None
    dtype: str | torch.dtype = "auto"
    device: str | torch.device = "auto"
    quantization: str | None = None
    skip_tokenizer_init: bool = False
    seed: int = 0
    compile: CompileMode = "auto"
    attention: str = "auto"
    deterministic: bool = True
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        _plain(self)
        require_seed(self.seed)
        _require(self.quantization in (None, "gptq"), "quantization", self.quantization, "None or 'gptq'")
        _require(self.compile in COMPILE_MODES, "compile", self.compile, f"one of {COMPILE_MODES}")
        _require_flags(self, "skip_tokenizer_init", "deterministic", "trust_remote_code")
        if self.trust_remote_code:
            warnings.warn("trust_remote_code=True has no effect: folo never runs remote code", stacklevel=3)


@dataclass(frozen=True)
class CacheConfig:
    """The KV heap.

    Args:
        block_size: tokens a block, 8 to 256.
        num_blocks: blocks that one state may use; None: as many as the memory below holds.
        kv_cache_gib: memory of the heap on a CPU, in GiB, when num_blocks is None.
        gpu_memory_utilization: share of a GPU's memory that weights and heap may take, likewise.
        reserve_blocks: blocks beyond num_blocks for older states that the caller keeps.
        enable_prefix_caching: reuse the blocks of equal prefixes; never changes a result.

    Raises:
        ConfigError: a value out of range.
    """

    block_size: int = 16
    num_blocks: int | None = None
    kv_cache_gib: float = 4.0
    gpu_memory_utilization: float = 0.9
    reserve_blocks: int = 0
    enable_prefix_caching: bool = True

    def __post_init__(self) -> None:
        _plain(self)
        block = self.block_size
        _require(_is_count(block, 8) and block <= 256, "block_size", block, "an int in [8, 256]")
        blocks = self.num_blocks
        _require(blocks is None or _is_count(blocks, 1), "num_blocks", blocks, "None or an int of at least 1")
        memory, share = self.kv_cache_gib, self.gpu_memory_utilization
        _require(_is_finite(memory) and memory > 0, "kv_cache_gib", memory, "a number above 0, in GiB")
        _require(_is_finite(share) and 0 < share <= 1, "gpu_memory_utilization", share, "a share in (0, 1]")
        reserve = self.reserve_blocks
        _require(_is_count(reserve, 0), "reserve_blocks", reserve, "an int of at least 0")
        _require_flags(self, "enable_prefix_caching")


@dataclass(frozen=True)
class SchedulerConfig:
    """What runs when.

    Args:
        max_num_seqs: sequences that run at a time.
        max_num_batched_tokens: tokens of one step, prefill and decode together.
        max_model_len: tokens of one sequence, prompt and output; None: what model and heap allow.
        long_prefill_token_threshold: longest prefill chunk of one sequence in one step; 0: no limit.
        policy: "fcfs", or "priority" (lower Request.priority first, then by arrival).

    Raises:
        ConfigError: a value out of range.
    """

    max_num_seqs: int = 256
    max_num_batched_tokens: int = 2048
    max_model_len: int | None = None
    long_prefill_token_threshold: int = 0
    policy: Literal["fcfs", "priority"] = "fcfs"

    def __post_init__(self) -> None:
        _plain(self)
        seqs, tokens = self.max_num_seqs, self.max_num_batched_tokens
        _require(_is_count(seqs, 1), "max_num_seqs", seqs, "an int of at least 1")
        _require(_is_count(tokens, 1), "max_num_batched_tokens", tokens, "an int of at least 1")
        longest = self.max_model_len
        ok = longest is None or _is_count(longest, 2)
        _require(
            ok, "max_model_len", longest, "None or an int of at least 2 (a prompt token and an output token)"
        )
        threshold = self.long_prefill_token_threshold
        _require(_is_count(threshold, 0), "long_prefill_token_threshold", threshold, "an int of at least 0")
        _require(self.policy in ("fcfs", "priority"), "policy", self.policy, '"fcfs" or "priority"')


@dataclass(frozen=True)
class EngineConfig:
    """Model, cache and scheduler together."""

    model: ModelConfig = field(default_factory=ModelConfig)
    cache: CacheConfig = field(default_factory=CacheConfig)
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        for name, kind in (("model", ModelConfig), ("cache", CacheConfig), ("scheduler", SchedulerConfig)):
            require_kind(name, getattr(self, name), kind)
