"""The virtual CUDA device refuses what CUDA refuses, and shows what a program must not rely on."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
import torch
import virtual_cuda
from torch import Tensor
from virtual_tensors import CudaTensor, VirtualCuda

from folo import ops
from folo.ops import reference
from folo.ops.cuda.norm import _gate_kernel
from folo.transfer import Fixed, download


@pytest.fixture
def device() -> Iterator[VirtualCuda]:
    with virtual_cuda.entered() as device:
        yield device


def captured(function: Any) -> tuple[Any, Tensor]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = function()
    return graph, output


def test_views_and_changes_in_place_share_memory(device: VirtualCuda) -> None:
    whole = torch.zeros(4, 3, device="cuda")
    assert (type(whole), whole.device, whole.is_cuda) == (CudaTensor, torch.device("cuda", 0), True)
    rows = whole.view(-1)[3:6].view(torch.int32)
    assert rows.fill_(1) is rows
    whole[2].copy_(whole[1])
    assert torch.equal(whole.cpu().view(torch.int32).sum(1), torch.tensor([0, 3, 3, 0]))
    assert rows.data_ptr() == whole.data_ptr() + 12


def test_tensors_and_generators_of_two_devices_do_not_meet(device: VirtualCuda) -> None:
    here, there = torch.ones(3), torch.ones(3, device="cuda")
    assert torch.equal((there * torch.tensor(2.0)).cpu(), here * 2), "but for scalars"
    for call in (
        lambda: here + there,
        lambda: torch.cat((there, here)),
        lambda: ops.rms_norm(there, here, 0),
    ):
        with pytest.raises((RuntimeError, AssertionError), match=r"same device|not on the device"):
            call()
    with pytest.raises(RuntimeError, match="generator is of another device"):
        torch.randn(3, generator=torch.Generator(), device="cuda")
    with pytest.raises(RuntimeError, match="generator is of another device"):
        here.normal_(generator=torch.Generator("cuda"))


WAITING = {
    "item": lambda x: x.sum().item(),
    "list": lambda x: x.tolist(),
    "truth": lambda x: bool(x[0]),
    "copy": lambda x: x.cpu(),
    "upload": lambda x: torch.tensor([1], device="cuda"),
    "mask": lambda x: x[x > 0],
    "places": lambda x: x.nonzero(),
    "equality": lambda x: torch.equal(x, x),
    "index from the host": lambda x: x[torch.tensor([1, 0])],
}


@pytest.mark.parametrize("call", WAITING.values(), ids=WAITING)
def test_what_waits_for_the_device_is_noted_and_refused(call: Any, device: VirtualCuda) -> None:
    x = torch.ones(2, device="cuda")
    before = len(device.waits)
    call(x)
    assert len(device.waits) == before + 1
    with pytest.raises(RuntimeError, match="capturing"):
        captured(lambda: call(x))
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        call(x)


def test_a_copy_to_the_host_is_garbage_until_it_was_waited_for(device: VirtualCuda) -> None:
    x = torch.arange(3, device="cuda")
    torch.cuda.set_sync_debug_mode("error")
    host = torch.empty(3, dtype=torch.int64, pin_memory=True).copy_(x, non_blocking=True)
    done = torch.cuda.Event()
    x.fill_(7)
    assert host.tolist() != [0, 1, 2]
    done.synchronize()
    assert host.tolist() != [0, 1, 2], "the event was not recorded"
    done.record()
    done.synchronize()
    assert host.tolist() == [0, 1, 2]
    assert torch.equal(download(x)(), torch.tensor([7, 7, 7]))


def test_pinned_memory_is_left_alone_until_it_was_read(device: VirtualCuda) -> None:
    host = torch.zeros(3, pin_memory=True)
    host.to("cuda", non_blocking=True)
    host[0] = 1
    with pytest.raises(RuntimeError, match="pinned memory was changed"):
        torch.cuda.synchronize()


def test_a_graph_runs_when_it_is_replayed_on_what_its_memory_holds_then(device: VirtualCuda) -> None:
    fixed = Fixed([torch.tensor([1.0, 2.0]), torch.tensor([3])], torch.device("cuda"))
    total = torch.zeros(2, device="cuda")

    def function() -> Tensor:
        total.add_(fixed.tree[0])
        return torch.cat((total, fixed.tree[0] * 2))

    graph, output = captured(function)
    assert not total.any(), "a capture runs nothing"
    graph.replay()
    fixed.fill([torch.tensor([5.0, 0.0]), torch.tensor([4])])
    graph.replay()
    assert output.tolist() == [6, 2, 10, 0]
    other = torch.cuda.CUDAGraph()
    with torch.cuda.graph(other, pool=graph._pool):
        torch.add(fixed.tree[0], 1)
    other.replay()
    assert output.isnan().all(), "graphs of one pool share memory"


def test_a_graph_outlives_no_memory_that_it_reads(device: VirtualCuda) -> None:
    x = torch.ones(2, device="cuda")
    graph, _ = captured(partial(torch.add, x, 1))
    graph.replay()
    del x
    gc.collect()
    with pytest.raises(RuntimeError, match="memory that was freed"):
        graph.replay()


def test_ops_are_launched_as_they_were_compiled_and_give_the_references_results(device: VirtualCuda) -> None:
    x, weight = torch.randn(3, 96, device="cuda"), torch.randn(64, 96, device="cuda")
    found = ops.linear(x, weight)
    assert torch.equal(found.cpu(), reference.linear(x.cpu(), weight.cpu()))
    assert device.num_kernels == 1
    with pytest.raises(RuntimeError, match="while a graph is captured"):
        captured(lambda: ops.silu_mul(x))
    ops.silu_mul(x)
    graph, output = captured(lambda: ops.silu_mul(x))
    graph.replay()
    assert torch.equal(output.cpu(), reference.silu_mul(x.cpu()))
    listed, misplaced = _gate_kernel(48), torch.zeros(289, device="cuda")[1:]
    for kernel, rows in ((replace(listed, num_warps=8), x), (listed, misplaced)):
        with pytest.raises(AssertionError, match="no build is listed"):
            kernel.launch((3, 1), rows, output, 48)
