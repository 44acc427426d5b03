"""Log and Map: every version keeps what it held, whatever is done to others."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from folo.state.log import Log
from folo.state.map import Map


class Clash:
    """A key whose hash is one of two: leaves overflow, and the trie runs out of hash bits."""

    def __init__(self, name: int) -> None:
        self.name = name

    def __hash__(self) -> int:
        return self.name % 2

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Clash) and other.name == self.name


@given(st.lists(st.tuples(st.integers(0, 30), st.lists(st.integers(), max_size=4))))
def test_every_version_of_a_log_keeps_its_items(program: list[tuple[int, list[int]]]) -> None:
    versions: list[tuple[Log[int], list[int]]] = [(Log(), [])]
    for pick, items in program:
        log, model = versions[pick % len(versions)]
        versions.append((log.extend(items), model + items))
        versions.append((log.append(pick), [*model, pick]))
    for log, model in versions:
        assert list(log) == model
        assert log[:] == model
        assert log[1:-1] == model[1:-1]
        assert len(log) == len(model)
        assert log == Log(model)
        assert [log[n] for n in range(-len(model), len(model))] == model + model


def test_appending_to_the_newest_version_copies_nothing_and_to_an_older_one_parts() -> None:
    first = Log([1, 2])
    second = first.append(3)
    branch = first.append(4)
    assert second._items is first._items
    assert branch._items is not first._items
    assert (list(first), list(second), list(branch)) == ([1, 2], [1, 2, 3], [1, 2, 4])


@pytest.mark.parametrize("index", [2, -3])
def test_a_log_does_not_show_what_later_versions_hold(index: int) -> None:
    log = Log([1, 2])
    log.append(3)
    with pytest.raises(IndexError, match="outside a log of 2 items"):
        log[index]


KEYS = st.one_of(st.integers(-5, 400), st.text(max_size=2), st.builds(Clash, st.integers(0, 60)))


@given(st.lists(st.tuples(st.integers(0, 50), KEYS, st.booleans()), max_size=120))
def test_every_version_of_a_map_agrees_with_a_dict(program: list[tuple[int, object, bool]]) -> None:
    versions: list[tuple[Map[object, int], dict[object, int]]] = [(Map(), {})]
    for pick, key, removing in program:
        map_, model = versions[-1 - pick % min(3, len(versions))]
        if removing and key in model:
            versions.append((map_.delete(key), {k: v for k, v in model.items() if k != key}))
        else:
            versions.append((map_.set(key, pick), {**model, key: pick}))
    for map_, model in versions:
        assert dict(map_.items()) == model
        assert len(map_) == len(model)
        assert set(map_) == set(model)
        for key, value in model.items():
            assert map_[key] == value
    for _, key, _ in program:
        assert (key in versions[-1][0]) == (key in versions[-1][1])
        assert versions[-1][0].get(key) == versions[-1][1].get(key)


def test_a_large_map_grows_deep_and_empties_again() -> None:
    map_: Map[int, int] = Map()
    for n in range(20_000):
        map_ = map_.set(n * 31, n)
    assert sum(1 for _ in map_) == len(map_) == 20_000
    full = map_
    for n in range(20_000):
        map_ = map_.delete(n * 31)
    assert len(map_) == 0
    assert map_._root == Map()._root
    assert full[31 * 777] == 777
    with pytest.raises(KeyError):
        map_.delete(0)


_PICKLED = """
import pickle, sys
from functools import reduce
from folo.state.map import Map
map = reduce(lambda map, n: map.set(f"request {n}", n), range(100), Map())
sys.stdout.buffer.write(pickle.dumps(map))
"""


def test_a_map_that_was_pickled_finds_its_strings_in_another_process() -> None:
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    command = [sys.executable, "-c", _PICKLED]
    written = subprocess.run(command, env=environment, capture_output=True, check=True).stdout
    read = pickle.loads(written)
    assert len(read) == 100
    assert [read.get(f"request {n}") for n in range(100)] == list(range(100))
