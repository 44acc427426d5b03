"""Benchmarks: what they count, what they write and draw, and what they refuse. Nothing here is timed."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import matplotlib.image
import pytest
import torch
from graphs import Recorded

import folo
from folo.bench import compare, gptq, graph, kernels, report, roofline, workloads
from folo.bench.ablation import QUICK, Bench
from folo.bench.compare import Comparison, PeerError, Worker, figure
from folo.bench.peers import OWN
from folo.bench.recording import StepRecord
from folo.bench.roofline import Roofline
from folo.bench.serving import WORKLOADS, workload
from folo.bench.workloads import QWEN3_600M, miniature, random_model
from folo.cli import main
from folo.ops import cpu

Captured = pytest.CaptureFixture[str]


class TestAblation:
    def test_paged_kv_is_over_96_percent_in_use(self, tiny: folo.Params) -> None:
        (use, at_once), samples = Bench(tiny, replace(QUICK, mixed=24, blocks=256)).paging()
        assert use.folo == fmean(samples["folo"]) > 96
        assert use.met
        assert use.baseline < 60
        assert at_once.folo > 1.5 * at_once.baseline
        assert at_once.baseline <= 256 * 16 // 768

    def test_both_arms_of_a_comparison_do_the_same_work(self, tiny: folo.Params) -> None:
        sampled: dict[str, int] = {}
        runs = [0]

        def count(step: StepRecord) -> None:
            sampled.setdefault(str(runs), 0)
            sampled[str(runs)] += sum(chunk.sampled for chunk in step.chunks)
            runs[0] += not step.stats.running + step.stats.waiting

        bench = Bench(tiny, QUICK, count)
        bench.chunking()
        assert list(sampled.values()) == [2 * (8 + QUICK.decoded) + 1] * 2

    def test_reuse_computes_the_suffix_only(self, tiny: folo.Params) -> None:
        computed: list[int] = []
        Bench(tiny, QUICK, lambda step: computed.append(step.chunks[0].num_tokens)).reuse()
        assert computed == [QUICK.prefix, QUICK.prefix + QUICK.suffix, QUICK.suffix]

    def test_end_to_end(self, tiny_dir: Path, tmp_path: Path, capsys: Captured) -> None:
        files = ["--json", str(tmp_path / "a.json"), "--plot", str(tmp_path / "a.png")]
        assert main(["bench", "ablation", "--model", str(tiny_dir), "--quick", *files]) == 0
        out, err = capsys.readouterr()
        lines = out.splitlines()
        assert lines[0].split() == ["feature", "measure", "baseline", "folo", "ratio", "target", "met"]
        assert len([line for line in lines if "x  " in line]) == 8
        assert f"{QUICK.runs}/{QUICK.runs}" in err
        content = json.loads((tmp_path / "a.json").read_text())
        assert content["environment"]["dtype"] == "float32"
        rows = {(row["feature"], row["measure"]): row for row in content["results"]["rows"]}
        assert rows["paged KV", "KV use"]["met"]
        assert {len(arm) for arm in content["results"]["samples"]["chunking"].values()} == {24}
        assert matplotlib.image.imread(tmp_path / "a.png").shape[1] > 1400

    def test_refuses_a_model_that_is_too_short(self, tiny_dir: Path, capsys: Captured) -> None:
        assert main(["bench", "ablation", "--model", str(tiny_dir)]) == 2
        assert "needs 4001 positions, and the model has 256; try --quick" in capsys.readouterr().err


class TestServing:
    def test_latency(self, tiny_dir: Path, tmp_path: Path, capsys: Captured) -> None:
        files = ["--json", str(tmp_path / "runs.json"), "--plot", str(tmp_path / "steps.png")]
        assert main(["bench", "latency", "--model", str(tiny_dir), "--repeats", "2", *files]) == 0
        heading, _, row, *_ = capsys.readouterr().out.splitlines()
        assert heading.split("  ")[0] == "workload"
        assert row.startswith("latency ")
        runs = json.loads((tmp_path / "runs.json").read_text())["results"]["latency"]
        assert len(runs) == 2
        for run in runs:
            assert [tokens for _, tokens in run["steps"]] == [128] + [1] * 127
            assert (run["num_prompt"], run["num_output"]) == (128, 128)
            assert run["first_token"] < run["total"]
            assert sum(seconds for seconds, _ in run["steps"]) == pytest.approx(run["total"], rel=0.05)
        assert matplotlib.image.imread(tmp_path / "steps.png").shape[:2] > (400, 1000)

    def test_workloads_are_what_they_are_called(self) -> None:
        shapes = {
            name: [(len(ids), n) for ids, n in workload(name, 49152)] for name in ("throughput", "prefix")
        }
        assert shapes == {"throughput": [(128, 128)] * 32, "prefix": [(544, 32)] * 32}
        assert len({tuple(ids[:512]) for ids, _ in workload("prefix", 49152)}) == 1
        assert len({tuple(ids) for ids, _ in workload("prefix", 49152)}) == 32
        assert all(100 <= token < 300 for ids, _ in workload("mixed", 300) for token in ids)


class TestCompare:
    """The other engine is transformers, which is always there, and engines that are not."""

    def test_runs_the_same_work_in_turn(self, tiny_dir: Path, tmp_path: Path, capsys: Captured) -> None:
        files = ["--json", str(tmp_path / "c.json"), "--plot", str(tmp_path / "c.png")]
        argv = ["bench", "compare", "--peer", "transformers", "--model", str(tiny_dir), *files]
        kept = tmp_path / "kept"
        kept.mkdir()
        argv += ["--pairs", "2", "--checkpoint", str(kept), "--dtype", "bfloat16"]
        assert main([*argv, "--workloads", "latency"]) == 0
        title, heading, _, row, *_ = capsys.readouterr().out.splitlines()
        assert title.startswith("folo 0.1.0 beside transformers 5.")
        assert title.endswith("ForCausalLM in bfloat16, 1 threads")
        assert json.loads((kept / "config.json").read_text())["dtype"] == "bfloat16"
        assert heading.split()[2:4] == ["folo", "transformers"]
        assert row.startswith("latency   decode tokens/s")
        (result,) = json.loads((tmp_path / "c.json").read_text())["results"]["workloads"]
        assert (result["workload"], result["unit"]) == ("latency", "decode tokens/s")
        assert len(result["folo"]) == len(result["peer"]) == 2
        assert {"config.json", "model.safetensors", "tokenizer.json"} <= {f.name for f in kept.iterdir()}
        assert matplotlib.image.imread(tmp_path / "c.png").shape[1] > 900
        # The directory holds a checkpoint now: another model in its name would not be what runs.
        assert main([*argv, "--workloads", "latency"]) == 2
        assert f"--checkpoint: {kept} holds a checkpoint already" in capsys.readouterr().err

    def test_a_figure_is_better_when_folo_is(self) -> None:
        faster, sooner = (Comparison(name, (30.0, 20.0), (10.0, 20.0)) for name in ("latency", "prefix"))
        assert faster.ratios == [3.0, 1.0]
        assert sooner.ratios == [1 / 3, 1.0]
        seconds = {"first_token": 1.0, "last_token": 3.0, "total": 4.0}
        prompts = [([1, 2, 3], 5), ([1], 3)]
        figures = {name: figure(name, prompts, seconds) for name in WORKLOADS}
        rates = dict.fromkeys(("latency", "throughput", "mixed", "nano"), 2.0)
        assert figures == {**rates, "prefix": 4.0, "prefill": 1.0}

    def test_a_peer_that_is_not_there_is_named_with_how_to_install_it(
        self, tiny_dir: Path, capsys: Captured
    ) -> None:
        argv = ["bench", "compare", "--peer", "openvino", "--model", str(tiny_dir), "--pairs", "1"]
        assert main(argv) == 2
        error = capsys.readouterr().err
        assert f"{sys.executable} has no openvino_genai: pip install torch" in error
        assert "pip install openvino-genai optimum-intel nncf" in error

    def test_a_workload_that_the_peer_has_not_is_refused(self, capsys: Captured) -> None:
        argv = ["bench", "compare", "--peer", "llama.cpp", "--workloads", "prefix"]
        assert main(argv) == 2
        assert "llama.cpp does not run the workload prefix: leave it out" in capsys.readouterr().err

    def test_a_run_that_is_terminated_leaves_no_engine_behind(self, tiny_dir: Path, tmp_path: Path) -> None:
        kept = tmp_path / "kept"
        argv = ["compare", "--peer", "transformers", "--model", tiny_dir, "--checkpoint", kept]
        kept.mkdir()
        run = subprocess.Popen(
            [sys.executable, "-m", "folo", "bench", *argv], stderr=subprocess.PIPE, text=True
        )

        def engines() -> int:
            found = 0
            for command in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):  # it ended in between
                    found += f"_peer\0{kept}\0".encode() in command.read_bytes()
            return found

        try:
            deadline = time.monotonic() + 100
            while engines() < 2 and time.monotonic() < deadline:
                time.sleep(0.05)
            assert engines() == 2
            run.terminate()
            assert run.wait(30) == 128 + signal.SIGTERM
            assert engines() == 0
        finally:
            run.kill()
            run.communicate()

    def test_a_run_that_is_cut_short_tells_how_far_it_came(
        self, tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
    ) -> None:
        def stopping(_: object, name: str, *rest: object) -> Iterator[float]:
            yield from (4.0, 2.0, 3.0)
            if name == "prefill":
                raise PeerError("it has stopped")
            yield 1.0

        engine = SimpleNamespace(version="engine 1", close=lambda: None)
        monkeypatch.setattr(compare, "Worker", lambda *_: engine)
        monkeypatch.setattr(compare, "interleave", stopping)
        argv = ["bench", "compare", "--peer", "transformers", "--model", str(tiny_dir)]
        argv += ["--json", str(tmp_path / "c.json"), "--workloads", "latency", "prefill", "mixed"]
        assert main(argv) == 2
        assert "it has stopped" in capsys.readouterr().err
        found = json.loads((tmp_path / "c.json").read_text())["results"]["workloads"]
        assert [(own["workload"], own["folo"], own["peer"]) for own in found] == [
            ("latency", [4.0, 3.0], [2.0, 1.0]),
            ("prefill", [4.0], [2.0]),
        ]

    def test_the_last_words_of_a_peer_that_stops_are_passed_on(self, tmp_path: Path) -> None:
        with (tmp_path / "log").open("w+b") as log, pytest.raises(PeerError) as caught:
            Worker(OWN, sys.executable, tmp_path / "nowhere", "float32", 1, log)
        lines = str(caught.value).splitlines()
        assert lines[0] == "folo has stopped; its last lines:"
        assert "LoadError: There is no such path" in lines[-1]

    def test_the_folo_that_is_measured_is_the_one_that_measures(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It may run from a checkout, with another one installed."""
        (tmp_path / "folo.py").write_text("raise ImportError('another folo')")
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        with (tmp_path / "log").open("w+b") as log, pytest.raises(PeerError, match="There is no such path"):
            Worker(OWN, sys.executable, tmp_path / "nowhere", "float32", 1, log)


class TestKernels:
    def test_counts_bytes_and_operations(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(kernels, "BYTES", 1 << 22)  # what a cache may hold: nothing here looks at a time
        shape = kernels.Shape("small", {"out": (48, 32)}, (4, 2, 16))
        results = kernels.measure(shape, torch.bfloat16, lambda: Roofline(1e9, 1e12), lambda: None)
        one, *_, prefill = results
        assert (one.op, one.num_bytes, one.operations) == ("linear", 2 * 48 * 32 + 2 * (32 + 48), 2 * 48 * 32)
        assert prefill.operations == 4 * (2048 * 2049 // 2) * 4 * 16
        assert one.share == one.num_bytes / 1e9 / one.seconds

    def test_takes_other_dtypes(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
    ) -> None:
        monkeypatch.setattr(kernels, "BYTES", 1 << 22)
        monkeypatch.setattr(roofline, "_SIDE", 64)
        monkeypatch.setattr(kernels, "SHAPES", (kernels.Shape("small", {"out": (48, 32)}, (4, 2, 16)),))
        files = ["--json", str(tmp_path / "k.json"), "--plot", str(tmp_path / "k.png")]
        assert main(["bench", "kernels", "--dtype", "float32", *files]) == 0
        assert "GFLOP/s in float32" in capsys.readouterr().out
        found = json.loads((tmp_path / "k.json").read_text())["results"]
        assert (found["dtype"], found["roofline"]["dtype"]) == ("float32", "float32")
        assert found["ops"][0]["num_bytes"] == 4 * 48 * 32 + 4 * (32 + 48)
        assert matplotlib.image.imread(tmp_path / "k.png").shape[1] > 900

    def test_the_roofline_is_that_of_a_dtype_that_torch_multiplies_quickly(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def timed(slow: torch.dtype, call: Callable[[], torch.Tensor]) -> float:
            return 9 if call().dtype == slow else 1

        monkeypatch.setattr(roofline, "_SIDE", 64)
        for slow, expected in ((torch.bfloat16, "float32"), (torch.float32, "bfloat16")):
            monkeypatch.setattr(roofline, "timed", partial(timed, slow))
            assert roofline.Machine().now().dtype == expected


class TestGptq:
    def test_compares_linear_layers_and_steps(self) -> None:
        one = gptq.linears([(48, 256), (32, 128)], batch=3, copies=2)
        assert (one.what, one.batch, one.faster) == ("linear layers", 3, one.dense / one.quantised)
        config = replace(QWEN3_600M, num_layers=2, hidden_size=128, intermediate_size=256, vocab_size=512)
        config = replace(config, num_heads=2, num_kv_heads=2)
        found = [*gptq.steps(random_model(config), random_model(config, bits=4), batches=(1, 2))]
        assert [(ratio.what, ratio.batch) for ratio in found] == [("decode step", 1), ("decode step", 2)]
        assert all(ratio.dense > 0 and ratio.quantised > 0 for ratio in found)

    def test_a_run_that_is_cut_short_tells_how_far_it_came(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Captured
    ) -> None:
        def stopping(*_: object) -> Iterator[gptq.Ratio]:
            yield gptq.Ratio("linear layers", 1, 3.0, 1.5)
            raise MemoryError

        monkeypatch.setattr(gptq, "_measured", stopping)
        monkeypatch.setattr(workloads, "random_model", lambda *_, **__: miniature())
        with pytest.raises(MemoryError):
            main(["bench", "gptq", "--json", str(tmp_path / "g.json")])
        assert capsys.readouterr().out.splitlines()[2].split()[-2:] == ["2.00", "x"]
        (found,) = json.loads((tmp_path / "g.json").read_text())["results"]
        assert (found["what"], found["faster"]) == ("linear layers", 2.0)

    def test_random_models_of_4_bits_take_little_memory(self) -> None:
        config = replace(QWEN3_600M, num_layers=1, vocab_size=512)
        dense, quantised = random_model(config), random_model(config, bits=4)
        head = 2 * config.vocab_size * config.hidden_size
        assert quantised.num_parameters == dense.num_parameters
        assert (quantised.num_bytes - head) / (dense.num_bytes - head) < 0.29


class TestReport:
    def test_table_aligns_text_left_and_numbers_right(self) -> None:
        rows = [("short", 7, "1.5x"), ("a long name", 1234, "10x")]
        assert report.table(("name", "count", "ratio"), rows) == (
            "name         count  ratio\n"
            "-----------  -----  -----\n"
            "short            7   1.5x\n"
            "a long name   1234    10x"
        )

    def test_json_is_whole_or_not_there(self, tmp_path: Path) -> None:
        file = tmp_path / "a.json"
        report.write_json(file, "name", {"x": 1})
        before = file.read_bytes()
        assert json.loads(before)["benchmark"] == "name"
        assert json.loads(before)["results"] == {"x": 1}
        with pytest.raises(ValueError, match="JSON compliant"):
            report.write_json(file, "name", {"x": float("nan")})
        with pytest.raises(IsADirectoryError):
            report.write_atomically(tmp_path, b"")
        assert file.read_bytes() == before
        assert list(tmp_path.iterdir()) == [file]

    def test_environment(self, tiny: folo.Params, monkeypatch: pytest.MonkeyPatch) -> None:
        found = report.environment(tiny)
        assert found["threads"] == torch.get_num_threads()
        assert found["instruction_set"] == cpu.instruction_set()
        assert (found["dtype"], found["device"], found["folo"]) == ("float32", "cpu", folo.__version__)
        assert found["parameters"] == tiny.num_parameters
        assert "dtype" not in report.environment()
        monkeypatch.setattr(report, "_CPUINFO", Path("/nowhere"))
        assert report.environment()["cpu"]

    def test_environment_of_a_gpu(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "A GPU")
        monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
        monkeypatch.setenv("PATH", str(tmp_path))
        params = replace(workloads.miniature(), embed=torch.empty(64, 2, device="meta"))
        monkeypatch.setattr(folo.Params, "device", torch.device("cuda"))
        assert report.environment(params)["driver"] == "unknown"
        smi = tmp_path / "nvidia-smi"
        smi.write_text("#!/bin/sh\necho 555.42\n")
        smi.chmod(0o755)
        found = report.environment(params)
        assert (found["device"], found["gpu"], found["driver"]) == ("cuda", "A GPU", "555.42")


class TestGraph:
    """With recorded calls for CUDA graphs, and the host's clock."""

    def test_times_a_decode_step_run_in_three_ways(self, tmp_path: Path) -> None:
        torch._dynamo.reset()
        recorder, params, sizes = Recorded(), miniature(num_positions=1024), [(1, 128), (3, 64)]
        rate = graph.copy_rate(params.device)
        cells = [cell for size in sizes for cell in graph.measure_size(params, *size, rate, recorder)]
        assert [(c.batch, c.context, c.mode) for c in cells] == [(*s, m) for s in sizes for m in graph.MODES]
        assert rate > 1e8, "bytes a second"
        assert all(0 < c.p50 <= c.p99 and c.host > 0 and c.rate == c.batch / c.p50 for c in cells)
        assert recorder.captures == 1 + 3, "for batches of 1; and of 1, 2 and 4"
        heading, _, first, *_ = graph.table(cells).splitlines()
        assert heading.endswith("of the floor  times eager")
        assert first.split()[:3] == ["1", "128", "eager"]
        graph.plot(cells, str(tmp_path / "g.png"))
        assert matplotlib.image.imread(tmp_path / "g.png").shape[1] > 900

    def test_the_floor_is_what_has_to_be_read(self) -> None:
        params = miniature()
        layer = 2 * 1 * 1 * 2 * 4  # K and V, one head of 2, float32
        assert graph.read_bytes(params, 5, 100) == params.num_bytes + 500 * layer

    def test_is_refused_without_a_gpu(self, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: False)
        for argv in (["graph"], ["gpu", "--out", "results"], ["gptq", "--device", "cuda"]):
            assert main(["bench", *argv]) == 2
            assert "needs a CUDA device, and torch finds none" in capsys.readouterr().err


class TestNano:
    def test_is_nano_vllms_workload(self) -> None:
        prompts = workload("nano", 151_936)
        assert len(prompts) == 256
        assert all(100 <= len(ids) <= 1024 and 100 <= wanted <= 1024 for ids, wanted in prompts)
        assert max(max(ids) for ids, _ in prompts) <= 10_000
        assert sum(wanted for _, wanted in prompts) == 133_966
