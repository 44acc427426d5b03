"""The C++ kernels as a shared library: compiled once for each version of sources, flags and torch.

`python -m folo.ops.cpu.build` compiles them now; otherwise the first use does.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

SOURCES = Path(__file__).parent
_AVX2 = "-DFOLO_AVX2 -mavx2 -mfma -mf16c"
_AVX512 = "-mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c -mprfchw"
_ISAS = {
    "avx2": _AVX2,
    "avx512": f"-DFOLO_AVX512 {_AVX512}",
    "avx512_bf16": f"-DFOLO_AVX512_BF16 {_AVX512} -mavx512bf16",
    "amx": f"-DFOLO_AMX {_AVX512} -mavx512bf16 -mamx-tile -mamx-bf16",
}
_OPERATORS = ("layers", "library")
# What has nothing to gain from an instruction set is not compiled for it.
_UNITS = {
    "linear": ("avx2", "avx512", "avx512_bf16", "amx"),
    "quantized": ("avx2", "avx512", "avx512_bf16", "amx"),
    "attention": ("avx2", "avx512", "avx512_bf16", "amx"),
    "norm": ("avx2", "avx512", "avx512_bf16"),
    "rope": ("avx2", "avx512", "avx512_bf16"),
    "sampler": ("avx2", "avx512"),
}
# -ffp-contract=off: what a compiler fuses, it fuses here and not there. -Wno-*uninitialized: gcc 12 finds
# its own intrinsics at fault.
_COMMON = (
    "-std=c++17 -O3 -fPIC -fopenmp -ffp-contract=off -Wall -Wextra -Werror -Wno-uninitialized "
    "-Wno-maybe-uninitialized"
)


_SANITIZERS = "-fsanitize=address,undefined"  # under FOLO_SANITIZE=1: see `make sanitize`


def _flags() -> str:
    if os.environ.get("FOLO_SANITIZE"):
        # Not optimised: over unrolled loops with a check of every access, gcc takes longer than all tests.
        return f"{_COMMON} {_SANITIZERS} -fno-sanitize-recover=undefined -g".replace("-O3", "-O0")
    return _COMMON


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why."""


def library() -> Path:
    """The compiled library, which is compiled now if it is not there.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if compiler is None or shutil.which(compiler) is None:
        raise BuildError(f"there is no C++ compiler ({compiler or 'g++'}): install g++ or set CXX")
    directory = _cache() / f"cpu-{_key(compiler)}"
    path = directory / "kernels.so"
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / "lock"):
            if not path.exists():  # another process may have been faster
                print("folo: compiling the CPU kernels (once)", file=sys.stderr)
                _compile(compiler, path, _key(compiler))
    return path


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "folo"


def _key(compiler: str) -> str:
    """What decides the library's bits: the sources, this file with its flags, compiler and torch."""
    digest = sha256(f"{torch.__version__} {_version(compiler)} {_flags()}".encode())
    for source in sorted([*SOURCES.glob("*.cpp"), *SOURCES.glob("*.h"), Path(__file__)]):
        digest.update(source.name.encode() + source.read_bytes())
    return digest.hexdigest()[:16]


def _version(compiler: str) -> str:
    return subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _compile(compiler: str, target: Path, key: str) -> None:
    root, flags = Path(torch.__file__).parent, _flags()
    include = [f"-isystem{root / 'include'}", f"-isystem{root / 'include/torch/csrc/api/include'}"]
    # torch's own OpenMP: two of them would be two pools of threads.
    openmp = [*(root / "lib").glob("libgomp*"), *(root.parent / "torch.libs").glob("libgomp*")][:1]
    with TemporaryDirectory(dir=target.parent) as directory:
        commands: dict[str, list[str]] = {}
        # The least instruction set first: of what the standard library's templates come to in several
        # objects, the linker keeps the first, which has to run wherever the others do.
        for isa in _ISAS:
            for unit in (unit for unit, isas in _UNITS.items() if isa in isas):
                out = f"{directory}/{unit}.{isa}.o"
                commands[out] = [*flags.split(), *_ISAS[isa].split(), "-c", f"{SOURCES / unit}.cpp"]
        abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}"
        glue = [
            *flags.replace("c++17", "c++20").replace("-O3", "-O1").split(),
            abi,
            *include,
            f'-DFOLO_BUILD_KEY="{key}"',
        ]
        operators = {f"{directory}/{unit}.o": [*glue, "-c", f"{SOURCES / unit}.cpp"] for unit in _OPERATORS}
        commands = {**operators, **commands}  # those that take longest first
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(lambda item: _run([compiler, *item[1], "-o", item[0]]), commands.items()))
        partial = f"{directory}/kernels.so"
        libraries = [
            *([_SANITIZERS] if os.environ.get("FOLO_SANITIZE") else []),
            f"-L{root / 'lib'}",
            "-ltorch_cpu",
            "-lc10",
            *map(str, openmp or ["-lgomp"]),
        ]
        _run([compiler, "-shared", *commands, *libraries, "-o", partial])
        os.replace(partial, target)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    print(library())
