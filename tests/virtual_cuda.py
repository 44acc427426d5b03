"""A CUDA device for machines that have none: all that a GPU run takes runs on it, but for the arithmetic.

Its tensors say that they are on "cuda"; torch computes on the host, with what they hold. What CUDA refuses is
refused: tensors of two devices in one call, a generator of another device, waiting for the device while a
graph is captured. What CUDA leaves open is spoilt: memory that nothing was written to, and a copy to the host
until it was waited for. Kernels are launched up to Triton's compiler: a launch is checked, and an op's
result is the reference's.

`pytest -p virtual_cuda` has it for all tests of a process, `entered()` for what runs within. torch.compile
leaves functions as they are there.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from triton.runtime.jit import JITFunction
from virtual_graphs import Graph, Pool
from virtual_tensors import Generator, VirtualCuda

_TOTAL = 1 << 26  # bytes of the device's memory


class Event:
    """In place of torch.cuda.Event."""

    def __init__(self, device: VirtualCuda, enable_timing: bool = False) -> None:
        self._device, self._timed = device, enable_timing
        self._at, self._time = 0, 0.0

    def record(self) -> None:
        self._at, self._time = self._device.launched, time.perf_counter()

    def synchronize(self) -> None:
        self._device.finish(self._at)

    def elapsed_time(self, end: Event) -> float:
        """Milliseconds."""
        if not (self._timed and end._timed and end._at <= self._device.finished):
            raise RuntimeError("both events must be of enable_timing=True, and have been waited for")
        return 1e3 * (end._time - self._time)


def _stand_ins(device: VirtualCuda) -> dict[str, Any]:
    """By their names in torch.cuda."""

    def allow_waits(mode: str) -> None:
        device.may_wait = mode != "error"

    properties = SimpleNamespace(name="virtual", major=9, minor=0, total_memory=_TOTAL)
    return {
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "device_of": lambda tensor: nullcontext(),
        "get_device_name": lambda _=None: properties.name,
        "get_device_capability": lambda _=None: (properties.major, properties.minor),
        "get_device_properties": lambda _=None: properties,
        "mem_get_info": lambda _=None: (_TOTAL - device.reserved, _TOTAL),
        "memory_allocated": lambda _=None: device.allocated,
        "memory_reserved": lambda _=None: device.reserved,
        "empty_cache": device.empty_cache,
        "synchronize": lambda _=None: device.finish(device.launched),
        "set_sync_debug_mode": allow_waits,
        "Event": partial(Event, device),
        "CUDAGraph": Graph,
        "Stream": object,
        "graph": device.captured,
        "graph_pool_handle": Pool,
    }


@cache
def _register_guard() -> None:
    """A build of torch without CUDA does not know what CUDA's current device is."""
    if torch.version.cuda is not None:
        torch._C._ensureCUDADeviceGuardSet()
        return
    root, source = Path(torch.__file__).parent, Path(__file__).with_name("cuda_guard.cpp")
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "cuda_guard.so"
        command = [os.environ.get("CXX", "g++"), "-std=c++20", "-shared", "-fPIC", f"-I{root / 'include'}"]
        subprocess.run([*command, source, f"-L{root / 'lib'}", "-lc10", "-o", target], check=True)
        torch.ops.load_library(target)


@contextmanager
def entered() -> Iterator[VirtualCuda]:
    """The device, there from here on."""
    _register_guard()
    device = VirtualCuda()
    with pytest.MonkeyPatch.context() as patch, ExitStack() as stack:
        for name, stand_in in _stand_ins(device).items():
            patch.setattr(torch.cuda, name, stand_in)
        patch.setattr(torch, "Generator", Generator)
        patch.setattr(torch, "compile", lambda function, **_: function)
        patch.setattr(JITFunction, "run", lambda *args, **options: device.launch(*args, **options))
        # torch.tensor makes a tensor on the host first, as it does for FakeTensorMode; modules are rebuilt.
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_overwrite_module_params_on_conversion, False)
        with device:
            yield device


def pytest_configure(config: pytest.Config) -> None:
    stack = ExitStack()
    stack.enter_context(entered())
    config.add_cleanup(stack.close)
