"""folo: a purely functional LLM inference engine for PyTorch.

batch         = folo.schedule(state)
state, tokens = folo.step(params, state, batch)
"""

from folo import model, quant, sampling
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
    RestoreError,
    StaleBatchError,
)
from folo.llm import LLM
from folo.model.load import load
from folo.model.params import Params
from folo.model.tokenizer import load_tokenizer
from folo.request import CompletionOutput, Logprob, Request, RequestOutput
from folo.sampling import SamplingParams
from folo.state.batch import Batch
from folo.state.branch import extend, fork
from folo.state.check import check
from folo.state.engine import EngineState, init
from folo.state.lifecycle import abort, collect, finish, submit
from folo.state.outputs import has_unfinished, outputs
from folo.state.rebind import rebind, reconfigure
from folo.state.restore import restore
from folo.state.save import save
from folo.state.schedule import schedule
from folo.state.stats import Stats, stats
from folo.step import Step, compile, step
from folo.tokens import Tokens

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
    "RestoreError",
    "SamplingParams",
    "SchedulerConfig",
    "StaleBatchError",
    "Stats",
    "Step",
    "Tokens",
    "abort",
    "check",
    "collect",
    "compile",
    "extend",
    "finish",
    "fork",
    "has_unfinished",
    "init",
    "load",
    "load_tokenizer",
    "model",
    "outputs",
    "quant",
    "rebind",
    "reconfigure",
    "restore",
    "sampling",
    "save",
    "schedule",
    "stats",
    "step",
    "submit",
]
