"""A saved state is whole or is refused, and goes on bit for bit in any process."""

from __future__ import annotations

import json
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from engine import finish_all, prompt, stepped
from safetensors import safe_open
from safetensors.torch import save_file
from torch.utils import _pytree as pytree

import folo
from folo.ops import cpu
from folo.state import save as saving

BAN_EVEN = "ban even ids"


def ban_even(logits: torch.Tensor, context: folo.sampling.Context) -> torch.Tensor:
    return logits.index_fill(0, torch.arange(0, len(logits), 2), -torch.inf)


# What a restored run has to reproduce; its source is also what the new process runs.
RUN = """
import sys
from pathlib import Path
import torch
import folo

def ban_even(logits, context):
    return logits.index_fill(0, torch.arange(0, len(logits), 2), -torch.inf)

def shown(outputs):
    return repr(list(outputs.items()))

if __name__ == "__main__":
    directory, path, dtype, recompute = sys.argv[1:]
    params = folo.load(directory, dtype=dtype, use_tqdm=False)
    state = folo.restore(
        params,
        path,
        transforms={"ban even ids": ban_even},
        tokenizer=folo.load_tokenizer(directory),
        recompute=recompute == "True",
    )
    folo.check(state)
    while (batch := folo.schedule(state)) is not None:
        state, _ = folo.step(params, state, batch)
    print(shown(folo.outputs(state)))
"""


def everything(
    params: folo.Params, tokenizer: Any, steps: int = 16, caching: bool = True
) -> folo.EngineState:
    """Waiting, half prefilled, running, preempted, forked and finished requests that ask for all there is."""
    cache = folo.CacheConfig(block_size=8, num_blocks=24, reserve_blocks=48, enable_prefix_caching=caching)
    scheduler = folo.SchedulerConfig(max_num_batched_tokens=24, max_num_seqs=6)
    state = folo.init(params, cache, scheduler, tokenizer)
    options: list[dict[str, Any]] = [
        {"max_tokens": 2},
        {"temperature": 0, "max_tokens": 30, "logprobs": 2},
        {"n": 2, "max_tokens": 20, "logprobs": 0, "prompt_logprobs": 1},
        {"stop": ["zzz", "e"], "min_tokens": 12, "max_tokens": 30},
        {"repetition_penalty": 1.3, "presence_penalty": 0.4, "logit_bias": {5: 2.5, 7: -float("inf")}},
        {"logits_processors": [folo.sampling.named(BAN_EVEN, ban_even)], "logprobs": 1},
        {"logprobs": 3, "logprobs_mode": "processed", "top_k": 9, "temperature": 0.7},
        {"best_of": 2, "prompt_logprobs": 0},
    ]
    for n, values in enumerate(options):
        sampling = folo.SamplingParams(**{"ignore_eos": True, "max_tokens": 16, **values})
        state = folo.submit(
            state, folo.Request(prompt(7 + 6 * n, n % 3), sampling, f"r{n}", cache_salt="s" * (n % 2))
        )
    for n in range(steps):
        batch = folo.schedule(state)
        assert batch is not None
        state, _ = folo.step(params, state, batch)
        if n == 4:
            state = folo.fork(state, "r1", ["x", "y"], seeds=[None, 5], append=[4, 5])
    return state


@pytest.fixture
def script(tmp_path: Path) -> Path:
    path = tmp_path / "run.py"
    path.write_text(RUN)
    return path


def in_new_process(script: Path, *args: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(script), *map(str, args)]
    env = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)


def restored(params: folo.Params, path: Path, tokenizer: Any, **options: Any) -> folo.EngineState:
    transforms = {BAN_EVEN: ban_even}
    state = folo.restore(params, path, transforms=transforms, tokenizer=tokenizer, **options)
    folo.check(state)
    return state


def shown(outputs: dict[str, folo.RequestOutput]) -> str:
    return repr(list(outputs.items()))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_new_process_goes_on_bit_for_bit(
    dtype: str, tiny_dir: Path, tokenizer: Any, tmp_path: Path, script: Path
) -> None:
    params = folo.load(str(tiny_dir), dtype=dtype, use_tqdm=False)
    state = everything(params, tokenizer)
    numbers = folo.stats(state)
    assert numbers.running >= 2
    assert numbers.waiting >= 2
    assert numbers.finished >= 1
    assert numbers.preemptions >= 1
    folo.save(state, tmp_path / "state")
    expected = shown(folo.outputs(finish_all(params, state)))
    done = in_new_process(script, tiny_dir, tmp_path / "state", dtype, False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == expected


@pytest.mark.parametrize("caching", [True, False])
@pytest.mark.parametrize("steps", [0, 1, 3, 6, 12, 25])
def test_what_is_restored_is_what_was_saved(
    steps: int, caching: bool, tiny: folo.Params, tokenizer: Any, tmp_path: Path
) -> None:
    state = everything(tiny, tokenizer, steps, caching)
    path = tmp_path / "state"
    folo.save(state, path)
    again = restored(tiny, path, tokenizer)
    assert folo.outputs(again) == folo.outputs(state)
    assert folo.stats(again) == folo.stats(state)
    folo.save(again, tmp_path / "again")
    with safe_open(path, "pt") as first, safe_open(tmp_path / "again", "pt") as second:
        assert first.metadata() == second.metadata(), "the SHA-256 over all tensors is in it"
    assert folo.outputs(finish_all(tiny, again)) == folo.outputs(finish_all(tiny, state))


def test_into_a_smaller_heap_cached_blocks_are_dropped_then_sequences_preempted(
    tiny: folo.Params, tokenizer: Any, tmp_path: Path
) -> None:
    state = everything(tiny, tokenizer, steps=20)
    numbers, path = folo.stats(state), tmp_path / "state"
    assert numbers.blocks_cached >= 2
    assert numbers.running >= 2
    folo.save(state, path)
    expected = {id: output.outputs for id, output in folo.outputs(finish_all(tiny, state)).items()}
    used, cached = numbers.blocks_used, numbers.blocks_cached
    seen = set()
    for num_blocks in (used + cached, used + cached - 1, used, used - 1, 10):
        cache = folo.CacheConfig(block_size=8, num_blocks=num_blocks, reserve_blocks=48)
        again = restored(tiny, path, tokenizer, cache=cache)
        found = folo.stats(again)
        if num_blocks >= used:
            assert (found.running, found.blocks_used) == (numbers.running, used)
            assert found.blocks_cached == num_blocks - used
        else:
            assert found.running < numbers.running
            assert found.preemptions > numbers.preemptions
        seen.add(found.running)
        outputs = folo.outputs(finish_all(tiny, again))
        assert {id: output.outputs for id, output in outputs.items()} == expected
    assert len(seen) >= 2
    with pytest.raises(folo.RestoreError, match="num_blocks"):
        restored(tiny, path, tokenizer, cache=folo.CacheConfig(block_size=8, num_blocks=5))


def test_into_a_smaller_heap_no_more_are_preempted_than_have_to_be(tiny: folo.Params, tmp_path: Path) -> None:
    state = folo.init(tiny, folo.CacheConfig(block_size=8, num_blocks=8))
    for n in range(3):  # each takes 2 blocks
        sampling = folo.SamplingParams(max_tokens=7, ignore_eos=True)
        state = folo.submit(state, folo.Request(prompt(9, n), sampling, str(n)))
    folo.save(stepped(tiny, state), tmp_path / "state")
    for num_blocks, running in ((6, "012"), (5, "01"), (4, "01"), (3, "0")):
        again = folo.restore(tiny, tmp_path / "state", folo.CacheConfig(block_size=8, num_blocks=num_blocks))
        assert [sequence.id for sequence in again.running] == list(running)


def test_no_sequence_can_be_longer_than_the_heap_that_a_state_comes_into(
    tiny: folo.Params, tmp_path: Path
) -> None:
    limits = folo.SchedulerConfig(max_model_len=256)
    state = folo.init(tiny, folo.CacheConfig(num_blocks=64), limits)
    state = folo.submit(state, folo.Request([4, 5, 6], folo.SamplingParams(max_tokens=5), "a"))
    folo.save(state, tmp_path / "state")
    for num_blocks, longest in ((8, 128), (64, 256), (99, 256)):
        again = folo.restore(tiny, tmp_path / "state", folo.CacheConfig(num_blocks=num_blocks))
        assert (again.max_model_len, again.scheduler.max_model_len) == (longest, longest)
        assert folo.outputs(finish_all(tiny, again)) == folo.outputs(finish_all(tiny, state))


def test_another_block_size_takes_recomputation(tiny: folo.Params, tokenizer: Any, tmp_path: Path) -> None:
    state, path = everything(tiny, tokenizer), tmp_path / "state"
    folo.save(state, path)
    cache = folo.CacheConfig(block_size=16, num_blocks=24)
    with pytest.raises(folo.RestoreError, match=r"block_size=16.*recompute=True"):
        restored(tiny, path, tokenizer, cache=cache)
    again = restored(tiny, path, tokenizer, cache=cache, recompute=True)
    expected = folo.outputs(finish_all(tiny, state))
    outputs = folo.outputs(finish_all(tiny, again))
    assert {id: o.outputs for id, o in outputs.items()} == {id: o.outputs for id, o in expected.items()}


def test_another_instruction_set_is_refused_unless_recomputed(
    tiny: folo.Params, tiny_dir: Path, tokenizer: Any, tmp_path: Path, script: Path
) -> None:
    folo.save(everything(tiny, tokenizer), tmp_path / "state")
    arguments = tiny_dir, tmp_path / "state", "float32"
    refused = in_new_process(script, *arguments, False, FOLO_CPU_ISA=cpu.REFERENCE)
    assert "RestoreError" in refused.stderr
    assert "backend" in refused.stderr
    assert "recompute=True" in refused.stderr
    goes_on = in_new_process(script, *arguments, True, FOLO_CPU_ISA=cpu.REFERENCE)
    assert goes_on.returncode == 0, goes_on.stderr


@pytest.mark.skipif(cpu.instruction_set() == cpu.REFERENCE, reason="plain torch has no build")
def test_other_kernels_are_refused_unless_recomputed(
    tiny: folo.Params, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A newer folo may round otherwise with the same instructions."""
    state, path = everything(tiny, tokenizer), tmp_path / "state"
    folo.save(state, path)
    monkeypatch.setattr(cpu, "build_key", lambda: "another")
    with pytest.raises(folo.RestoreError, match=r"kernels.*'another'.*recompute=True"):
        restored(tiny, path, tokenizer)
    again = restored(tiny, path, tokenizer, recompute=True)
    assert folo.outputs(finish_all(tiny, again)).keys() == folo.outputs(state).keys()


def test_other_weights_are_refused(tiny: folo.Params, tokenizer: Any, tmp_path: Path) -> None:
    folo.save(everything(tiny, tokenizer), tmp_path / "state")
    other: Any = pytree.tree_map(torch.clone, tiny)
    other.layers[1].post_norm[5] += 1e-3
    with pytest.raises(folo.ParamsMismatchError, match="other weights"):
        restored(other, tmp_path / "state", tokenizer)
    equal: Any = pytree.tree_map(torch.clone, tiny)
    restored(equal, tmp_path / "state", tokenizer)


def test_what_a_request_needs_has_to_be_given(tiny: folo.Params, tokenizer: Any, tmp_path: Path) -> None:
    folo.save(everything(tiny, tokenizer), tmp_path / "state")
    with pytest.raises(folo.RestoreError, match=r"'r5'.*'ban even ids'.*transforms="):
        folo.restore(tiny, tmp_path / "state", tokenizer=tokenizer)
    no_function: Any = {BAN_EVEN: 5}
    with pytest.raises(folo.RestoreError, match=r"'r5'.*'ban even ids'.*transforms="):
        folo.restore(tiny, tmp_path / "state", transforms=no_function, tokenizer=tokenizer)
    with pytest.raises(folo.RestoreError, match=r"'r3'.*tokenizer="):
        folo.restore(tiny, tmp_path / "state", transforms={BAN_EVEN: ban_even})


def test_an_unnamed_logits_processor_is_refused_before_anything_is_written(
    tiny: folo.Params, tmp_path: Path
) -> None:
    sampling = folo.SamplingParams(logits_processors=[ban_even])
    state = folo.submit(folo.init(tiny, folo.CacheConfig(num_blocks=8)), folo.Request([5], sampling))
    with pytest.raises(folo.RequestError, match=r"'0'.*folo.sampling.named"):
        folo.save(state, tmp_path / "state")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def saved(tiny: folo.Params, tmp_path: Path) -> Path:
    state = folo.init(tiny, folo.CacheConfig(block_size=8, num_blocks=8))
    for n in range(2):
        sampling = folo.SamplingParams(max_tokens=12, ignore_eos=True, logprobs=1)
        state = folo.submit(state, folo.Request(prompt(9 + n), sampling, str(n)))
    for _ in range(3):
        batch = folo.schedule(state)
        assert batch is not None
        state, _ = folo.step(tiny, state, batch)
    folo.save(state, tmp_path / "state")
    return tmp_path / "state"


def test_a_truncated_file_is_refused(tiny: folo.Params, saved: Path) -> None:
    whole = saved.read_bytes()
    for length in [0, 1, 7, 8, 9, 100, 1000, *range(2000, len(whole), len(whole) // 40), len(whole) - 1]:
        saved.write_bytes(whole[:length])
        with pytest.raises(folo.RestoreError):
            folo.restore(tiny, saved)
    saved.write_bytes(whole + b"\0")
    with pytest.raises(folo.RestoreError):
        folo.restore(tiny, saved)


def test_an_altered_file_is_refused_wherever_it_was_altered(tiny: folo.Params, saved: Path) -> None:
    whole, numbers = saved.read_bytes(), random.Random(0)
    header = 8 + int.from_bytes(whole[:8], "little")
    places = [
        *range(8),
        *numbers.sample(range(8, header), 250),
        *numbers.sample(range(header, len(whole)), 250),
    ]
    unchanged = 0
    for place in places:
        altered = bytearray(whole)
        altered[place] ^= 1 << numbers.randrange(8)
        saved.write_bytes(altered)
        try:
            folo.restore(tiny, saved)
        except folo.FoloError:
            continue
        # A header is JSON: a bit that turns one blank into another, say, is no change.
        assert place < header
        assert _meaning(bytes(altered)) == _meaning(whole)
        unchanged += 1
    assert unchanged < 5


def _meaning(file: bytes) -> Any:
    return json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])


def test_an_unknown_version_and_a_foreign_file_are_refused(tiny: folo.Params, saved: Path) -> None:
    with safe_open(saved, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    metadata.pop("sha256")
    newer = {**metadata, "version": "1000"}
    save_file(tensors, saved, {**newer, "sha256": saving.checksum(newer, tensors)})
    with pytest.raises(folo.RestoreError, match="version '1000'"):
        folo.restore(tiny, saved)
    save_file({"weight": torch.ones(2)}, saved)
    with pytest.raises(folo.RestoreError, match="not a state"):
        folo.restore(tiny, saved)
    with pytest.raises(folo.RestoreError, match="cannot be read"):
        folo.restore(tiny, saved.with_name("missing"))


def test_a_file_that_contradicts_itself_is_refused(tiny: folo.Params, saved: Path) -> None:
    """Even with a right checksum."""
    with safe_open(saved, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        metadata = dict(file.metadata())
    metadata.pop("sha256")
    document = json.loads(tensors["document"].numpy().tobytes())
    document["sequences"][0]["tokens"][0] += 1
    for block in document["blocks"]:
        if "content" in block:
            block["content"]["token_ids"][0] += 1
    tensors["document"] = torch.tensor(list(json.dumps(document).encode()), dtype=torch.uint8)
    save_file(tensors, saved, {**metadata, "sha256": saving.checksum(metadata, tensors)})
    with pytest.raises(folo.RestoreError, match="contradicts itself"):
        folo.restore(tiny, saved)


@pytest.mark.parametrize("broken", ["write_tensors", "_to_disk", "checksum", "os.replace"])
def test_a_failing_write_leaves_the_old_file_and_nothing_else(
    broken: str, tiny: folo.Params, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = saved.read_bytes()

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(f"{saving.__name__}.{broken}", fail)
    with pytest.raises(OSError, match="disk full"):
        folo.save(folo.init(tiny, folo.CacheConfig(num_blocks=8)), saved)
    assert saved.read_bytes() == before
    assert list(saved.parent.iterdir()) == [saved]


def test_a_link_goes_on_to_point_at_what_is_saved(tiny: folo.Params, tmp_path: Path) -> None:
    state, (link, file) = folo.init(tiny, folo.CacheConfig(num_blocks=16)), (tmp_path / "a", tmp_path / "b")
    link.symlink_to(file.name)
    for id in "xy":  # first, there is nothing at its end
        folo.save(state, link)
        assert link.is_symlink()
        assert {path.name for path in tmp_path.iterdir()} == {"a", "b"}
        assert folo.outputs(folo.restore(tiny, file)) == folo.outputs(state)
        state = folo.submit(state, folo.Request([5], id=id))


def test_threads_that_save_to_one_path_leave_the_whole_file_of_one(tiny: folo.Params, tmp_path: Path) -> None:
    path, empty = tmp_path / "run.folo", folo.init(tiny, folo.CacheConfig(num_blocks=16))
    states = [folo.submit(empty, folo.Request([5], id=id)) for id in ("a", "b")]
    with ThreadPoolExecutor(2) as threads:
        for saving in [threads.submit(folo.save, state, path) for _ in range(30) for state in states]:
            saving.result()
    assert [path.name for path in tmp_path.iterdir()] == ["run.folo"]
    assert folo.outputs(folo.restore(tiny, path)).keys() in ({"a"}, {"b"})


def test_a_directory_that_is_not_there_is_an_os_error(tiny: folo.Params, tmp_path: Path) -> None:
    state = folo.init(tiny, folo.CacheConfig(num_blocks=8))
    with pytest.raises(OSError, match=r"state\.safetensors cannot be written: .*/nowhere is no directory"):
        folo.save(state, tmp_path / "nowhere" / "state.safetensors")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["pipe", ".", "", "/"])
def test_what_is_no_file_is_neither_replaced_nor_written_to(
    name: str, tiny: folo.Params, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    os.mkfifo("pipe")  # stands for /dev/null, which a rename would replace as well
    with pytest.raises(OSError, match="is no regular file"):
        folo.save(folo.init(tiny, folo.CacheConfig(num_blocks=8)), name)
    assert [path.name for path in tmp_path.iterdir()] == ["pipe"]
    assert (tmp_path / "pipe").is_fifo()


def test_restoring_runs_nothing_from_the_file(
    tiny: folo.Params, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("a pickle was about to be loaded")

    for owner, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
        (np, "load"),
    ):
        monkeypatch.setattr(owner, name, never)
    folo.check(folo.restore(tiny, saved))


KILLED = """
import sys
import folo

directory, path, every = sys.argv[1], sys.argv[2], int(sys.argv[3])
params = folo.load(directory, use_tqdm=False)
state = folo.restore(params, path)
print("begun", flush=True)
while (batch := folo.schedule(state)) is not None:
    state, _ = folo.step(params, state, batch)
    if state.counters.steps % every == 0:
        folo.save(state, path)
folo.save(state, path)
print("done", flush=True)
"""


def test_kill_9_at_any_moment_leaves_a_file_that_goes_on_to_the_same_output(
    tiny: folo.Params, tiny_dir: Path, tmp_path: Path
) -> None:
    """FOLO_KILLS: how many kills, 5 by default."""
    kills, numbers = int(os.environ.get("FOLO_KILLS", "5")), random.Random(0)
    state = folo.init(tiny, folo.CacheConfig(block_size=8, num_blocks=60))
    for n in range(8):
        sampling = folo.SamplingParams(max_tokens=100, ignore_eos=True, logprobs=0)
        state = folo.submit(state, folo.Request(prompt(9 + n, n), sampling, str(n)))
    path, script = tmp_path / "state", tmp_path / "killed.py"
    script.write_text(KILLED)
    folo.save(state, path)
    expected = folo.outputs(finish_all(tiny, state, each=lambda _: None))
    landed = 0
    for kill in range(kills):
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, str(script), str(tiny_dir), str(path), str(1 + kill % 3)]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "begun\n"
            time.sleep(numbers.uniform(0, 0.6))
            landed += process.poll() is None
            process.send_signal(signal.SIGKILL)
        again = folo.restore(tiny, path)
        folo.check(again)
        assert again.counters.steps >= state.counters.steps
        state = again
        mine = folo.outputs(finish_all(tiny, again, each=lambda _: None))
        assert mine == expected
    assert landed, "at least one kill came before the end"
