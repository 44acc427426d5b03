"""folo: a purely functional LLM inference engine for PyTorch.

batch         = folo.schedule(state)
state, tokens = folo.step(params, state, batch)
"""

from folo import model, sampling
from folo.config import CacheConfig, EngineConfig, ModelConfig, SchedulerConfig
from folo.engine import LLMEngine
from folo.errors import (
    ConfigError,
    FoloError,
    IntegrityError,
    LoadError,
    OutOfBlocksError,
    ParamsMismatchError,
    RequestError,
    StaleBatchError,
)
from folo.llm import LLM
from folo.model.load import load
from folo.model.params import Params
from folo.model.tokenizer import load_tokenizer
from folo.request import CompletionOutput, Logprob, Request, RequestOutput
from folo.sampling import SamplingParams
from folo.state.branch import extend, fork
from folo.state.check import check
from folo.state.engine import EngineState, init
from folo.state.lifecycle import abort, collect, finish, submit
from folo.state.outputs import has_unfinished, outputs
from folo.state.schedule import Batch, schedule
from folo.step import Tokens, step

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "Batch",
    "CacheConfig",
    "CompletionOutput",
    "ConfigError",
    "EngineConfig",
    "EngineState",
    "FoloError",
    "IntegrityError",
    "LLMEngine",
    "LoadError",
    "Logprob",
    "ModelConfig",
    "OutOfBlocksError",
    "Params",
    "ParamsMismatchError",
    "Request",
    "RequestError",
    "RequestOutput",
    "SamplingParams",
    "SchedulerConfig",
    "StaleBatchError",
    "Tokens",
    "abort",
    "check",
    "collect",
    "extend",
    "finish",
    "fork",
    "has_unfinished",
    "init",
    "load",
    "load_tokenizer",
    "model",
    "outputs",
    "sampling",
    "schedule",
    "step",
    "submit",
]
