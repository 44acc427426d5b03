"""Params as a pytree, and `folo.model.forward` under autograd and torch.func."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
import torch.nn.functional as F
from checkpoints import state_dict, tiny_checkpoint
from gptq_files import gptq_checkpoint
from torch import Tensor
from torch.func import grad, grad_and_value, jacfwd, jacrev, jvp, vmap
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import PreTrainedModel

import folo

# torch itself scripts its decompositions for jvp when they are first used.
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")

SMALL: dict[str, Any] = {"vocab_size": 50, "hidden_size": 32, "intermediate_size": 48, "head_dim": 8}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama tied, biases": (
        "llama",
        {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    ),
    "qwen2": ("qwen2", {}),
    "qwen3": ("qwen3", {"num_key_value_heads": 1}),
}
IDS = torch.randint(50, (21,), generator=torch.Generator().manual_seed(0))


def build(
    path: Path, name: str = "qwen3", dtype: torch.dtype = torch.float32, seed: int = 0
) -> tuple[PreTrainedModel, folo.Params]:
    architecture, overrides = MODELS[name]
    model = tiny_checkpoint(path, architecture, seed=seed, **SMALL | overrides)
    return model, folo.load(path, dtype=dtype, pack=False, use_tqdm=False)


def tree_map(function: Callable[..., Any], *trees: folo.Params) -> folo.Params:
    return cast(folo.Params, pytree.tree_map(function, *trees))


def loss(params: folo.Params, ids: Tensor = IDS) -> Tensor:
    return F.cross_entropy(folo.model.forward(params, ids[:-1]), ids[1:])


def check_close(got: Tensor, expected: Tensor, tolerance: float, what: object = "") -> None:
    """The error relative to the largest element, which is not zero."""
    assert expected.abs().max() > 0, what
    assert (got - expected).abs().max() <= tolerance * expected.abs().max(), what


# --- the tree


@pytest.mark.parametrize("name", MODELS)
def test_params_are_a_tree_of_tensors_alone(name: str, tmp_path: Path) -> None:
    model, params = build(tmp_path, name)
    leaves = pytree.tree_leaves(params)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert params.num_parameters == model.num_parameters()
    assert params.num_bytes == 4 * model.num_parameters()
    halves = tree_map(Tensor.bfloat16, params)
    assert halves.dtype == torch.bfloat16
    assert halves.num_bytes == params.num_bytes // 2
    assert halves.config is params.config
    for key, tensor in state_dict(params).items():
        assert torch.equal(state_dict(halves)[key], tensor.bfloat16()), key


def test_a_tree_of_params_is_put_together_as_it_was(tmp_path: Path) -> None:
    _, params = build(tmp_path, "llama tied, biases")
    leaves, spec = pytree.tree_flatten(params)
    again = pytree.tree_unflatten(leaves, spec)
    assert again.lm_head is None
    assert again.layers[0].q_norm is None
    assert pytree.tree_structure(again) == spec
    assert all(a is b for a, b in zip(leaves, pytree.tree_leaves(again), strict=True))


@pytest.mark.parametrize("checkpoint", [tiny_checkpoint, gptq_checkpoint])
def test_params_are_pickled_at_their_own_size(checkpoint: Callable[[Path], Any], tmp_path: Path) -> None:
    """As for another process. They lie in one piece of memory, of which each would bring all."""
    checkpoint(tmp_path)
    params = folo.load(tmp_path, use_tqdm=False)
    written = pickle.dumps(params)
    assert len(written) < 2 * params.num_bytes + 100_000
    expected = folo.model.forward(params, IDS)
    for again in (pickle.loads(written), copy.deepcopy(params)):
        assert again.fingerprint == params.fingerprint
        assert torch.equal(folo.model.forward(again, IDS), expected)


def test_leaves_have_the_names_of_their_fields(tmp_path: Path) -> None:
    _, params = build(tmp_path, "qwen3")
    found = {pytree.keystr(path): leaf for path, leaf in pytree.tree_leaves_with_path(params)}
    assert found[".layers[1].qkv.weight"] is params.layers[1].qkv.weight
    assert found[".layers[0].q_norm"] is params.layers[0].q_norm
    assert ".layers[0].qkv.bias" not in found


# --- gradients


def transformers_gradients(model: PreTrainedModel) -> dict[str, Tensor]:
    model.zero_grad()
    logits = model(IDS[None, :-1]).logits[0]
    F.cross_entropy(logits, IDS[1:]).backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    return {name: gradient for name, gradient in gradients.items() if gradient is not None}


@pytest.mark.usefixtures("reference_ops")
@pytest.mark.parametrize("name", MODELS)
def test_gradients_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    """To 1e-4 of each tensor's largest, in float32; no weight's gradient is zero, but a key bias's.

    A bias of the keys adds the same to all scores of a row: it comes back only through the rotation.
    """
    model, params = build(tmp_path, name)
    expected = transformers_gradients(model)
    gradients, value = grad_and_value(loss)(params)
    with torch.no_grad():
        assert torch.equal(value, loss(params))
    got = state_dict(gradients)
    assert got.keys() == expected.keys()
    for key, gradient in expected.items():
        check_close(got[key], gradient, 1e-4, key)


def test_autograd_gives_the_gradients_of_torch_func(tmp_path: Path) -> None:
    _, params = build(tmp_path)
    expected = pytree.tree_leaves(grad(loss)(params))
    leaves = tree_map(lambda leaf: leaf.clone().requires_grad_(), params)
    loss(leaves).backward()
    for leaf, gradient in zip(pytree.tree_leaves(leaves), expected, strict=True):
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, gradient)


def test_one_leaf_that_requires_grad_is_enough(tmp_path: Path) -> None:
    _, params = build(tmp_path)
    weight = params.layers[0].down.weight
    assert isinstance(weight, torch.Tensor)
    weight.requires_grad_()
    (gradient,) = torch.autograd.grad(loss(params), weight)
    weight.requires_grad_(False)
    check_close(gradient, grad(loss)(params).layers[0].down.weight, 0)


@pytest.mark.usefixtures("reference_ops")
def test_differentiating_leaves_the_bits_of_the_logits(tmp_path: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        _, params = build(tmp_path, "qwen2", dtype)
        plain = folo.model.forward(params, IDS)
        tracked = folo.model.forward(tree_map(lambda leaf: leaf.clone().requires_grad_(), params), IDS)
        assert tracked.requires_grad
        assert torch.equal(tracked, plain)


def test_gradients_in_half_precision_are_near_those_in_float32(tmp_path: Path) -> None:
    _, params = build(tmp_path, "qwen3", torch.bfloat16)
    got = grad(loss)(params)
    expected = grad(loss)(tree_map(Tensor.float, params))
    for a, b in zip(pytree.tree_leaves(got), pytree.tree_leaves(expected), strict=True):
        assert a.dtype == torch.bfloat16
        check_close(a.float(), b, 0.1)


# --- jvp, Jacobians


def direction(params: folo.Params, seed: int = 1) -> folo.Params:
    generator = torch.Generator().manual_seed(seed)
    return tree_map(lambda leaf: torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype), params)


def pushed(function: Callable[[Any], Tensor], at: Any, tangent: Any) -> tuple[Tensor, Tensor]:
    value, derivative = jvp(function, (at,), (tangent,))[:2]
    return value, derivative


@pytest.mark.parametrize("name", MODELS)
def test_jvp_is_the_finite_difference(name: str, tmp_path: Path) -> None:
    """In float64, with a central difference: its own error is about 1e-6 of the result."""
    _, params = build(tmp_path, name, torch.float64)
    tangent = direction(params)
    logits, got = pushed(lambda p: folo.model.forward(p, IDS), params, tangent)
    assert logits.dtype == got.dtype == torch.float64
    assert torch.equal(logits, folo.model.forward(params, IDS))
    step = 1e-5
    ahead, behind = (
        folo.model.forward(tree_map(lambda p, t, h=h: p + h * t, params, tangent), IDS) for h in (step, -step)
    )
    check_close(got, (ahead - behind) / (2 * step), 1e-5)


def test_jvp_sees_every_weight(tmp_path: Path) -> None:
    """The derivative along one leaf at a time is the finite difference, and is not zero."""
    _, params = build(tmp_path, "qwen3", torch.float64)
    leaves, spec = pytree.tree_flatten(params)
    generator = torch.Generator().manual_seed(0)
    for number, (path, leaf) in enumerate(pytree.tree_leaves_with_path(params)):
        tangent = torch.randn(leaf.shape, generator=generator, dtype=leaf.dtype)

        def along(moved: Tensor, number: int = number) -> Tensor:
            return folo.model.forward(
                pytree.tree_unflatten([*leaves[:number], moved, *leaves[number + 1 :]], spec), IDS
            )

        _, got = pushed(along, leaf, tangent)
        check_close(got, (along(leaf + 1e-5 * tangent) - along(leaf - 1e-5 * tangent)) / 2e-5, 1e-5, path)


def test_forward_mode_autograd_is_jvp(tmp_path: Path) -> None:
    _, params = build(tmp_path)
    tangent = direction(params)
    _, expected = pushed(lambda p: folo.model.forward(p, IDS), params, tangent)
    with forward_ad.dual_level():
        dual = tree_map(forward_ad.make_dual, params, tangent)
        got = forward_ad.unpack_dual(folo.model.forward(dual, IDS)).tangent
    assert got is not None
    assert torch.equal(got, expected)


class OpaqueOps(TorchDispatchMode):
    """Names of the `folo` ops that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.called: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "folo":
            self.called.add(func.name())
        return func(*args, **(kwargs or {}))


def test_an_opaque_op_never_meets_a_transform(tmp_path: Path) -> None:
    """A kernel has no derivative: to jvp its output would be a constant, without a word."""
    _, params = build(tmp_path)
    tangent = direction(params)
    with OpaqueOps() as plain:
        folo.model.forward(params, IDS)
    assert "folo::linear" in plain.called
    with OpaqueOps() as transformed:
        grad(loss)(params)
        jvp(loss, (params,), (tangent,))
        vmap(lambda ids: folo.model.forward(params, ids))(IDS[None])
        loss(tree_map(lambda leaf: leaf.clone().requires_grad_(), params)).backward()
        with forward_ad.dual_level():
            loss(tree_map(forward_ad.make_dual, params, tangent))
    assert not transformed.called


def test_jacobians_forward_and_reverse_agree(tmp_path: Path) -> None:
    _, params = build(tmp_path, "qwen3", torch.float64)

    def last_logits(q_norm: Tensor) -> Tensor:
        leaves, spec = pytree.tree_flatten(params)
        first = next(n for n, leaf in enumerate(leaves) if leaf is params.layers[0].q_norm)
        return folo.model.forward(
            pytree.tree_unflatten([*leaves[:first], q_norm, *leaves[first + 1 :]], spec), IDS[:9]
        )[-1]

    q_norm = params.layers[0].q_norm
    assert q_norm is not None
    forwards, backwards = jacfwd(last_logits)(q_norm), jacrev(last_logits)(q_norm)
    assert forwards.shape == (50, 8)
    check_close(forwards, backwards, 1e-10)


# --- vmap


def test_vmap_over_stacked_params_gives_each_models_logits(tmp_path: Path) -> None:
    """To 1e-5: the products of three models are one batched product, of another kernel."""
    for name in ("qwen2", "qwen3"):
        models = [build(tmp_path / f"{name} {seed}", name, seed=seed)[1] for seed in range(3)]
        stacked = tree_map(lambda *leaves: torch.stack(leaves), *models)
        got = vmap(lambda p: folo.model.forward(p, IDS))(stacked)
        for logits, params in zip(got, models, strict=True):
            check_close(logits, folo.model.forward(params, IDS), 1e-5)
        gradients = vmap(grad(loss))(stacked)
        for number, params in enumerate(models):
            one = tree_map(lambda leaf, number=number: leaf[number], gradients)
            for a, b in zip(pytree.tree_leaves(one), pytree.tree_leaves(grad(loss)(params)), strict=True):
                check_close(a, b, 1e-4)


@pytest.mark.no_cover
def test_a_compiler_makes_one_graph_of_a_transform(tmp_path: Path) -> None:
    tiny_checkpoint(tmp_path, "qwen3", num_hidden_layers=1, **SMALL)
    params = folo.load(tmp_path, dtype=torch.float32, pack=False, use_tqdm=False)
    ones = tree_map(torch.ones_like, params)

    def check(compiled: Callable[..., Any], function: Callable[..., Any], ids: Tensor) -> None:
        results = (pytree.tree_leaves(run(params, ids)) for run in (compiled, function))
        for got, expected in zip(*results, strict=True):
            assert torch.equal(got, expected)

    def as_one_graph(function: Callable[..., Any]) -> Callable[..., Any]:
        return torch.compile(function, fullgraph=True, backend="eager")

    def autograd(loss: Callable[..., Tensor], params: folo.Params, ids: Tensor) -> Any:
        params = tree_map(lambda leaf: leaf.detach().requires_grad_(), params)
        return torch.autograd.grad(loss(params, ids), pytree.tree_leaves(params))

    gradients = as_one_graph(grad(loss))
    check(gradients, grad(loss), IDS[:9])
    check(gradients, grad(loss), IDS[:6])  # another length is another graph
    for function in (
        lambda params, ids: jvp(lambda params: loss(params, ids), (params,), (ones,)),
        lambda params, ids: vmap(folo.model.forward, (None, 0))(params, ids.view(3, -1)),
    ):
        check(as_one_graph(function), function, IDS[:6])
    check(partial(autograd, as_one_graph(loss)), partial(autograd, loss), IDS[:6])


def test_vmap_over_prompts_gives_each_prompts_logits_and_gradients(tmp_path: Path) -> None:
    _, params = build(tmp_path)
    prompts = torch.stack([IDS, IDS.flip(0), (IDS + 7) % 50])
    got = vmap(lambda ids: folo.model.forward(params, ids))(prompts)
    for logits, ids in zip(got, prompts, strict=True):
        check_close(logits, folo.model.forward(params, ids), 1e-5)
    gradients = vmap(grad(loss), in_dims=(None, 0))(params, prompts)
    for number, ids in enumerate(prompts):
        check_close(gradients.embed[number], grad(loss)(params, ids).embed, 1e-4)
