"""GPTQ does what the paper says, always the same, and its checkpoints appear whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from prompts import TEXTS
from torch import Tensor

import folo
from folo import cli, quant
from folo.model.forward import embedded, logits
from folo.model.params import Linear, layers_with_next_norm
from folo.ops.quantized import Grouped, Quantized, quantized
from folo.quant import decoder
from folo.quant.gptq import gptq, relative_error
from folo.quant.write import write

CALIBRATION = [[(7 * n + 3 * s) % 297 + 3 for n in range(48)] for s in range(6)]
CONFIGS = [
    quant.QuantConfig(group_size=32),
    quant.QuantConfig(group_size=32, sym=False),
    quant.QuantConfig(group_size=48, desc_act=True),
    quant.QuantConfig(bits=2, group_size=-1, sym=False, desc_act=True),
    quant.QuantConfig(bits=8, group_size=16),
]


def problem(n: int = 24, k: int = 160, rows: int = 400) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated inputs, float64."""
    numbers = torch.Generator().manual_seed(n + k)
    weight = torch.randn(n, k, generator=numbers, dtype=torch.float64)
    mix = torch.randn(k // 4, k, generator=numbers, dtype=torch.float64)
    x = torch.randn(rows, k // 4, generator=numbers, dtype=torch.float64) @ mix
    x = x + 0.3 * torch.randn(rows, k, generator=numbers, dtype=torch.float64)
    return weight, x.t() @ x


def plain(weight: Grouped) -> Tensor:
    return quantized(weight).plain(torch.float64)


def rounded(weight: Tensor, config: quant.QuantConfig, part: float = 1) -> Tensor:
    """Rounding to nearest, group by group, in numpy, with scales that reach a part of the range."""
    rows, most = weight.numpy(), 2**config.bits - 1
    out, size = np.empty_like(rows), rows.shape[1] if config.group_size == -1 else config.group_size
    for start in range(0, rows.shape[1], size):
        group = rows[:, start : start + size]
        low, high = part * np.minimum(group.min(1), 0), part * np.maximum(group.max(1), 0)
        scale = 2 * np.maximum(-low, high) / most if config.sym else (high - low) / most
        scale = scale.astype(np.float16).astype(np.float64)[:, None]
        zero = np.full_like(scale, 2 ** (config.bits - 1)) if config.sym else np.rint(-low[:, None] / scale)
        codes = np.clip(np.rint(group / scale + zero), 0, most)
        out[:, start : start + size] = (codes - zero) * scale
    return torch.from_numpy(out)


def one_by_one(weight: Tensor, hessian: Tensor, config: quant.QuantConfig) -> Tensor:
    """The paper's equations 2 and 3 as they stand: after each column, all others move, and the inverse of the
    Hessian loses a row and a column. Groups have to be ready when they begin, and no order is changed."""
    weight, k = weight.clone(), weight.shape[1]
    damp = config.damp * hessian.diagonal().mean() * torch.eye(k, dtype=torch.float64)
    inverse = torch.linalg.inv(hessian + damp)
    out, scale, zero = torch.empty_like(weight), torch.empty(0), torch.empty(0)
    for i in range(k):
        if i % config.group_size == 0:
            group = weight[:, i : i + config.group_size]
            scale = (2 * group.abs().amax(1) / (2**config.bits - 1)).half().double()
            zero = torch.full_like(scale, 2 ** (config.bits - 1))
        code = torch.round(weight[:, i] / scale + zero).clamp(0, 2**config.bits - 1)
        out[:, i] = (code - zero) * scale
        error = (weight[:, i] - out[:, i]) / inverse[i, i]
        weight -= error[:, None] * inverse[i]
        inverse = inverse - inverse[:, i, None] * inverse[i] / inverse[i, i]
        inverse[i, i] = 1
    return out


@pytest.mark.parametrize("config", [c for c in CONFIGS if not c.desc_act], ids=str)
def test_without_correlation_it_is_rounding_to_nearest(config: quant.QuantConfig) -> None:
    weight, _ = problem()
    config = replace(config, clip=False)
    assert torch.equal(plain(gptq(weight, torch.eye(160), config)), rounded(weight, config))


@pytest.mark.parametrize("sym", [False, True])
def test_a_range_is_clipped_where_that_loses_less(sym: bool) -> None:
    """Without correlation, a row gets the scale that makes the sum of its squared errors least."""
    config = quant.QuantConfig(group_size=-1, sym=sym)
    weight, _ = problem(k=64)
    weight[::2, 5] *= 3
    tried = [rounded(weight, config, part / 80) for part in range(80, 40, -1)]
    lost = torch.stack([(weight - each).square().sum(1) for each in tried])
    assert (lost.argmin(0) > 0).any()
    found = (weight - plain(gptq(weight, torch.eye(64), config))).square().sum(1)
    assert torch.allclose(found, lost.amin(0), rtol=1e-12)


def test_what_a_scale_loses_is_weighed_by_the_hessian() -> None:
    """A large weight is clipped where its input is nearly never there, and not where all inputs are alike."""
    weight, hessian = problem(k=64)
    weight[:, 5] = 20
    hessian[5], hessian[:, 5] = 0, 0
    hessian[5, 5] = 1e-6
    config = quant.QuantConfig(group_size=-1)
    whole, found = (gptq(weight, hessian, each) for each in (replace(config, clip=False), config))
    assert (found.scales < 0.75 * whole.scales).all()
    assert (gptq(weight, torch.eye(64), config).scales > 0.75 * whole.scales).all()
    assert relative_error(weight, plain(found), hessian) < relative_error(weight, plain(whole), hessian)


@pytest.mark.parametrize("group_size", [16, 32, 160])
def test_blocks_and_lazy_updates_are_the_papers_equations(group_size: int) -> None:
    config = quant.QuantConfig(group_size=group_size, clip=False)
    weight, hessian = problem()
    assert torch.allclose(
        plain(gptq(weight, hessian, config)), one_by_one(weight, hessian, config), atol=1e-9
    )


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_it_loses_less_than_rounding_to_nearest(config: quant.QuantConfig) -> None:
    weight, hessian = problem()
    nearest = plain(gptq(weight, torch.eye(160), config))
    found = relative_error(weight, plain(gptq(weight, hessian, config)), hessian)
    assert found < 0.6 * relative_error(weight, nearest, hessian)


def test_the_order_of_activations_is_that_of_the_diagonal() -> None:
    weight, hessian = problem(k=96)
    found = gptq(weight, hessian, quant.QuantConfig(group_size=32, desc_act=True))
    assert torch.equal(torch.bincount(found.groups), torch.tensor([32, 32, 32]))
    largest = [hessian.diagonal()[found.groups == group] for group in range(3)]
    assert largest[0].min() >= largest[1].max() >= largest[1].min() >= largest[2].max()


@pytest.mark.parametrize("sym", [False, True])
def test_inputs_that_are_never_there_and_weights_that_are_zero(sym: bool) -> None:
    weight, hessian = problem(k=64)
    hessian[5], hessian[:, 5] = 0, 0
    weight[3] = 0
    weight[4] = weight[4].abs()
    found = gptq(weight, hessian, quant.QuantConfig(group_size=32, sym=sym))
    assert plain(found).isfinite().all()
    assert not plain(found)[3].any()
    assert (found.zeros >= 1).all(), "format gptq has no place for 0"
    assert relative_error(weight[4:5], plain(found)[4:5], hessian) < 0.02


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_a_model_is_quantised_layer_by_layer(config: quant.QuantConfig, tiny: folo.Params) -> None:
    reported: list[tuple[str, float]] = []
    params = quant.quantize(
        tiny, CALIBRATION, config, use_tqdm=False, report=lambda *each: reported.append(each)
    )
    names = [f"model.layers.{i}.{name}" for i in range(2) for name in ("qkv", "out", "gate_up", "down")]
    assert [name for name, _ in reported] == names
    assert all(0 < error < (0.5 if config.bits == 2 else 0.1) for _, error in reported)
    for layer in params.layers:
        for linear in (layer.qkv, layer.out, layer.gate_up, layer.down):
            assert isinstance(linear.weight, Quantized)
            assert (linear.weight.bits, linear.weight.group_size) == (config.bits, config.group_size)
    assert params.embed is tiny.embed
    ids = torch.tensor(CALIBRATION[0])
    assert folo.model.forward(params, ids).isfinite().all()


def test_layers_are_fitted_to_what_the_model_computes(tiny: folo.Params) -> None:
    """While nothing is rounded, the sequences that pass through the layers are those of `forward`."""
    inputs: dict[str, list[Tensor]] = {}

    def quantised(name: str, linear: Linear, rows: Sequence[Tensor]) -> Linear:
        inputs[name] = list(rows)
        return linear

    streams = [
        embedded(tiny, torch.tensor(ids), torch.arange(len(ids)), tiny.inv_freq) for ids in CALIBRATION
    ]
    for layer, next_norm in layers_with_next_norm(tiny):
        _, streams = decoder.quantised_layer(tiny.config, layer, next_norm, streams, quantised)
    for ids, (x, _, _) in zip(CALIBRATION, streams, strict=True):
        assert torch.equal(logits(tiny, x), folo.model.forward(tiny, torch.tensor(ids)))
    assert [rows.shape for rows in inputs["down"]] == [(48, 128)] * len(CALIBRATION)


def test_tokens_count_alike_but_the_first_which_all_attend_to() -> None:
    numbers = torch.Generator().manual_seed(0)
    inputs = [torch.randn(n, 20, generator=numbers) * 10.0**scale for n, scale in ((48, 6), (3, 0))]
    inputs[0][7] = 0
    expected = torch.zeros(20, 20, dtype=torch.float64)
    for rows, first in zip(inputs, (48 / 8, 1), strict=True):
        for place, row in enumerate(rows.double()):
            square = row.square().mean()
            if square:
                expected += torch.outer(row, row) / square * (first if place == 0 else 1)
    assert torch.allclose(decoder.hessian(inputs), expected, rtol=1e-5, atol=1e-4)


def test_the_same_input_gives_the_same_bytes(tiny: folo.Params, threads: None) -> None:
    found = set()
    for count in (1, 2, 1):
        torch.set_num_threads(count)
        found.add(quant.quantize(tiny, CALIBRATION, CONFIGS[0], use_tqdm=False).fingerprint)
    assert len(found) == 1


def test_torchs_defaults_have_no_say(tiny: folo.Params) -> None:
    """Deterministic: the arguments alone decide, not what the caller's own tensors are by default."""

    def found() -> list[str]:
        fitted = quant.quantize(tiny, CALIBRATION[:1], CONFIGS[0], use_tqdm=False)
        return [fitted.fingerprint, quant.nearest(tiny, CONFIGS[0], use_tqdm=False).fingerprint]

    expected = found()
    with torch.device("meta"):
        assert found() == expected
    torch.set_default_dtype(torch.float64)
    try:
        assert found() == expected
    finally:
        torch.set_default_dtype(torch.float32)


def test_rounding_a_model_to_nearest_is_fitted_to_nothing(tiny: folo.Params) -> None:
    weight = tiny.layers[1].down.weight
    assert not isinstance(weight, Tensor)
    config = replace(CONFIGS[0], clip=False)
    rough = quant.nearest(tiny, config, use_tqdm=False).layers[1].down.weight
    assert isinstance(rough, Quantized)
    dense = weight.plain()  # pyright: ignore[reportAttributeAccessIssue]
    assert torch.equal(rough.plain(torch.float64), rounded(dense.double(), config))


class TestBadInput:
    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"bits": 3}, "bits=3: expected one of 2, 4, 8"),
            ({"bits": 4.0}, "bits=4.0: expected one of 2, 4, 8"),
            ({"group_size": 0}, "group_size=0"),
            ({"group_size": 32.0}, "group_size=32.0: expected a positive integer, or -1"),
            ({"group_size": True}, "group_size=True"),
            ({"damp": 0.0}, r"damp=0.0"),
            ({"damp": "0.1"}, "damp='0.1': expected a number between 0 and 1"),
            ({"sym": 0}, "sym=0: expected True or False"),
            ({"clip": "no"}, "clip='no': expected True or False"),
        ],
    )
    def test_configuration(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(folo.ConfigError, match=message):
            quant.QuantConfig(**values)

    @pytest.mark.parametrize(
        ("calibration", "message"),
        [
            ([], "no calibration sequence"),
            ([1, 2, 3], "sequence 0 is 1: expected a list of lists"),
            ([[3, 4], []], "sequence 1 has 0 tokens: expected 1 to 256"),
            ([[3] * 257], "sequence 0 has 257 tokens"),
            ([[3, 300]], "sequence 0 has a token beyond the 300 known ones"),
        ],
    )
    def test_calibration(self, calibration: list[Any], message: str, tiny: folo.Params) -> None:
        with pytest.raises(folo.ConfigError, match=message):
            quant.quantize(tiny, calibration)

    def test_weights_that_are_quantised_already(self, tiny: folo.Params) -> None:
        once = quant.nearest(tiny, CONFIGS[0], use_tqdm=False)
        with pytest.raises(folo.ConfigError, match="quantised already"):
            quant.quantize(once, CALIBRATION)


class TestCalibrationText:
    def test_the_default_is_prose_of_some_length(self) -> None:
        text = quant.default_text()
        assert 150_000 < len(text) < 160_000
        assert text.startswith("This document is a collection of slang terms")

    def test_it_is_cut_into_whole_runs(self, tiny_dir: Path) -> None:
        tokenizer = folo.load_tokenizer(str(tiny_dir))
        text = "the cat and the hat in the end"
        ids = tokenizer.encode(text)
        assert quant.sequences(tokenizer, text, 5) == [ids[i : i + 5] for i in range(0, len(ids) - 4, 5)]
        assert quant.sequences(tokenizer, text, 5, count=1) == [ids[:5]]
        assert quant.sequences(tokenizer, text, 500) == [ids]
        with pytest.raises(folo.ConfigError, match="is empty"):
            quant.sequences(tokenizer, "", 5)


class TestCommand:
    @pytest.fixture
    def text(self, tmp_path: Path) -> Path:
        (tmp_path / "calibration.txt").write_text(" ".join(TEXTS[:4]) * 20)
        return tmp_path / "calibration.txt"

    def run(self, *arguments: object) -> int:
        return cli.main(["quantize", *map(str, arguments)])

    def test_writes_a_checkpoint(
        self, tiny_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        paths = [tmp_path / "a", tmp_path / "b"]
        for path in paths:
            options = ("--calibration", text, "--group-size", 32, "--desc-act", "--asym")
            assert self.run(tiny_dir, *options, "--out", path) == 0
        shown = capsys.readouterr()
        results = shown.out.splitlines()
        assert [line.partition(":")[0] for line in results] == [f"wrote {path}" for path in paths]
        assert "model.layers.1.down " in shown.err
        files = sorted(file.name for file in paths[0].iterdir())
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(files)
        for name in files:
            assert (paths[0] / name).read_bytes() == (paths[1] / name).read_bytes(), name
        found = json.loads((paths[0] / "config.json").read_text())["quantization_config"]
        assert (found["bits"], found["group_size"], found["desc_act"], found["sym"]) == (4, 32, True, False)
        assert folo.load(paths[0], use_tqdm=False).quantized
        assert folo.load_tokenizer(str(paths[0])).encode("the cat")
        assert not list(tmp_path.glob(".*"))

    def test_to_nearest_nothing_is_clipped(self, tiny_dir: Path, tiny: folo.Params, tmp_path: Path) -> None:
        assert self.run(tiny_dir, "--nearest", "--out", tmp_path / "a") == 0
        found = folo.load(tmp_path / "a", use_tqdm=False).fingerprint
        assert found == quant.nearest(tiny, use_tqdm=False).fingerprint
        assert found != quant.nearest(tiny, quant.QuantConfig(), use_tqdm=False).fingerprint

    def test_refuses_what_is_there(self, tiny_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert self.run(tiny_dir, "--nearest", "--out", tiny_dir) == 2
        assert "is there already" in capsys.readouterr().err

    def test_refuses_a_place_that_cannot_be_written_to_before_the_work(
        self, tiny_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("os.access", lambda path, mode: False)
        assert self.run(tiny_dir, "--nearest", "--out", tiny_dir / "new") == 2
        assert capsys.readouterr().err == f"folo: error: {tiny_dir} cannot be written to\n"

    def test_refuses_a_place_that_is_none(
        self, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(tiny_dir, "--nearest", "--out", tmp_path / "no" / "where") == 2
        assert "is no directory" in capsys.readouterr().err

    def test_a_text_that_cannot_be_read(
        self, tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert self.run(tiny_dir, "--calibration", tmp_path / "none", "--out", tmp_path / "a") == 2
        assert "No such file" in capsys.readouterr().err

    def test_what_fails_leaves_nothing(self, tiny: folo.Params, tmp_path: Path) -> None:
        class Tokenizer:
            def save_pretrained(self, path: Path) -> None:
                assert (path / "model.safetensors").exists()
                raise OSError("disk full")

        with pytest.raises(OSError, match="disk full"):
            write(quant.nearest(tiny, CONFIGS[0], use_tqdm=False), Tokenizer(), tmp_path / "a")
        assert not list(tmp_path.iterdir())
