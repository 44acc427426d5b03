"""No hidden state: what the device function may hold, who may import whom, and what no module may use."""

from __future__ import annotations

import ast
import itertools
import operator
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from checkpoints import tiny_checkpoint
from engine import run
from graphs import Recorded
from safetensors import safe_open
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.fx import GraphModule, Node
from torch.utils import _pytree as pytree

import folo
from folo import ops
from folo.inputs import Inputs
from folo.model import device
from folo.model.forward import layer_in_heap
from folo.state.bind import bind
from folo.state.layout import inputs_of
from folo.step import replayed

# --- the device function


# All that a graph may do with a floating tensor, beside calling a folo op: move data.
MOVES: frozenset[Any] = frozenset({operator.getitem, torch.where})
MOVING_METHODS = frozenset({"flatten"})


def on_device(params: folo.Params, k: Tensor, v: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    """The part of a step that is compiled."""
    hidden = device.run(params, k, v, inputs, "cpu")
    results = [hidden]
    for part, rows in device.tiles_of(hidden, inputs.rows):
        raw, processed = device.row_logits(params, part, rows)
        sampled = device.sample(raw, processed, rows)
        results += [raw, processed, *pytree.tree_leaves(sampled)]
    return tuple(result for result in results if result is not None)


class Recorder:
    """A torch.compile backend that runs graphs as they are and keeps them."""

    def __init__(self) -> None:
        self.graphs: list[GraphModule] = []

    def __call__(self, module: GraphModule, example_inputs: list[Any]) -> Callable[..., Any]:
        self.graphs.append(module)
        return module.forward

    @property
    def nodes(self) -> list[Node]:
        return [node for graph in self.graphs for node in graph.graph.nodes]


@pytest.fixture
def recorder() -> Iterator[Recorder]:
    torch._dynamo.reset()
    yield Recorder()
    torch._dynamo.reset()


def own_arithmetic(nodes: list[Node]) -> list[str]:
    """The nodes that make a floating tensor otherwise than by a folo op or a move of data."""

    def is_floating(value: object) -> bool:
        return isinstance(value, Tensor) and value.is_floating_point()

    found = []
    for node in nodes:
        if node.op in ("placeholder", "get_attr", "output"):
            continue
        is_op = getattr(node.target, "namespace", None) == "folo"
        if is_op or node.target in (MOVES if node.op == "call_function" else MOVING_METHODS):
            continue
        if any(map(is_floating, pytree.tree_leaves(node.meta.get("example_value", torch.empty(0))))):
            found.append(f"{node.op} {node.target}")
    return found


def sampled_every_way(params: folo.Params) -> tuple[folo.EngineState, Inputs]:
    """A state, and a step's arrays that ask for all that rows can ask for."""
    scheduler = folo.SchedulerConfig(max_num_batched_tokens=64, max_num_seqs=4)
    state = folo.init(params, folo.CacheConfig(num_blocks=16), scheduler)
    for number, sampling in enumerate(
        (
            folo.SamplingParams(temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, seed=1, logprobs=2),
            folo.SamplingParams(temperature=0, repetition_penalty=1.2, logit_bias={3: 1.5}),
            folo.SamplingParams(seed=2, prompt_logprobs=3, presence_penalty=0.1, frequency_penalty=0.1),
            folo.SamplingParams(seed=4, logprobs=0, logprobs_mode="processed"),
        )
    ):
        state = folo.submit(state, folo.Request([1, 2, 3, 4, number], sampling, id=str(number)))
    batch = folo.schedule(state)
    assert batch is not None
    inputs = inputs_of(bind(batch))
    return state, replace(inputs, copy_source=torch.tensor([0]), copy_target=torch.tensor([9]))


@pytest.mark.no_cover
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["qwen2", "qwen3"])
def test_a_compiled_step_holds_no_arithmetic_of_its_own(
    architecture: str, dtype: torch.dtype, dynamic: bool, recorder: Recorder, tmp_path: Path
) -> None:
    """Whole, without a graph break; and what it computes are the eager bits, in the heap too."""
    tiny_checkpoint(tmp_path, architecture, tie_word_embeddings=architecture == "qwen2")
    params = folo.load(tmp_path, dtype=dtype, use_tqdm=False)
    state, inputs = sampled_every_way(params)
    compiled = torch.compile(on_device, fullgraph=True, dynamic=dynamic, backend=recorder)
    k, v = state.heap.k.clone(), state.heap.v.clone()
    with torch.inference_mode():
        expected = on_device(params, state.heap.k, state.heap.v, inputs)
        got = compiled(params, k, v, inputs)
    assert len(recorder.graphs) == 1
    assert own_arithmetic(recorder.nodes) == []
    called = {str(node.target) for node in recorder.nodes if node.op == "call_function"}
    expected_ops = ("decoder_layers", "packed_linear", "draw", "copy_blocks")
    assert {f"folo.{op}.default" for op in expected_ops} <= called
    assert torch.equal(k, state.heap.k)
    assert torch.equal(v, state.heap.v)
    for a, b in zip(got, expected, strict=True):
        assert torch.equal(a, b)


def test_own_arithmetic_is_found(recorder: Recorder) -> None:
    def impure(x: Tensor) -> Tensor:
        return ops.silu_mul(x * 2).float().sigmoid()[:1] + 1

    torch.compile(impure, fullgraph=True, backend=recorder)(torch.ones(2, 4))
    assert len(own_arithmetic(recorder.nodes)) == 4


def test_a_compiled_step_is_not_taken_for_that_of_another_model(
    recorder: Recorder, tiny: folo.Params
) -> None:
    """Rotary frequencies are inputs of the graph, as weights are: other ones are taken as they come."""
    state, inputs = sampled_every_way(tiny)
    compiled = torch.compile(on_device, fullgraph=True, backend=recorder)
    slower = replace(tiny, config=replace(tiny.config, rope=replace(tiny.config.rope, theta=123.0)))
    scaled: Any = pytree.tree_map(lambda leaf: leaf * 1.1, slower)
    rougher = replace(tiny, config=replace(tiny.config, rms_norm_eps=0.1))
    with torch.inference_mode():
        for params, graphs in ((tiny, 1), (slower, 1), (scaled, 1), (rougher, 2), (tiny, 2)):
            expected = on_device(params, state.heap.k, state.heap.v, inputs)
            got = compiled(params, state.heap.k.clone(), state.heap.v.clone(), inputs)
            assert torch.equal(got[0], expected[0])
            assert len(recorder.graphs) == graphs
        torch._dynamo.reset()
        with pytest.raises(TorchDynamoException):  # no compiler computes frequencies
            compiled(replace(tiny), state.heap.k.clone(), state.heap.v.clone(), inputs)


def test_params_remember_nothing_of_the_mode_that_they_were_first_read_in(tiny: folo.Params) -> None:
    params = replace(tiny)
    with torch.inference_mode():
        assert not params.inv_freq.is_inference()


@pytest.mark.parametrize("replays", [False, True])
def test_a_state_may_be_made_in_one_mode_and_stepped_in_another(tiny: folo.Params, replays: bool) -> None:
    """Once inference mode is left, torch writes to no tensor that was made in it."""
    sampling = folo.SamplingParams(seed=1, max_tokens=12, ignore_eos=True)

    def outputs(*modes: bool) -> dict[str, folo.RequestOutput]:
        """The first mode is the one to make the state in; they take turns."""
        step = replayed(Recorded(), layer_in_heap) if replays else folo.step
        with torch.inference_mode(modes[0]):
            state = folo.init(tiny, folo.CacheConfig(num_blocks=16, reserve_blocks=600))
        state = folo.submit(state, folo.Request([5] * 20, sampling, "a"))
        for number in itertools.count(1):
            with torch.inference_mode(modes[number % len(modes)]):
                if (batch := folo.schedule(state)) is None:
                    break
                state, _ = step(tiny, state, batch)
            if number in (2, 6):  # so that a block is copied
                state = folo.fork(state, "a", [f"fork {number}"], seeds=[number])
        return folo.outputs(state)

    expected = outputs(False)
    for modes in ((True,), (True, False), (True, True, True, True, False), (False, True, True, True)):
        assert outputs(*modes) == expected


# --- the random state, torch's defaults and the arguments


def test_the_default_device_of_torch_has_no_say(tiny: folo.Params, tmp_path: Path) -> None:
    """Params are on a CPU, wherever the caller makes new tensors: "meta" is a device that all can have."""
    asked = folo.SamplingParams(seed=1, max_tokens=4, logprobs=1, prompt_logprobs=1, repetition_penalty=1.1)
    request = folo.Request([5, 6, 7], asked, "a")

    def outputs(path: Path) -> dict[str, folo.RequestOutput]:
        state = folo.submit(folo.init(tiny, folo.CacheConfig(num_blocks=16)), request)
        state = folo.submit(state, folo.Request([8] * 20, folo.SamplingParams(max_tokens=4), "b"))
        for _ in range(3):
            batch = folo.schedule(state)
            assert batch is not None
            state, _ = folo.step(tiny, state, batch)
        folo.save(state, path)
        state = folo.restore(tiny, path)
        while (batch := folo.schedule(state)) is not None:
            state, tokens = folo.step(tiny, state, batch)
            assert tokens.ids.device.type == "cpu"
        return folo.outputs(state)

    expected = outputs(tmp_path / "a")
    with torch.device("meta"):
        assert outputs(tmp_path / "b") == expected
    digests = set()
    for name in "ab":
        with safe_open(tmp_path / name, "pt") as file:
            digests.add(file.metadata()["sha256"])
    assert len(digests) == 1, "the same was saved"


def test_autocast_has_no_say(tiny: folo.Params, each_instruction_set: str) -> None:
    """As around the loss of a training loop that samples, too."""
    sampling = folo.SamplingParams(seed=1, max_tokens=4, logprobs=2, prompt_logprobs=1)

    def outputs() -> dict[str, folo.RequestOutput]:
        return run(tiny, [folo.Request([5, 6, 7] * 8, sampling, "a")])

    expected, ids = outputs(), torch.tensor([5, 6, 7])
    logits = folo.model.forward(tiny, ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert outputs() == expected
        assert torch.equal(folo.model.forward(tiny, ids), logits)


def generated(params: folo.Params) -> list[list[int]]:
    scheduler = folo.SchedulerConfig(max_num_batched_tokens=16, max_num_seqs=2)
    state = folo.init(params, folo.CacheConfig(num_blocks=32), scheduler)
    for number in range(3):
        sampling = folo.SamplingParams(temperature=1.0, max_tokens=8, ignore_eos=True)
        state = folo.submit(state, folo.Request([5, 6, 7, number], sampling, id=str(number)))
    while (batch := folo.schedule(state)) is not None:
        state, _ = folo.step(params, state, batch)
    return [output.outputs[0].token_ids for output in folo.outputs(state).values()]


def test_global_random_state_is_neither_read_nor_changed(tiny: folo.Params) -> None:
    python, numpy = random.getstate(), np.random.get_state(legacy=True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        before = torch.get_rng_state()
        first = generated(tiny)
        assert torch.equal(torch.get_rng_state(), before)
        assert random.getstate() == python
        assert str(np.random.get_state(legacy=True)) == str(numpy)
        torch.manual_seed(2)
        assert generated(tiny) == first


# --- the source

ROOT = Path(folo.__file__).parent
BASE = frozenset({"config", "request", "inputs", "padding", "transfer", "files", "sampling", "detokenize"})
STEP = frozenset({"step", "graph", "tokens"})
LAYERS: dict[str, frozenset[str]] = {
    "errors": frozenset(),
    "ops": frozenset({"ops", "errors"}),
    "base": frozenset({"base", "ops", "errors"}),
    "state": frozenset({"state", "base", "ops", "errors"}),
    "model": frozenset({"model", "base", "ops", "errors"}),
    "step": frozenset({"step", "state", "model", "base", "ops", "errors"}),
}
"""What each layer of the core imports of folo; what is not named here is shell, which imports anything."""


@cache
def modules() -> dict[str, ast.Module]:
    """Every module of folo by its path, such as `state/heap.py`."""
    return {str(path.relative_to(ROOT)): ast.parse(path.read_text()) for path in sorted(ROOT.rglob("*.py"))}


def layer_of(parts: tuple[str, ...]) -> str:
    """The layer of `folo.<parts>`; a name of `folo/__init__.py` itself is the shell's."""
    first = parts[0].removesuffix(".py") if parts else "shell"
    if first in BASE:
        return "base"
    return "step" if first in STEP else first if first in LAYERS else "shell"


def at_run_time(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes but those under `if TYPE_CHECKING:`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        yield node
        yield from at_run_time(node)


def imported(tree: ast.Module) -> Iterator[tuple[str, ...]]:
    """The dotted names that a module imports, inside functions too."""
    for node in at_run_time(tree):
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            assert node.module is not None
            yield from ((*node.module.split("."), alias.name) for alias in node.names)


CORE = {path: tree for path, tree in modules().items() if layer_of(Path(path).parts) != "shell"}


@pytest.mark.parametrize("path", CORE)
def test_imports_run_one_way(path: str) -> None:
    """cli -> llm -> step -> (state, model) -> ops; state and model never meet."""
    layer = layer_of(Path(path).parts)
    for name in imported(CORE[path]):
        if name[0] == "folo":
            assert layer_of(name[1:]) in LAYERS[layer], f"{path} imports {'.'.join(name)}"


@pytest.mark.parametrize("path", [path for path in modules() if path not in ("cli.py", "__main__.py")])
def test_nothing_imports_the_command_line(path: str) -> None:
    assert all(name[:2] != ("folo", "cli") for name in imported(modules()[path]))


def test_the_compiler_is_not_imported_before_something_is_compiled() -> None:
    """It takes as long to import as torch itself, and nothing that runs eagerly needs it."""
    code = "import sys, folo; folo.compile(folo.step); assert 'torch._dynamo' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


IMPURE_MODULES = frozenset({"random", "time", "datetime", "secrets", "uuid", "threading", "contextvars"})
IMPURE_NAMES = frozenset({"environ", "getenv", "putenv", "urandom", "manual_seed", "default_rng"})
CACHES = frozenset({"cache", "lru_cache"})
RANDOM_FUNCTIONS = frozenset(
    {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "multinomial"}
)


def attribute_of(node: ast.AST) -> str | None:
    if isinstance(node, ast.Attribute):
        return node.attr
    return node.id if isinstance(node, ast.Name) else None


# Where the kernels come from is the environment's: which compiler, where to keep what it made, for which CPU.
BUILDS = frozenset({"ops/cpu/__init__.py", "ops/cpu/build.py"})


@pytest.mark.parametrize("path", sorted(set(CORE) - BUILDS))
def test_no_clock_no_environment_no_random_numbers_but_the_seeds(path: str) -> None:
    for name in imported(CORE[path]):
        assert name[0] not in IMPURE_MODULES, f"{path} imports {'.'.join(name)}"
        assert name[-1] not in IMPURE_NAMES | CACHES, f"{path} imports {'.'.join(name)}"
    for node in ast.walk(CORE[path]):
        if isinstance(node, ast.Attribute):
            name = f"{path}:{node.lineno} uses {ast.unparse(node)}"
            assert node.attr not in IMPURE_NAMES, name
            owner = attribute_of(node.value)
            assert owner != "torch" or node.attr not in RANDOM_FUNCTIONS, name
            assert owner != "functools" or node.attr not in CACHES, name
            assert owner not in ("np", "numpy") or node.attr != "random", name


MUTABLE_CALLS = frozenset(
    {
        "list",
        "dict",
        "set",
        "bytearray",
        "defaultdict",
        "deque",
        "Counter",
        "OrderedDict",
        "WeakKeyDictionary",
    }
)
MUTATORS = frozenset(
    {
        "append",
        "extend",
        "insert",
        "add",
        "update",
        "setdefault",
        "pop",
        "popitem",
        "remove",
        "clear",
        "discard",
    }
)


def is_mutable(value: ast.expr | None) -> bool:
    if isinstance(value, ast.Call):
        return attribute_of(value.func) in MUTABLE_CALLS
    return isinstance(value, ast.List | ast.Dict | ast.Set | ast.ListComp | ast.DictComp | ast.SetComp)


def changes(tree: ast.Module) -> Iterator[str]:
    """The names of which an element is assigned or deleted, or a mutating method called."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
            yield attribute_of(node.value) or ""
        elif (
            isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS
        ):
            yield attribute_of(node.func.value) or ""
        elif isinstance(node, ast.AugAssign):
            yield attribute_of(node.target) or ""


@pytest.mark.parametrize("path", CORE)
def test_no_module_holds_mutable_state(path: str) -> None:
    """A container at module level is a constant: named as one, and changed nowhere in its module."""
    tree = CORE[path]
    assert not any(isinstance(node, ast.Global) for node in ast.walk(tree)), f"{path}: global statement"
    changed = set(changes(tree))
    for node in tree.body:
        if not isinstance(node, ast.Assign | ast.AnnAssign) or not is_mutable(node.value):
            continue
        for target in node.targets if isinstance(node, ast.Assign) else [node.target]:
            name = ast.unparse(target)
            assert name == "__all__" or name.isupper(), f"{path}:{node.lineno} {name} is mutable"
            assert name not in changed, f"{path}: the constant {name} is changed"


@pytest.mark.parametrize("path", CORE)
def test_no_class_holds_mutable_state(path: str) -> None:
    for owner in (node for node in ast.walk(CORE[path]) if isinstance(node, ast.ClassDef)):
        for node in owner.body:
            if isinstance(node, ast.Assign | ast.AnnAssign):
                assert not is_mutable(node.value), f"{path}:{node.lineno} in class {owner.name}"


def test_impure_source_is_found() -> None:
    """The checks above find what they look for."""
    tree = ast.parse("_seen = {}\nTABLE: list[int] = []\ndef f():\n    TABLE.append(1)\n    _seen[1] += 2")
    assert {"_seen", "TABLE"} <= set(changes(tree))
    assert all(is_mutable(node.value) for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign))
    guarded = ast.parse("if TYPE_CHECKING:\n    from folo.model.params import Params\nimport time")
    assert list(imported(guarded)) == [("time",)]
    assert list(imported(ast.parse("def f():\n    from folo import step"))) == [("folo", "step")]
    assert layer_of(("step",)) == "step"
    assert layer_of(("model", "forward", "logits")) == "model"
    assert layer_of(("Params",)) == "shell"
