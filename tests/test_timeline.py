"""What a recorded run tells of its steps: records, traces, pictures, and the command that makes them."""

from __future__ import annotations

import json
from collections import defaultdict
from itertools import pairwise
from pathlib import Path

import matplotlib.image
import pytest
from engine import prompt

import folo
from folo.bench import report, workloads
from folo.bench.ablation import token_times
from folo.bench.recording import StepRecord, lanes, recorded
from folo.bench.timeline import plot, trace
from folo.bench.workloads import Arrival, at_once, request
from folo.cli import main

Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pressed(tiny: folo.Params) -> list[StepRecord]:
    """Sixteen requests through a pool of 40 blocks: chunks, waits, preemptions and prefix hits."""
    state = folo.init(tiny, folo.CacheConfig(num_blocks=40), folo.SchedulerConfig(8, 48))
    state, records = recorded(tiny, state, arrivals=workloads.pressure(16, 200, 300), each=checked)
    assert len(folo.outputs(state)) == 16
    return records


def checked(step: StepRecord) -> None:
    s = step.stats
    assert s.blocks_used + s.blocks_cached + s.blocks_free == s.num_blocks


def tracks(content: dict) -> dict[str, list[dict]]:
    """The complete events of each request's track, by its name."""
    names, events = {}, defaultdict(list)
    for event in content["traceEvents"]:
        if event["ph"] == "M" and event["name"] == "thread_name" and event["pid"] == 2:
            names[event["tid"]] = event["args"]["name"]
        if event["ph"] == "X" and event["pid"] == 2:
            events[event["tid"]].append(event)
    return {names[thread]: found for thread, found in events.items()}


class TestRecords:
    def test_hold_no_state(self, tiny: folo.Params) -> None:
        state = folo.init(tiny, folo.CacheConfig(num_blocks=32, enable_prefix_caching=False))
        free = state.heap.num_free
        work = at_once(request(str(n), prompt(40, n), 8) for n in range(3))
        state, records = recorded(tiny, state, arrivals=work)
        assert len(records) == 8
        assert state.heap.num_free == free

    def test_a_step_says_what_was_computed_for_whom(self, tiny: folo.Params) -> None:
        state = folo.init(tiny, folo.CacheConfig(num_blocks=32), folo.SchedulerConfig(2, 10))
        work = at_once([request("a", prompt(12), 3), request("b", prompt(4, 1), 2), request("c", [5], 1)])
        _, records = recorded(tiny, state, arrivals=work)
        seen = [[(c.track, c.start, c.end, c.decode, c.sampled) for c in step.chunks] for step in records]
        assert seen == [
            [("a", 0, 10, False, False)],
            [("a", 10, 12, False, True), ("b", 0, 4, False, True)],
            [("a", 12, 13, True, True), ("b", 4, 5, True, True)],
            [("a", 13, 14, True, True), ("c", 0, 1, False, True)],
        ]
        assert [step.waiting for step in records] == [("b", "c"), ("c",), ("c",), ()]
        assert [step.stats.running for step in records] == [1, 2, 1, 0]
        assert {track: len(times) for track, times in token_times(records).items()} == {
            "a": 3,
            "b": 2,
            "c": 1,
        }

    def test_samples_have_tracks_of_their_own(self, tiny: folo.Params) -> None:
        state = folo.init(tiny, folo.CacheConfig(num_blocks=32))
        params = folo.SamplingParams(n=3, max_tokens=4, ignore_eos=True, seed=1)
        _, records = recorded(tiny, state, arrivals=[Arrival(0, folo.Request(prompt(20), params, "a"))])
        assert list(lanes(records)) == ["a #0", "a #1", "a #2"]
        assert max(step.stats.blocks_shared for step in records) == 1

    def test_what_comes_later_is_submitted_later(self, tiny: folo.Params) -> None:
        state = folo.init(tiny, folo.CacheConfig(num_blocks=32))
        work = [
            Arrival(0, request("a", [5], 4)),
            Arrival(2, request("b", [6], 1)),
            Arrival(9, request("c", [7], 1)),
        ]
        _, records = recorded(tiny, state, arrivals=work)
        assert [[chunk.track for chunk in step.chunks] for step in records] == [
            ["a"],
            ["a"],
            ["a", "b"],
            ["a"],
            ["c"],
        ]


class TestTrace:
    def test_is_json_with_one_track_a_request(self, pressed: list[StepRecord]) -> None:
        content = json.loads(json.dumps(trace(pressed), allow_nan=False))
        assert len(tracks(content)) == 16
        assert {event["ph"] for event in content["traceEvents"]} == {"M", "X", "C"}
        steps = [e for e in content["traceEvents"] if e["ph"] == "X" and e["pid"] == 1]
        assert len(steps) == len(pressed)
        assert json.loads(json.dumps(trace([])))["traceEvents"]

    def test_spans_of_a_track_do_not_overlap(self, pressed: list[StepRecord]) -> None:
        for events in tracks(trace(pressed)).values():
            for before, after in pairwise(events):
                assert before["ts"] + before["dur"] <= after["ts"]
            assert all(event["dur"] >= 0 for event in events)
            assert events[-1]["name"] == "decode"

    def test_tokens_add_up(self, pressed: list[StepRecord]) -> None:
        spans = [event for events in tracks(trace(pressed)).values() for event in events]
        for name, decode in (("prefill", False), ("decode", True)):
            total = sum(event["args"]["tokens"] for event in spans if event["name"] == name)
            assert total == sum(step.num_tokens(decode=decode) for step in pressed)

    def test_prefill_is_the_prompts_less_the_hits(self, tiny: folo.Params) -> None:
        state = folo.init(
            tiny, folo.CacheConfig(num_blocks=64), folo.SchedulerConfig(max_num_batched_tokens=24)
        )
        shared = prompt(64)
        work = [Arrival(0, request("a", shared, 2)), Arrival(8, request("b", [*shared, 7, 8, 9], 2))]
        content = trace(recorded(tiny, state, arrivals=work)[1])
        first, second = tracks(content).values()
        chunks = [event["args"] for event in first if event["name"] == "prefill"]
        assert [(c["start"], c["end"], c["cached"]) for c in chunks] == [(0, 24, 0), (24, 48, 0), (48, 64, 0)]
        (hit,) = [event["args"] for event in second if event["name"] == "prefill"]
        assert hit == {"tokens": 3, "start": 64, "end": 67, "cached": 64, "after_preemption": False}

    def test_preemption_lasts_until_readmission(self, pressed: list[StepRecord]) -> None:
        found = [lane for lane in lanes(pressed).values() if any(span.kind == "preempted" for span in lane)]
        assert found
        for lane in found:
            for span, after in pairwise(lane):
                if span.kind == "preempted":
                    assert after.kind == "prefill"
                    assert after.args["after_preemption"]
                    assert after.first == span.stop
        preempted = sum(span.kind == "preempted" for lane in found for span in lane)
        assert preempted == pressed[-1].stats.preemptions == sum(len(step.preempted) for step in pressed)

    def test_counters_follow_the_pool(self, pressed: list[StepRecord]) -> None:
        counters = [e["args"] for e in trace(pressed)["traceEvents"] if e["name"] == "blocks"]
        assert [c["used"] for c in counters] == [step.stats.blocks_used for step in pressed]
        assert [c["cached"] for c in counters] == [step.stats.blocks_cached for step in pressed]
        assert max(c["used"] for c in counters) == 40


class TestPicture:
    def test_is_a_readable_png(self, pressed: list[StepRecord], tmp_path: Path) -> None:
        file = tmp_path / "pool.png"
        plot(pressed, file)
        pixels = matplotlib.image.imread(file)
        assert 1000 < pixels.shape[0] < 2000
        assert 1400 < pixels.shape[1] < 2000
        assert file.stat().st_size < 500_000
        seen = {
            tuple(pixel) for pixel in (255 * pixels[::7, ::7, :3]).round().astype(int).reshape(-1, 3).tolist()
        }
        for colour in (report.BLUE, report.SKY, report.YELLOW, report.LIGHT, report.GREEN, report.RED):
            assert tuple(bytes.fromhex(colour[1:])) in seen

    def test_many_requests_have_no_row_each(self, tiny: folo.Params, tmp_path: Path) -> None:
        state = folo.init(tiny, folo.CacheConfig(num_blocks=64))
        work = at_once(request(str(n), [5 + n], 2) for n in range(41))
        plot(recorded(tiny, state, arrivals=work)[1], tmp_path / "pool.png")
        assert matplotlib.image.imread(tmp_path / "pool.png").shape[0] < 1100

    def test_names_may_be_any_text(self, tiny: folo.Params, tmp_path: Path) -> None:
        state = folo.init(tiny, folo.CacheConfig(num_blocks=8))
        work = at_once([request("$\\frac$", [5], 2), request("猫" * 40, [6], 2), request("\udcff", [7], 2)])
        records = recorded(tiny, state, arrivals=work)[1]
        plot(records, tmp_path / "pool.png")
        report.write_json(tmp_path / "trace.json", "trace", trace(records))
        assert list(tracks(json.loads((tmp_path / "trace.json").read_text())["results"])) == list(
            lanes(records)
        )

    def test_of_nothing_is_refused(self, tmp_path: Path) -> None:
        with pytest.raises(ValueError, match="no step was recorded"):
            plot([], tmp_path / "pool.png")


class TestCommand:
    def test_timeline(self, tiny_dir: Path, tmp_path: Path, capsys: Captured) -> None:
        argv = ["--model", str(tiny_dir), "--requests", "6", "--num-blocks", "20", "--max-num-seqs", "3"]
        files = {option: tmp_path / f"t.{option}" for option in ("json", "trace", "png")}
        argv += ["--json", str(files["json"]), "--trace", str(files["trace"]), "--plot", str(files["png"])]
        assert main(["bench", "timeline", *argv]) == 0
        out, err = capsys.readouterr()
        assert ["requests", "6"] in [line.split() for line in out.splitlines()]
        assert "Timeline: 100%" in err
        content = json.loads(files["json"].read_text())
        assert content["results"]["summary"]["requests"] == 6
        assert len(content["results"]["steps"]) == content["results"]["summary"]["steps"]
        assert len(tracks(json.loads(files["trace"].read_text()))) == 6
        assert files["png"].stat().st_size > 10_000

    @pytest.mark.parametrize(
        ("argv", "message"),
        [
            ([], "NAME"),
            (["fly"], "invalid choice: 'fly'"),
            (["timeline", "--requests", "0"], "argument --requests: expected at least 1, got 0"),
            (["timeline", "--requests", "x"], "argument --requests: invalid positive value: 'x'"),
            (["timeline", "--json", "/nowhere/t.json"], "/nowhere/t.json: there is no directory /nowhere"),
            (["timeline", "--trace", "/"], "/: is a directory"),
            (["timeline", "--trace", "/dev/null"], "/dev/null: is no regular file"),
            (["timeline", "--plot", "pool.txt"], "pool.txt: expected a name that ends in .png, .svg or .pdf"),
            (["timeline", "--model", "./nowhere"], "There is no such path: ./nowhere"),
            (["ablation", "--plot", "/nowhere/a.png"], "/nowhere/a.png: there is no directory /nowhere"),
        ],
    )
    def test_bad_input(self, argv: list[str], message: str, capsys: Captured) -> None:
        assert main(["bench", *argv]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.startswith("folo: error: ")
        assert message in err
        assert err.count("\n") == 1

    def test_the_smallest_pool(self, tiny_dir: Path, capsys: Captured) -> None:
        argv = ["bench", "timeline", "--model", str(tiny_dir), "--requests", "5", "--num-blocks"]
        assert main([*argv, "9"]) == 0
        assert main([*argv, "8"]) == 2
        assert "8 blocks hold no mix of requests" in capsys.readouterr().err

    def test_a_picture_needs_matplotlib(self, capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        assert main(["bench", "timeline", "--plot", "pool.png"]) == 2
        assert "a picture needs matplotlib: pip install 'folo[bench]'" in capsys.readouterr().err
