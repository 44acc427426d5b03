"""The command line: what it prints where, and how it ends."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from checkpoints import tiny_checkpoint
from gguf_files import tiny_gguf

from folo import LLM, SamplingParams
from folo.cli import main

MODEL_DEFAULTS = {"temperature": 0.5, "top_k": 7}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("tiny")
    tiny_checkpoint(path, tokenizer=True, generation=MODEL_DEFAULTS, max_position_embeddings=100_000)
    return str(path)


@pytest.fixture(scope="module")
def llm(model: str) -> LLM:
    return LLM(model, use_tqdm=False)


class Terminal:
    """A standard input that someone sits at."""

    def isatty(self) -> bool:
        return True


@pytest.fixture(autouse=True)
def terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", Terminal())


def pipe_in(monkeypatch: pytest.MonkeyPatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


Captured = pytest.CaptureFixture[str]


def refuses(capsys: Captured, *argv: str) -> str:
    """The one line that says what is wrong."""
    assert main(argv) == 2
    out, err = capsys.readouterr()
    assert out == ""
    *progress, line = err.rstrip("\n").split("\n")
    assert not [text for text in progress if "Loading weights" not in text]
    assert line.startswith("folo: error: ")
    return line.removeprefix("folo: error: ")


def records(capsys: Captured) -> list[dict]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


class TestGenerate:
    def test_text_to_stdout_and_the_rest_to_stderr(self, model: str, llm: LLM, capsys: Captured) -> None:
        argv = ["--model", model, "--prompt", "the cat", "--max-tokens", "9", "--temperature", "0"]
        assert main(["generate", *argv]) == 0
        out, err = capsys.readouterr()
        params = SamplingParams(temperature=0, max_tokens=9)
        expected = llm.generate("the cat", params, use_tqdm=False)
        assert out == expected[0].outputs[0].text + "\n"
        assert "Loading weights: 100%" in err
        assert "Generating: 100%" in err
        headings, values = err.splitlines()[-2:]
        for heading in ("prompts", "prompt tokens", "output tokens", "TTFT", "TPOT", "output tokens/s"):
            assert heading in headings
        assert values.split()[:3] == ["1", str(len(expected[0].prompt_token_ids)), "9"]
        assert len(values) == len(headings)

    def test_prompts_file_has_one_prompt_a_line(self, model: str, capsys: Captured, tmp_path: Path) -> None:
        file = tmp_path / "prompts.txt"
        file.write_bytes("\ufeffthe cat\r\nthe\u2028hat\nÜber 猫".encode())
        assert main(["generate", "--model", model, "--prompts-file", str(file), "--max-tokens", "3"]) == 0
        out, err = capsys.readouterr()
        headings = [line for line in out.split("\n") if line.startswith("[")]
        assert headings == ["[1] the cat", "[2] the hat", "[3] Über 猫"]
        assert "mean TTFT" in err.splitlines()[-2]
        assert err.splitlines()[-1].split()[0] == "3"

    def test_standard_input_is_one_prompt(
        self, model: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipe_in(monkeypatch, b"the cat\nand the hat\n")
        assert main(["generate", "--model", model, "--max-tokens", "3", "--json"]) == 0
        (record,) = records(capsys)
        assert record["prompt"] == "the cat\nand the hat"

    def test_json_is_one_object_a_prompt(self, model: str, llm: LLM, capsys: Captured) -> None:
        prompts = ["--prompt", "the cat", "--prompt", "猫"]
        options = ["--max-tokens=5", "--seed=7", "--temperature=1.5", "--top-p=0.9", "--top-k=40"]
        assert main(["generate", "--model", model, "--json", *prompts, *options]) == 0
        params = SamplingParams(max_tokens=5, seed=7, temperature=1.5, top_p=0.9, top_k=40)
        outputs = llm.generate(["the cat", "猫"], params, use_tqdm=False)
        for record, output, prompt in zip(records(capsys), outputs, ("the cat", "猫"), strict=True):
            assert record.pop("metrics").keys() == output.metrics.keys()
            completion = output.outputs[0]
            assert record == {
                "prompt": prompt,
                "prompt_token_ids": output.prompt_token_ids,
                "text": completion.text,
                "token_ids": completion.token_ids,
                "finish_reason": completion.finish_reason,
                "stop_reason": None,
                "seed": 7,
            }

    def test_json_loses_no_character_where_the_output_is_not_utf_8(
        self, model: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for encoding, shown in (("ascii", b"\\u732b"), ("utf-8", "猫".encode())):
            output = io.BytesIO()
            monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(output, encoding))
            assert main(["generate", "--model", model, "--prompt", "猫", "--max-tokens", "1", "--json"]) == 0
            assert shown in output.getvalue()
            assert json.loads(output.getvalue())["prompt"] == "猫"
        monkeypatch.setattr(sys, "stdout", text := io.StringIO())  # it has no encoding
        assert main(["generate", "--model", model, "--prompt", "猫", "--max-tokens", "1", "--json"]) == 0
        assert json.loads(text.getvalue())["prompt"] == "猫"

    def test_without_options_samples_as_the_model_asks(self, model: str, llm: LLM, capsys: Captured) -> None:
        assert main(["generate", "--model", model, "--prompt", "the cat", "--max-tokens", "5", "--json"]) == 0
        (record,) = records(capsys)
        params = SamplingParams(**MODEL_DEFAULTS, max_tokens=5, seed=record["seed"])
        (output,) = llm.generate("the cat", params, use_tqdm=False)
        assert record["token_ids"] == output.outputs[0].token_ids

    def test_chat_goes_through_the_template(self, model: str, llm: LLM, capsys: Captured) -> None:
        argv = ["--chat", "--prompt", "the cat", "--max-tokens", "2", "--json"]
        assert main(["generate", "--model", model, *argv]) == 0
        (record,) = records(capsys)
        assert record["prompt"] == "the cat"
        messages = [{"role": "user", "content": "the cat"}]
        assert record["prompt_token_ids"] == llm.apply_chat_template(messages)

    def test_stream_prints_the_same_text(self, model: str, capsys: Captured) -> None:
        argv = ["generate", "--model", model, "--prompt", "the cat", "--max-tokens", "40"]
        assert main(argv) == 0
        whole = capsys.readouterr()
        assert main([*argv, "--stream"]) == 0
        streamed = capsys.readouterr()
        assert streamed.out == whole.out
        assert "Generating" not in streamed.err
        assert streamed.err.splitlines()[-1].split()[:3] == whole.err.splitlines()[-1].split()[:3]

    def test_one_token_has_no_pace(self, model: str, capsys: Captured) -> None:
        assert main(["generate", "--model", model, "--prompt", "the cat", "--max-tokens", "1"]) == 0
        assert " - " in capsys.readouterr().err.splitlines()[-1]

    def test_long_prompts_are_shortened_where_they_are_repeated(self, model: str, capsys: Captured) -> None:
        prompts = ["--prompt", "猫" * 200, "--prompt", "a\nb"]
        assert main(["generate", "--model", model, *prompts, "--max-tokens", "1"]) == 0
        lines = capsys.readouterr().out.split("\n")
        assert lines[0] == f"[1] {'猫' * 76} ..."
        assert "[2] a b" in lines


class TestBadInput:
    @pytest.mark.parametrize(
        ("option", "value", "message"),
        [
            ("--temperature", "-1", "temperature must be 0 (greedy) or in [1e-5, 1e5], got -1.0"),
            ("--temperature", "nan", "temperature must be 0 (greedy) or in [1e-5, 1e5], got nan"),
            ("--top-p", "1.5", "top_p must be in (0, 1]; 1 is off, got 1.5"),
            ("--top-k", "-2", "top_k must be an integer, 0 or -1 (off)"),
            ("--max-tokens", "0", "max_tokens must be an integer, at least 1, or None for no limit, got 0"),
            ("--max-tokens", "many", "argument --max-tokens: invalid int value: 'many'"),
            ("--seed", "-1", "seed must be an integer, in [0, 2**64)"),
            ("--dtype", "int8", "argument --dtype: invalid choice: 'int8'"),
            ("--prompt", "", "--prompt: the prompt is empty"),
            ("--prompt", " \n", "--prompt: the prompt is empty"),
            ("--prompt", "\udcff", "--prompt: the prompt is not UTF-8 text"),
            ("--model", "./nowhere", "There is no such path: ./nowhere"),
            ("--max-tok", "3", "unrecognized arguments: --max-tok 3"),
        ],
    )
    def test_options(self, option: str, value: str, message: str, capsys: Captured) -> None:
        assert refuses(capsys, "generate", "--prompt", "x", option, value).startswith(message)

    def test_values_are_refused_before_the_model_is_loaded(
        self, capsys: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(LLM, "__init__", lambda *args, **options: pytest.fail("loaded"))
        refuses(capsys, "generate", "--prompt", "x", "--temperature", "-1")
        refuses(capsys, "generate", "--prompt", "x", "--prompt", "y", "--stream")
        refuses(capsys, "generate")

    def test_no_prompt_on_a_terminal(self, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
        message = "no prompt: give --prompt, --prompts-file, or text on standard input"
        assert refuses(capsys, "generate") == message
        monkeypatch.setattr(sys, "stdin", None)
        assert refuses(capsys, "generate") == message

    @pytest.mark.parametrize(
        ("data", "message"),
        [(b"", "the prompt is empty"), (b"\n", "the prompt is empty"), (b"caf\xe9", "not UTF-8 text")],
    )
    def test_standard_input(
        self, data: bytes, message: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        pipe_in(monkeypatch, data)
        assert refuses(capsys, "generate").startswith(f"standard input: {message}")

    def test_prompts_file(self, capsys: Captured, tmp_path: Path) -> None:
        file = tmp_path / "prompts.txt"
        argv = ["generate", "--prompts-file", str(file)]
        assert refuses(capsys, *argv) == f"{file}: No such file or directory"
        for data, message in (
            (b"", ": the prompt is empty"),
            (b"a\n\nb\n", ", line 2: the prompt is empty"),
            (b"a\nb\xff\n", ": not UTF-8 text"),
        ):
            file.write_bytes(data)
            assert refuses(capsys, *argv).startswith(f"{file}{message}")
        assert refuses(capsys, "generate", "--prompts-file", str(tmp_path)) == f"{tmp_path}: Is a directory"

    def test_options_that_contradict(self, capsys: Captured) -> None:
        assert "not allowed with" in refuses(capsys, "generate", "--prompt", "x", "--stream", "--json")
        assert "not allowed with" in refuses(capsys, "generate", "--prompt", "x", "--prompts-file", "y")
        many = ["generate", "--stream", "--prompt", "x", "--prompt", "y"]
        assert refuses(capsys, *many) == "--stream takes one prompt, got 2"

    def test_commands(self, capsys: Captured) -> None:
        assert "COMMAND" in refuses(capsys)
        assert "invalid choice: 'fly'" in refuses(capsys, "fly")

    def test_prompt_that_is_too_long(self, model: str, capsys: Captured) -> None:
        argv = ["generate", "--model", model, "--prompt", "the " * 100_000]
        assert "leaves no room for output" in refuses(capsys, *argv)

    def test_model_without_a_chat_template(self, capsys: Captured, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path, tokenizer=True)
        for file in tmp_path.glob("chat_template*"):
            file.unlink()
        capsys.readouterr()
        argv = ["generate", "--model", str(tmp_path), "--prompt", "x", "--chat"]
        assert "no chat template" in refuses(capsys, *argv)

    def test_model_without_a_tokenizer(self, capsys: Captured, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path)
        capsys.readouterr()
        assert "has no tokenizer" in refuses(capsys, "generate", "--model", str(tmp_path), "--prompt", "x")
        assert "no such path" in refuses(capsys, "info", "./nowhere")


class TestInfo:
    def rows(self, capsys: Captured) -> dict[str, str]:
        lines = capsys.readouterr().out.splitlines()
        return {name: value.strip() for name, value in (line.split("  ", 1) for line in lines)}

    def test_describes_a_directory_without_loading_it(
        self, model: str, llm: LLM, capsys: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("folo.model.load.assemble", lambda *args: pytest.fail("loaded"))
        assert main(["info", model]) == 0
        rows = self.rows(capsys)
        assert rows["architecture"] == "LlamaForCausalLM"
        assert rows["layers"] == "2, hidden size 64, MLP 128"
        assert rows["heads"] == "4 query, 2 key/value, of 16"
        assert rows["context"] == "100,000 tokens"
        assert rows["parameters"] == f"{llm.params.num_parameters / 1e6:.1f} M"
        assert rows["weights"] == f"{llm.params.num_bytes / 2**10:.1f} KiB in float32"
        assert rows["K/V per token"] == "0.5 KiB"
        capacity = llm.state.pool.capacity * llm.state.cache.block_size
        assert f" {capacity:,} tokens, " in rows["KV heap"]

    def test_describes_a_gguf_file_in_a_dtype(self, capsys: Captured, tmp_path: Path) -> None:
        tiny_gguf(tmp_path / "tiny.gguf", kind="Q8_0")
        sizes = list[str]()
        for dtype in ("auto", "float16", "float32"):
            assert main(["info", str(tmp_path / "tiny.gguf"), "--dtype", dtype]) == 0
            sizes.append(self.rows(capsys)["weights"].split()[-1])
        assert sizes == ["bfloat16", "float16", "float32"]

    def test_describes_the_default_model(self, capsys: Captured) -> None:
        assert main(["info"]) == 0
        rows = self.rows(capsys)
        assert rows["model"].startswith("SmolLM2-135M-Instruct")
        assert rows["parameters"] == "134.5 M"
        assert rows["weights"] == "256.6 MiB in bfloat16"
        assert rows["K/V per token"] == "22.5 KiB"

    def test_says_when_the_default_heap_is_too_small(self, capsys: Captured, tmp_path: Path) -> None:
        tiny_checkpoint(tmp_path)
        config = json.loads((tmp_path / "config.json").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10_000}))
        capsys.readouterr()
        assert main(["info", str(tmp_path)]) == 0
        assert "too little (" in self.rows(capsys)["KV heap"]

    def test_leaves_out_memory_that_nobody_knows(
        self, model: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("torch.cuda.is_available", lambda: True)
        monkeypatch.setattr("torch.cuda.mem_get_info", lambda: (1000, 2000))
        monkeypatch.setattr("folo.cli._MEMINFO", Path("/nowhere"))
        assert main(["info", model]) == 0
        rows = self.rows(capsys)
        assert "host memory" not in rows
        assert rows["GPU memory"] == "1.0 KiB free: the weights do not fit"


class TestEnd:
    """In processes of their own: signals and pipes are theirs."""

    @pytest.fixture
    def process(self, model: str) -> Iterator[subprocess.Popen[bytes]]:
        """A long stream; greedy, so that it is known not to end by itself."""
        options = ["--prompt", "the cat", "--stream", "--temperature", "0", "--max-tokens", "90000"]
        with subprocess.Popen(
            [sys.executable, "-m", "folo", "generate", "--model", model, *options],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            # A shell starts what runs in its background with this signal ignored, and that is inherited.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as process:
            yield process
            process.kill()

    def test_ctrl_c(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        assert process.returncode == 130
        assert b"Traceback" not in err
        assert err.endswith(b"folo: interrupted\n")

    def test_closed_output(
        self, model: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setattr(sys, "stdout", None)  # what Python makes of `folo ... >&-`
        assert main(["info", model]) == 2
        assert capsys.readouterr().err == "folo: error: standard output is closed\n"

    def test_closed_errors(self, model: str, monkeypatch: pytest.MonkeyPatch, capsys: Captured) -> None:
        monkeypatch.setattr(sys, "stderr", None)  # what Python makes of `folo ... 2>&-`
        assert main(["generate", "--model", model, "--prompt", "x", "--max-tokens", "3", "--json"]) == 0
        assert len(json.loads(capsys.readouterr().out)["token_ids"]) == 3
        assert main(["info", "/nowhere"]) == 2
        assert capsys.readouterr().out == ""
        sys.stderr.close()

    def test_closed_pipe(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.read(1)
        process.stdout.close()
        err = process.stderr.read()
        assert process.wait(timeout=60) == 141
        assert err.rstrip().split(b"\n")[-1].split(b"\r")[-1].startswith(b"Loading weights: 100%")

    def test_ctrl_c_in_process(self, model: str, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
        def interrupted(*args: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(LLM, "generate", interrupted)
        assert main(["generate", "--model", model, "--prompt", "x"]) == 130
        assert capsys.readouterr().err.endswith("folo: interrupted\n")

    def test_help(self) -> None:
        done = subprocess.run([sys.executable, "-m", "folo", "--help"], capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.startswith("usage: folo")

    def test_version(self, capsys: Captured) -> None:
        with pytest.raises(SystemExit, match="0"):
            main(["--version"])
        assert capsys.readouterr().out.startswith("folo ")
