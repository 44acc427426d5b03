"""A model's linear layers quantised in order, each for the inputs that it gets from those before it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from folo import ops
from folo.errors import ConfigError
from folo.model.config import DecoderConfig
from folo.model.forward import embedded
from folo.model.params import LINEARS, Layer, Linear, Params, layers_with_next_norm
from folo.ops import kv_cache
from folo.ops.packed import Packed
from folo.ops.stacked import Weight
from folo.quant.gptq import QuantConfig, gptq, relative_error

_SINK = 1 / 8  # of a sequence's tokens: as many as its first one counts for
_BLOCK = 16  # tokens: K and V of a calibration sequence lie in blocks, the only layout of the attention op

# report(layer's name, relative error of its output)
Report = Callable[[str, float], None]


@torch.no_grad()
def quantize(
    params: Params,
    calibration: Sequence[Sequence[int]],
    config: QuantConfig | None = None,
    use_tqdm: bool = True,
    report: Report | None = None,
) -> Params:
    """The same decoder with its layers' linear weights quantised by GPTQ; embeddings, norms, biases and the
    output layer as they were.

    Deterministic on one machine: the arguments alone decide the result.

    Args:
        params: dense, packed or not, on the CPU.
        calibration: token ids of some sequences, such as 64 of 512: what the layers are fitted to.
        config: 4 bits in groups of 128, symmetric, if None.
        use_tqdm: show a progress bar.
        report: called with each layer's name and the part of its output's energy that is lost.

    Raises:
        ConfigError: params are quantised already, or not on the CPU; or there is no sequence, an empty one,
            one that is longer than the model allows, or one with a token that it does not have.
    """
    config = config or QuantConfig()
    _check(params)
    _check_calibration(params, calibration)
    layers: list[Layer] = []
    progress = tqdm(total=len(params.layers), desc="Quantizing", unit="layer", disable=not use_tqdm)
    with torch.device("cpu"), progress:  # whatever torch.set_default_device says
        streams = [
            embedded(params, ids, torch.arange(len(ids)), params.inv_freq)
            for ids in map(torch.tensor, calibration)
        ]
        for index, (layer, next_norm) in enumerate(layers_with_next_norm(params)):

            def quantised(name: str, linear: Linear, inputs: Sequence[Tensor], index: int = index) -> Linear:
                weight, products = _plain(linear.weight), hessian(inputs)
                found = ops.quantized(gptq(weight, products, config))
                error = relative_error(weight, found.plain(), products)
                progress.set_postfix_str(f"{name} error {error:.1e}")
                if report is not None:
                    report(f"model.layers.{index}.{name}", error)
                return Linear(found, linear.bias)

            layer, streams = quantised_layer(params.config, layer, next_norm, streams, quantised)
            layers.append(layer)
            progress.update()
    return replace(params, layers=tuple(layers))


@torch.no_grad()
def nearest(params: Params, config: QuantConfig | None = None, use_tqdm: bool = True) -> Params:
    """`quantize` without calibration: every weight rounded to nearest. Raises ConfigError as that does.

    config: 4 bits in groups of 128, symmetric, not clipped, if None. Clipping could only go by the plain
    squared error here, and a model clipped by that predicts worse.
    """
    config = config or QuantConfig(clip=False)
    _check(params)

    def quantised(linear: Linear) -> Linear:
        weight = _plain(linear.weight)
        return Linear(ops.quantized(gptq(weight, torch.eye(weight.shape[1]), config)), linear.bias)

    with torch.device("cpu"):
        layers = [
            replace(layer, **{name: quantised(getattr(layer, name)) for name in LINEARS})
            for layer in tqdm(params.layers, desc="Rounding", unit="layer", disable=not use_tqdm)
        ]
    return replace(params, layers=tuple(layers))


# x (normalised), residual `[T, D]` and angles `[T, E]` of a sequence
_Stream = tuple[Tensor, Tensor, Tensor]


def quantised_layer(
    config: DecoderConfig,
    layer: Layer,
    next_norm: Tensor,
    streams: Sequence[_Stream],
    quantised: Callable[[str, Linear, Sequence[Tensor]], Linear],
) -> tuple[Layer, list[_Stream]]:
    """`decoder_layer` over all sequences, each weight quantised when its inputs are known."""
    eps = config.rms_norm_eps
    qkv = quantised("qkv", layer.qkv, [x for x, _, _ in streams])
    attended = [
        _attended(config, layer, ops.linear(x, qkv.weight, qkv.bias), angles) for x, _, angles in streams
    ]
    out = quantised("out", layer.out, attended)
    middle = [
        ops.add_rms_norm(ops.linear(x, out.weight, out.bias), residual, layer.post_norm, eps)
        for x, (_, residual, _) in zip(attended, streams, strict=True)
    ]
    gate_up = quantised("gate_up", layer.gate_up, [x for x, _ in middle])
    gated = [ops.gated_linear(x, gate_up.weight, gate_up.bias) for x, _ in middle]
    down = quantised("down", layer.down, gated)
    after = [
        (*ops.add_rms_norm(ops.linear(x, down.weight, down.bias), residual, next_norm, eps), angles)
        for x, (_, residual), (_, _, angles) in zip(gated, middle, streams, strict=True)
    ]
    return replace(layer, qkv=qkv, out=out, gate_up=gate_up, down=down), after


def _attended(config: DecoderConfig, layer: Layer, qkv: Tensor, angles: Tensor) -> Tensor:
    """Attention of one sequence to itself: qkv `[T, (Hq + 2 Hkv) E]` -> `[T, Hq E]`."""
    length = qkv.shape[0]
    num_blocks = -(-length // _BLOCK)
    shape = (1, num_blocks, _BLOCK, config.num_kv_heads, config.head_dim)
    (k,), (v,) = kv_cache.zeros(shape, qkv.dtype, qkv.device)
    slots, tables = torch.arange(length), torch.arange(num_blocks, dtype=torch.int32)[None]
    norms = layer.q_norm, layer.k_norm
    q = ops.qk_norm_rope_write(qkv, angles, *norms, config.rms_norm_eps, k, v, slots)
    start = torch.tensor([0, length], dtype=torch.int32)
    return ops.paged_attention(q, k, v, tables, start, start[1:], config.head_dim**-0.5).flatten(1)


def hessian(inputs: Sequence[Tensor]) -> Tensor:
    """The sum of x xᵀ over the rows `[K]` of sequences `[T, K]`, each of mean square 1, float64 `[K, K]`.

    Rows are normalised, since a few tokens have activations a thousand times those of others (Sun et al.
    2024, https://arxiv.org/abs/2402.17762) and would be all that counts. The first token of a sequence counts
    as T / 8 tokens, at least one: all later ones attend to it, whatever it is (attention sinks, Xiao et al.
    2023, https://arxiv.org/abs/2309.17453), and as a single token it would be given the errors that cost more
    elsewhere. Computed by ops whose bits do not depend on the number of threads.
    """
    total = torch.zeros((), dtype=torch.float64)
    for rows in map(torch.Tensor.float, inputs):
        rows = ops.rms_norm(rows, torch.ones(rows.shape[1], dtype=rows.dtype), 0.0).nan_to_num()
        rows[0] *= max(1.0, len(rows) * _SINK) ** 0.5
        columns = rows.t().contiguous()
        total = total + ops.linear(columns, columns).double()
    return total


def _plain(weight: Weight) -> Tensor:
    assert isinstance(weight, Packed | Tensor)
    return weight.plain() if isinstance(weight, Packed) else weight


def _check(params: Params) -> None:
    if params.quantized:
        raise ConfigError("the weights are quantised already: load the dense model")
    if params.device.type != "cpu":
        raise ConfigError(
            f"the weights are on {params.device}: folo.load(..., device='cpu') to quantise them"
        )


def _check_calibration(params: Params, calibration: Sequence[Sequence[int]]) -> None:
    limit, vocab_size = params.config.max_position_embeddings, params.config.vocab_size
    if not calibration:
        raise ConfigError("there is no calibration sequence")
    for number, ids in enumerate(calibration):
        if not hasattr(ids, "__len__"):
            raise ConfigError(
                f"calibration sequence {number} is {ids!r}: expected a list of lists of token ids"
            )
        if not 0 < len(ids) <= limit:
            raise ConfigError(f"calibration sequence {number} has {len(ids)} tokens: expected 1 to {limit}")
        if not all(0 <= token < vocab_size for token in ids):
            raise ConfigError(f"calibration sequence {number} has a token beyond the {vocab_size} known ones")
