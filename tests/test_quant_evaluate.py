"""Perplexity is transformers' on the same windows, and what is compared is what it is called."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoints import tiny_checkpoint
from engine import prompt
from transformers import AutoModelForCausalLM

import folo
from folo import cli, quant
from folo.quant import command


def reference(path: Path, ids: list[int], window: int, stride: int) -> tuple[float, int]:
    """Nats per token and tokens, by transformers in float32."""
    model = AutoModelForCausalLM.from_pretrained(path).float().eval()
    losses: list[float] = []
    start = 0
    while len(losses) < len(ids) - 1:
        some = torch.tensor(ids[start : start + window])
        with torch.no_grad():
            logprobs = model(some[None]).logits[0].log_softmax(-1)
        own = -logprobs[:-1].gather(1, some[1:, None])[:, 0]
        losses += own[len(losses) - start :].tolist()
        start += stride
    return sum(losses) / len(losses), len(losses)


@pytest.mark.parametrize(
    ("length", "window", "stride"),
    [(2, 256, 10), (100, 100, 50), (101, 100, 50), (300, 64, 48), (300, 200, 1)],
)
def test_perplexity_is_transformers(
    length: int, window: int, stride: int, tiny: folo.Params, tiny_dir: Path
) -> None:
    ids = prompt(length)
    found = quant.perplexity(tiny, ids, window, stride, use_tqdm=False)
    nats, tokens = reference(tiny_dir, ids, window, stride)
    assert found.tokens == tokens == length - 1
    assert found.nats == pytest.approx(nats, abs=1e-4)
    assert found.value == math.exp(found.nats)


@pytest.mark.parametrize(
    ("ids", "window", "stride", "message"),
    [
        ([3], 8, 4, "the text has 1 tokens"),
        ([3, 4, 5], 257, 4, "window=257: expected 2 to 256"),
        ([3, 4, 5], 1, 1, "window=1"),
        ([3, 4, 5], 8, 8, "stride=8: expected 1 to 7"),
        ([3, 4, 5], 8, 0, "stride=0"),
    ],
)
def test_what_cannot_be_evaluated(
    ids: list[int], window: int, stride: int, message: str, tiny: folo.Params
) -> None:
    with pytest.raises(folo.ConfigError, match=message):
        quant.perplexity(tiny, ids, window, stride)


@pytest.mark.parametrize("ids", [[3, 4, 300], [3, 4, -1], [300, 3, 4], [3] * 20 + [300]])
def test_an_unknown_token_is_refused_even_the_last_one(ids: list[int], tiny: folo.Params) -> None:
    for measure in (quant.perplexity, partial(quant.compare, tiny)):
        with pytest.raises(folo.ConfigError, match=r"token id (300|-1) is outside the model's vocabulary"):
            measure(tiny, ids, 8, 4, use_tqdm=False)


def test_a_model_is_at_no_distance_from_itself(tiny: folo.Params) -> None:
    ids = prompt(90)
    found = quant.compare(tiny, tiny, ids, 64, 32, use_tqdm=False)
    assert (found.kl, found.agreement) == (0, 1)
    assert found.first == found.second
    assert found.first.nats == pytest.approx(quant.perplexity(tiny, ids, 64, 32, use_tqdm=False).nats)


def test_distances_are_those_of_the_distributions(tiny: folo.Params) -> None:
    other = quant.nearest(tiny, quant.QuantConfig(bits=2, group_size=32), use_tqdm=False)
    ids = prompt(50)
    found = quant.compare(tiny, other, ids, 256, 32, use_tqdm=False)
    p, q = (folo.model.forward(params, torch.tensor(ids))[:-1].double() for params in (tiny, other))
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    targets = torch.tensor(ids[1:])[:, None]
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(1).mean()), rel=1e-4)
    assert found.agreement == pytest.approx(float((p.argmax(1) == q.argmax(1)).double().mean()))
    assert found.first.nats == pytest.approx(-float(p.gather(1, targets).mean()), rel=1e-5)
    assert found.second.nats == pytest.approx(-float(q.gather(1, targets).mean()), rel=1e-5)
    assert found.kl > 0.001


class TestCommand:
    @pytest.fixture
    def text(self, tmp_path: Path) -> Path:
        (tmp_path / "text.txt").write_text("the cat and the hat and the other thing " * 10)
        return tmp_path / "text.txt"

    def test_ppl(self, tiny_dir: Path, text: Path, capsys: pytest.CaptureFixture[str]) -> None:
        options = ["--text", str(text), "--window", "64", "--stride", "32"]
        assert cli.main(["eval", "ppl", str(tiny_dir), *options]) == 0
        lines = capsys.readouterr().out.splitlines()
        ids = folo.load_tokenizer(str(tiny_dir)).encode(text.read_text())
        found = quant.perplexity(folo.load(tiny_dir, use_tqdm=False), ids, 64, 32, use_tqdm=False)
        assert lines[0].split() == ["perplexity", f"{found.value:.4f}"]
        assert lines[1].split()[-1] == f"{found.nats:.6f}"
        assert lines[2].split()[1] == f"{found.tokens:,},"

    def test_compare(
        self, tiny_dir: Path, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        small = str(tmp_path / "small")
        assert cli.main(["quantize", str(tiny_dir), "--nearest", "--group-size", "32", "--out", small]) == 0
        capsys.readouterr()
        options = ["--text", str(text), "--window", "64", "--stride", "32"]
        assert cli.main(["eval", "compare", str(tiny_dir), small, *options]) == 0
        out = capsys.readouterr().out
        for name in ("perplexity", "nats per token", "weights", "decode tokens/s"):
            assert f"\n{name}" in out
        assert "KL 0.0" in out
        assert "same likeliest token" in out

    def test_the_pace_is_that_of_the_tokens_there_were(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A short model has no room for as many as are asked for."""
        tiny_checkpoint(tmp_path, "llama", max_position_embeddings=96)
        clock = SimpleNamespace(perf_counter=iter([1.0, 3.0]).__next__)
        monkeypatch.setattr(command, "time", clock)
        assert command._pace(folo.load(tmp_path, use_tqdm=False), [5] * 100) == (96 - 64 - 1) / 2
