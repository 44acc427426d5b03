"""Tensors that say they are on "cuda" and compute on the host, and the device that they are on."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from importlib import import_module
from typing import Any, ClassVar
from weakref import WeakSet, WeakValueDictionary, finalize

import torch
import triton_source
from graphs import spoil
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode
from virtual_graphs import Graph, Memory, Pool

from folo.ops.cuda.kernel import Kernel

aten = torch.ops.aten
_CUDA = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
_UNWRITTEN = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided")
_INDEXING = (aten.index.Tensor, aten.index_put.default, aten.index_put_.default)
_WAITING = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
_STRIDED = ("k_cache", "v_cache")  # arguments of kernels that need not be contiguous
_MOST_PROGRAMS = (2**31 - 1, 65535, 65535)


class CudaTensor(Tensor):
    """A tensor on the device. host: its elements. memory: what it shares with its views."""

    host: Tensor
    memory: Memory
    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore

    @staticmethod
    def __new__(cls, host: Tensor, memory: Memory) -> CudaTensor:
        layout = {"strides": host.stride(), "storage_offset": host.storage_offset(), "dtype": host.dtype}
        place = torch.device("cuda", 0)
        made: Any = Tensor._make_wrapper_subclass(cls, host.shape, **layout, device=place)  # pyright: ignore
        made.host, made.memory = host, memory
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func} on a tensor of a device that is gone")

    def data_ptr(self) -> int:
        return self.host.data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.host.untyped_storage()

    def tolist(self) -> Any:
        return self.cpu().tolist()


class Generator(torch.Generator):
    """In place of torch.Generator: random numbers for one device."""

    of_cuda: ClassVar[WeakValueDictionary[int, Generator]] = WeakValueDictionary()  # torch hands on copies

    def __new__(cls, device: Any = "cpu") -> Generator:
        return super().__new__(cls, "cpu")  # pyright: ignore[reportCallIssue]

    def __init__(self, device: Any = "cpu") -> None:
        self._device = torch.device(device)
        if self._device.type == "cuda":
            self.of_cuda[_address(self)] = self

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self._device


class VirtualCuda(TorchDispatchMode):
    """The device, while it is entered.

    waits: the calls that made the host wait for all that was launched, unless `may_wait` is False. memories:
    by the addresses of their storages. reserved: bytes, of those that are no longer in use too, as torch's
    allocator keeps them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.launched = self.finished = self.num_kernels = 0
        self.may_wait = True
        self._later = deque[tuple[int, Callable[[], object]]]()
        self._pinned = WeakSet[Any]()
        self.memories = WeakValueDictionary[int, Memory]()
        self.allocated = self.reserved = 0
        self._capturing: Graph | None = None
        self._loaded = set[str]()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = pytree.tree_leaves((args, kwargs))
        mine = any(isinstance(leaf, CudaTensor) for leaf in leaves)
        on_cuda = mine if kwargs.get("device") is None else kwargs["device"].type == "cuda"
        if (mine or on_cuda) and func._can_decompose():
            with self:
                return func.decompose(*args, **kwargs)
        if func is aten._to_copy.default and on_cuda != mine:
            return self._moved(on_cuda, *args, **kwargs)
        if func is aten.copy_.default and len({isinstance(tensor, CudaTensor) for tensor in args[:2]}) == 2:
            return self._copied(*args, **kwargs)
        if mine and func.namespace in ("folo", "folo_reference"):
            return self._own(func, args, kwargs)
        self._check(func, args, leaves, on_cuda)
        if not mine and not on_cuda:
            return self._on_host(func, args, kwargs)
        if self._capturing is not None and not func.is_view:
            return self._recorded(self._capturing, func, args, kwargs)
        self.launched += 1
        found = func(*plain(args), **plain(kwargs))
        return self._wrapped(func, found, leaves) if on_cuda else found

    def wait(self, what: str) -> None:
        """The host waits for all that was launched, in a way that set_sync_debug_mode("error") refuses."""
        if self._capturing is not None:
            raise RuntimeError(f"operation not permitted when stream is capturing: {what}")
        if not self.may_wait:
            raise RuntimeError(f"called a synchronizing CUDA operation: {what}")
        self.waits.append(what)
        self.finish(self.launched)

    def finish(self, at: int) -> None:
        """Complete what was launched up to there."""
        while self._later and self._later[0][0] <= at:
            self._later.popleft()[1]()
        self.finished = max(self.finished, at)

    def _check(self, func: Any, args: Any, leaves: list[Any], on_cuda: bool) -> None:
        for leaf in leaves:
            if isinstance(leaf, torch._C.Generator) and (_address(leaf) in Generator.of_cuda) != on_cuda:
                raise RuntimeError(f"{func}: the generator is of another device")
        if not on_cuda:
            return
        strangers = [t for t in leaves if isinstance(t, Tensor) and t.ndim and not isinstance(t, CudaTensor)]
        if func not in _INDEXING:
            if _WAITING.intersection(func.tags):
                self.wait(str(func))
        elif isinstance(args[0], CudaTensor):
            indices = [index for index in args[1] if index is not None]
            masked = any(index.dtype == torch.bool for index in indices)
            filled = len(args) > 2 and args[2].numel() == 1  # which torch makes a masked_fill
            if strangers or (masked and not filled):
                self.wait(str(func))
            strangers = [t for t in strangers if all(t is not index for index in indices)]
        if strangers:
            raise RuntimeError(f"{func}: Expected all tensors to be on the same device, found cuda:0 and cpu")

    def _on_host(self, func: Any, args: Any, kwargs: Any) -> Any:
        pinned = kwargs.get("pin_memory")
        found = func(*args, **(kwargs | {"pin_memory": False} if pinned else kwargs))
        if pinned:
            self._pinned.add(found.untyped_storage())
        return found

    def _moved(
        self, to_cuda: bool, source: Tensor, dtype: Any = None, non_blocking: bool = False, **_: Any
    ) -> Tensor:
        made = torch.empty_like(plain(source), dtype=dtype)
        if non_blocking and not to_cuda:  # torch takes pinned memory then
            self._pinned.add(made.untyped_storage())
        return self._copied(self._new(made) if to_cuda else made, source, non_blocking)

    def _copied(self, target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        host, value = (source, None) if isinstance(target, CudaTensor) else (target, plain(source).clone())
        if self._capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing: a copy to or from the host")
        if not non_blocking or host.untyped_storage() not in self._pinned:
            self.wait("a copy to or from the host")
            plain(target).copy_(plain(source))
            return target
        self.launched += 1
        if value is None:
            plain(target).copy_(source)
            self._later.append((self.launched, partial(_check_unchanged, source, source.clone())))
        else:
            spoil(target)
            self._later.append((self.launched, partial(target.copy_, value)))
        return target

    def _new(self, host: Tensor) -> CudaTensor:
        storage = host.untyped_storage()
        memory = self.memories.get(storage._cdata)
        if memory is None:
            memory = self.memories[storage._cdata] = Memory(storage.nbytes())
            self._use(memory.num_bytes)
            finalize(memory, self._use, -memory.num_bytes)
            if self._capturing is not None:
                self._capturing.allocated(memory, host)
        return CudaTensor(host, memory)

    def _use(self, num_bytes: int) -> None:
        self.allocated += num_bytes
        self.reserved = max(self.reserved, self.allocated)

    def empty_cache(self) -> None:
        self.reserved = self.allocated

    def _wrapped(self, func: Any, found: Any, leaves: list[Any]) -> Any:
        """Results as tensors of the device; what was changed in place is what was given."""
        given = {id(leaf.host): leaf for leaf in leaves if isinstance(leaf, CudaTensor)}
        if func.overloadpacket.__name__ in _UNWRITTEN:
            spoil(found)
        return pytree.tree_map_only(Tensor, lambda t: given[id(t)] if id(t) in given else self._new(t), found)

    def _recorded(self, graph: Graph, func: Any, args: Any, kwargs: Any) -> Any:
        """Record the call: its shapes are worked out and nothing is computed, as a capture runs no kernel."""
        leaves = pytree.tree_leaves((args, kwargs))
        shapes: dict[int, Tensor] = {}

        def shape_of(leaf: Any) -> Any:
            if isinstance(leaf, torch.device):
                return torch.device("meta")
            if isinstance(leaf, Tensor) and id(leaf) not in shapes:
                empty = torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
                shapes[id(leaf)] = empty
            return shapes.get(id(leaf), leaf)

        found = func(*pytree.tree_map(shape_of, args), **pytree.tree_map(shape_of, kwargs))
        given = {id(shapes[id(leaf)]): leaf for leaf in leaves if isinstance(leaf, CudaTensor)}
        fresh: list[tuple[int, Tensor]] = []
        results: list[Tensor] = []
        for number, shape in enumerate(pytree.tree_leaves(found)):
            result = given.get(id(shape))
            if result is None:
                host = torch.empty_strided(shape.shape, shape.stride(), dtype=shape.dtype)
                spoil(host)
                fresh.append((number, host))
                result = self._new(host)
            results.append(result)
        inputs = plain(args), plain(kwargs)

        def run() -> None:
            computed = pytree.tree_leaves(func(*inputs[0], **inputs[1]))
            for number, host in fresh:
                host.copy_(computed[number])

        if func.overloadpacket.__name__ not in _UNWRITTEN:
            graph.record(run, [leaf.memory for leaf in (*leaves, *results) if isinstance(leaf, CudaTensor)])
        return pytree.tree_unflatten(results, pytree.tree_structure(found))

    def _own(self, func: Any, args: Any, kwargs: Any) -> Any:
        """Run the op as registered for CUDA; if it launched a kernel, the result is the reference's."""
        before = self.num_kernels
        with self:
            found = func.redispatch(_CUDA, *args, **kwargs)
        if self.num_kernels == before:
            return found
        results: list[Any] = pytree.tree_leaves(found)
        oracle = getattr(torch.ops.folo_reference, func.overloadpacket.__name__).default
        inputs = plain(args), plain(kwargs)

        def run() -> None:
            for mine, exact in zip(results, pytree.tree_leaves(oracle(*inputs[0], **inputs[1])), strict=True):
                assert (mine.shape, mine.dtype) == (exact.shape, exact.dtype)
                mine.host.copy_(exact)

        if self._capturing is None:
            run()
        else:
            leaves = pytree.tree_leaves((args, kwargs, results))
            self._capturing.record(run, [leaf.memory for leaf in leaves if isinstance(leaf, CudaTensor)])
        return found

    def launch(self, function: Any, *args: Any, grid: tuple[int, ...], warmup: bool, **options: Any) -> None:
        """In place of triton's JITFunction.run."""
        assert options.pop("enable_fp_fusion") is False
        assert all(0 < size <= most for size, most in zip(grid, _MOST_PROGRAMS, strict=False)), grid
        kernel = Kernel(function, options, options.pop("num_warps"), options.pop("num_stages"))
        for name, arg in zip(function.arg_names, args, strict=False):
            if isinstance(arg, Tensor):
                assert isinstance(arg, CudaTensor), f"{name} is not on the device"
                assert arg.is_contiguous() or name in _STRIDED, f"{name} is not contiguous"
        key = triton_source.key(kernel, triton_source.of_launch(kernel, *args))
        assert key in _builds(function.__module__), f"no build is listed for {key}"
        if self._capturing is not None and key not in self._loaded:
            raise RuntimeError(f"a kernel is compiled and loaded while a graph is captured: {key}")
        self._loaded.add(key)
        self.num_kernels += 1
        self.launched += 1

    @contextmanager
    def captured(self, graph: Graph, pool: Pool | None = None, stream: Any = None) -> Iterator[None]:
        """In place of torch.cuda.graph."""
        self.finish(self.launched)
        graph.begin(Pool() if pool is None else pool)
        self._capturing = graph
        try:
            yield
        finally:
            self._capturing = None


def _address(generator: Any) -> int:
    return generator._cdata


def plain(tree: Any) -> Any:
    """What the host computes with in place of tensors and devices."""

    def on_host(leaf: Any) -> Any:
        if isinstance(leaf, torch.device):
            return torch.device("cpu")
        return leaf.host if isinstance(leaf, CudaTensor) else leaf

    return pytree.tree_map(on_host, tree)


def _check_unchanged(source: Tensor, before: Tensor) -> None:
    if not torch.equal(source.view(torch.uint8), before.view(torch.uint8)):
        raise RuntimeError("pinned memory was changed before it was copied to the device")


@cache
def _builds(module: str) -> set[str]:
    builds = import_module(module).builds()
    return {triton_source.key(build.kernel, triton_source.of_build(build)) for build in builds}
