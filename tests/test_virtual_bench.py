"""`folo bench gpu`'s parts on a virtual CUDA device: every line of theirs that a GPU run takes."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import virtual_cuda
from virtual_tensors import VirtualCuda

from folo import cli
from folo.bench import cells, gptq, gpu, graph, invariance, serving, workloads
from folo.bench.kernels import SHAPES
from folo.bench.peers import folo_peer
from folo.model.export import export

TINY = replace(
    workloads.QWEN3_600M,
    vocab_size=300,
    hidden_size=64,
    intermediate_size=128,
    num_layers=1,
    num_heads=4,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=1024,
)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, reference_ops: None) -> Iterator[VirtualCuda]:
    for module in (workloads, invariance):
        monkeypatch.setattr(module, "QWEN3_600M", TINY)
    profile, cpu = torch.profiler.profile, torch.profiler.ProfilerActivity.CPU  # of no other is there any
    monkeypatch.setattr(
        torch.profiler, "profile", lambda activities, **options: profile(activities=[cpu], **options)
    )
    with virtual_cuda.entered() as device:
        yield device


def result(name: str, folder: Path, *options: str) -> dict[str, Any]:
    """What a benchmark writes about a run."""
    path = folder / "result.json"
    cli.main(["bench", name, *options, "--json", str(path)])
    return json.loads(path.read_text())


def test_latency(device: VirtualCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(serving, "workload", lambda name, vocab_size: [([5] * 20, 9)])
    found = result("latency", tmp_path, "--shape", "qwen3-0.6b", "--repeats", "1")
    assert found["environment"]["backend"] == "triton"
    assert found["environment"]["gpu"] == "virtual"
    assert [run["num_output"] for run in found["results"]["latency"]] == [9]


def test_throughput(device: VirtualCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = [([n] * (n + 3), 4 + n % 5) for n in range(20)]
    monkeypatch.setattr(serving, "workload", lambda name, vocab_size: prompts)
    options = "--workload", "nano", "--alone", "--repeats", "1", "--shape", "qwen3-0.6b"
    (run,) = result("throughput", tmp_path, *options)["results"]["nano"]
    assert run["num_output"] == sum(wanted for _, wanted in prompts)


def test_as_a_peer_folo_captures_no_graph_while_its_clock_runs(
    device: VirtualCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its graphs are of a heap, and a workload of another size has one of its own."""
    export(workloads.random_model(TINY, device="cuda"), tmp_path)
    captured, counts, capture, serve = list[Any](), list[int](), torch.cuda.graph, serving.serve

    def counted(*args: Any) -> serving.Run:
        captured.clear()
        run = serve(*args)
        counts.append(len(captured))
        return run

    monkeypatch.setattr(
        torch.cuda, "graph", lambda *a, **options: captured.append(a) or capture(*a, **options)
    )
    monkeypatch.setattr(serving, "serve", counted)
    peer = folo_peer.start(str(tmp_path), "auto", torch.get_num_threads())
    prompts = [([n] * 9, 3) for n in range(6)]
    for some in (prompts[:2], prompts, prompts):
        counts.clear()
        peer.run(some, False)
        assert counts[-1] == 0


def test_graph(device: VirtualCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"_COPIED": 1 << 12, "_IDLE": 0.0, "_STEPS": 4, "_WARM": 1, "MOST_STEPS": 8}.items():
        monkeypatch.setattr(graph, name, value)
    options = "--batches", "2", "1000000", "--contexts", "16", "--shape", "qwen3-0.6b"
    found = result("graph", tmp_path, *options, "--plot", str(tmp_path / "graph.png"))["results"]
    assert [(cell["mode"], cell["batch"]) for cell in found["cells"]] == [
        (mode, batch) for batch in (2,) for mode in graph.MODES
    ]
    assert found["large"] == [[1000000, 16]]


def test_gptq(device: VirtualCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = replace(SHAPES[1], linears={"qkv": (64, 96), "head": (32, 96)})
    monkeypatch.setattr(gptq, "SHAPES", (SHAPES[0], small))
    own = {
        "BATCHES": (1, 3),
        "CONTEXT": 24,
        "steps": partial(gptq.steps, batches=(2,)),
        "_ratio": partial(gptq._ratio, rounds=1),
    }
    for name, value in own.items():
        monkeypatch.setattr(gptq, name, value)
    for name, value in {"_STEPS": 4, "_WARM": 1, "MOST_STEPS": 24}.items():
        monkeypatch.setattr(graph, name, value)
    found = result("gptq", tmp_path, "--device", "cuda")["results"]
    assert [(ratio["what"], ratio["batch"]) for ratio in found] == [
        ("linear layers", 1),
        ("linear layers", 3),
        ("decode step", 2),
    ]


def test_invariance(
    device: VirtualCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replayed = cells.Cell("one a step", 16, 8, "warm", "ample", 1, "forked", "graph")
    monkeypatch.setattr(invariance, "array", lambda: [replayed])
    monkeypatch.setattr(invariance, "requests", partial(invariance.requests, samples=1))
    monkeypatch.setattr(invariance, "random_prompts", lambda vocab_size: [[7] * 11, [7] * 11 + [8] * 4])
    result("invariance", tmp_path, "--shape", "qwen3-0.6b", "--cells", "1")
    assert "no bit differs" in capsys.readouterr().out


def test_the_whole_command_says_which_parts_passed(
    device: VirtualCuda, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    quick = gpu.Part("latency", ("timeit", "-n", "1", "-r", "1", "0"), 60)
    monkeypatch.setattr(gpu, "parts", lambda out: [quick])
    cli.main(["bench", "gpu", "--out", str(tmp_path), "--parts", "latency"])
    assert "passed" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["results"]["gpu"]["gpu"] == "virtual"
