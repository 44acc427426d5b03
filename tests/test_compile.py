"""`folo.compile`: the same function, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import tiny_checkpoint
from engine import prompt
from gptq_files import Style, gptq_checkpoint
from torch._inductor import metrics

import folo
from folo.model.forward import layer_in_heap


@pytest.fixture(autouse=True)
def fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def outputs(params: folo.Params, step: folo.Step, lengths: list[int]) -> dict[str, folo.RequestOutput]:
    state = folo.init(
        params, folo.CacheConfig(num_blocks=24), folo.SchedulerConfig(max_num_batched_tokens=48)
    )
    for n, length in enumerate(lengths):
        sampling = folo.SamplingParams(temperature=n % 2, seed=n, max_tokens=8, logprobs=2, ignore_eos=True)
        state = folo.submit(state, folo.Request(prompt(length, n), sampling, str(n)))
    while (batch := folo.schedule(state)) is not None:
        state, _ = step(params, state, batch)
    return folo.outputs(state)


@pytest.mark.no_cover
def test_eager_and_compiled_steps_give_equal_bits(tiny: folo.Params) -> None:
    compiled = folo.compile(folo.step, mode="inductor")
    for lengths in ([1], [1, 8, 15, 22]):
        assert outputs(tiny, compiled, lengths) == outputs(tiny, folo.step, lengths)


@pytest.mark.no_cover
def test_one_graph_serves_all_layers_and_nothing_is_compiled_again(tiny: folo.Params) -> None:
    compiled = folo.compile(folo.step, mode="inductor")
    outputs(tiny, compiled, [100])  # whose first chunk wants no logits
    entries = torch._dynamo.eval_frame._debug_get_cache_entry_list(layer_in_heap.__code__)
    assert len(entries) == 2, "one for the last layer, which goes on with the wanted rows, one for the rest"
    with torch.compiler.set_stance("fail_on_recompile"):
        outputs(tiny, compiled, [1])
        outputs(tiny, compiled, [1, 8, 15, 22])


@pytest.mark.parametrize("kind", ["packed", "plain", "quantised beside dense"])
def test_a_layer_leaves_a_compiler_nothing_to_make_code_for(kind: str, tmp_path: Path) -> None:
    if kind == "quantised beside dense":
        gptq_checkpoint(tmp_path, Style(), skip=("layers.1.self_attn.v_proj",), architecture="qwen3")
    else:
        tiny_checkpoint(tmp_path, "qwen3")
    params = folo.load(tmp_path, pack=kind != "plain", use_tqdm=False)
    metrics.reset()
    compiled = outputs(params, folo.compile(folo.step, mode="inductor"), [1, 8, 15])
    assert metrics.ir_nodes_pre_fusion > 0
    assert metrics.generated_kernel_count == 0
    assert compiled == outputs(params, folo.step, [1, 8, 15])


@pytest.mark.parametrize("pack", [True, False])
def test_a_compiled_forward_gives_equal_bits(pack: bool, tiny_dir: Path) -> None:
    params = folo.load(tiny_dir, pack=pack, use_tqdm=False)
    compiled = torch.compile(folo.model.forward)
    for length in (3, 21):
        ids = torch.tensor(prompt(length))
        assert torch.equal(compiled(params, ids), folo.model.forward(params, ids))


def test_auto_is_the_faster_one_as_measured(tiny: folo.Params) -> None:
    assert folo.compile(folo.step) is folo.step
    assert folo.compile(folo.step, mode="eager") is folo.step


def test_an_unknown_mode_is_refused() -> None:
    with pytest.raises(folo.ConfigError, match=r"mode='fast'.*inductor"):
        folo.compile(folo.step, mode="fast")  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize("step", ["inductor", None, lambda *values: folo.step(*values)])
@pytest.mark.parametrize("mode", ["auto", "eager", "inductor"])
def test_another_function_is_refused_and_not_left_out(step: Any, mode: Any) -> None:
    with pytest.raises(folo.ConfigError, match=r"step=.*: expected folo\.step itself"):
        folo.compile(step, mode)


def test_an_engine_is_compiled_as_its_configuration_says(tiny_dir: Path) -> None:
    outputs = {}
    for mode in ("eager", "inductor"):
        llm = folo.LLM(str(tiny_dir), compile=mode, num_blocks=16, use_tqdm=False)
        sampling = folo.SamplingParams(seed=3, max_tokens=8, ignore_eos=True)
        outputs[mode] = llm.generate([prompt(9, 1)], sampling, use_tqdm=False)[0].outputs[0].token_ids
    assert outputs["eager"] == outputs["inductor"]
    with pytest.raises(folo.ConfigError, match=r"compile='fast'.*inductor"):
        folo.LLM(str(tiny_dir), compile="fast")
