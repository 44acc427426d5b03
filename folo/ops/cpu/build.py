"""The C++ kernels as shared libraries: compiled once for each version of sources, flags and torch.

One makes torch operators of them, and one holds those of each instruction set that was asked for.
`python -m folo.ops.cpu.build` compiles them now, for this CPU's fastest; otherwise the first use does.
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

from folo.ops.cpu.isa import of_this_cpu

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
_UNITS = ("linear", "quantized", "attention", "sampler", "rope", "norm")
# What has nothing to gain from an instruction set is that of a lesser one.
_INSTEAD = {
    "norm": {"amx": "avx512_bf16"},
    "rope": {"amx": "avx512_bf16"},
    "sampler": {"amx": "avx512", "avx512_bf16": "avx512"},
}
# -ffp-contract=off: what a compiler fuses, it fuses here and not there. -Wno-*uninitialized: gcc 12 finds
# its own intrinsics at fault. -Wno-unknown-*: clang does not know all of these.
_COMMON = (
    "-std=c++17 -O3 -fPIC -fopenmp -ffp-contract=off -Wall -Wextra -Werror "
    "-Wno-unknown-warning-option -Wno-uninitialized -Wno-maybe-uninitialized"
)

_SANITIZERS = "-fsanitize=address,undefined"  # under FOLO_SANITIZE=1: see `make sanitize`


def _flags() -> str:
    if os.environ.get("FOLO_SANITIZE"):
        # Not optimised: over unrolled loops with a check of every access, gcc takes longer than all tests.
        return f"{_COMMON} {_SANITIZERS} -fno-sanitize-recover=undefined -g".replace("-O3", "-O0")
    return _COMMON


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why."""


def libraries(isa: str) -> tuple[Path, Path]:
    """The operators, and an instruction set's kernels; what of them is not there yet is compiled now.

    Raises:
        BuildError: there is no compiler, or it fails.
    """
    compiler = os.environ.get("CXX") or next(filter(shutil.which, ("g++", "c++", "clang++")), None)
    if compiler is None or shutil.which(compiler) is None:
        raise BuildError(f"there is no C++ compiler ({compiler or 'g++'}): install g++ or set CXX")
    key = _key(compiler)
    directory = _cache() / f"cpu-{key}"
    operators, kernels = directory / "operators.so", directory / f"kernels.{isa}.so"
    if not (operators.exists() and kernels.exists()):
        directory.mkdir(parents=True, exist_ok=True)
        with _locked(directory / "lock"):
            sources = {operators: _operators(key), kernels: _kernels(isa, key)}
            missing = {path: units for path, units in sources.items() if not path.exists()}
            if missing:  # another process may have been faster
                which = "" if operators in missing else f" for {isa}"
                print(f"folo: compiling the CPU kernels{which} (once)", file=sys.stderr)
                _compile(compiler, missing)
    return operators, kernels


def _cache() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "folo"


def _key(compiler: str) -> str:
    """What decides the libraries' bits: the sources, this file with its flags, compiler and torch."""
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


def _operators(key: str) -> dict[str, list[str]]:
    """The flags of each source of the operators."""
    root = Path(torch.__file__).parent / "include"
    flags = [
        *_flags().replace("c++17", "c++20").replace("-O3", "-O1").split(),
        f"-D_GLIBCXX_USE_CXX11_ABI={int(torch.compiled_with_cxx11_abi())}",
        f"-isystem{root}",
        f"-isystem{root / 'torch/csrc/api/include'}",
        f'-DFOLO_BUILD_KEY="{key}"',
    ]
    return dict.fromkeys(_OPERATORS, flags)


def _kernels(isa: str, key: str) -> dict[str, list[str]]:
    """The flags of each source of an instruction set's kernels."""
    isas = {unit: _INSTEAD.get(unit, {}).get(isa, isa) for unit in _UNITS}
    units = {unit: [*_flags().split(), *_ISAS[name].split()] for unit, name in isas.items()}
    namespaces = [f"-DFOLO_{unit.upper()}={name}" for unit, name in isas.items()]
    table = [*_flags().split(), f'-DFOLO_BUILD_KEY="{key}"', f'-DFOLO_NAME="{isa}"', *namespaces]
    return {**units, "table": table}


def _compile(compiler: str, libraries: dict[Path, dict[str, list[str]]]) -> None:
    """All sources of the libraries at once, those that take longest first, and then each library."""
    root = Path(torch.__file__).parent
    # torch's own OpenMP: two of them would be two pools of threads.
    openmp = [*(root / "lib").glob("libgomp*"), *(root.parent / "torch.libs").glob("libgomp*")][:1]
    linked = ["-Wl,--as-needed", f"-L{root / 'lib'}", "-ltorch_cpu", "-lc10", *map(str, openmp or ["-lgomp"])]
    sanitizers = [_SANITIZERS] if os.environ.get("FOLO_SANITIZE") else []
    with TemporaryDirectory(dir=next(iter(libraries)).parent) as directory:
        commands = [
            [compiler, *flags, "-c", f"{SOURCES / unit}.cpp", "-o", f"{directory}/{unit}.o"]
            for units in libraries.values()
            for unit, flags in units.items()
        ]
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(_run, commands))
        for path, units in libraries.items():
            objects = [f"{directory}/{unit}.o" for unit in units]
            partial = f"{directory}/{path.name}"
            _run([compiler, "-shared", *sanitizers, *objects, *linked, "-o", partial])
            os.replace(partial, path)


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stderr[-4000:]}")


if __name__ == "__main__":
    print(*libraries(of_this_cpu()[0]), sep="\n")
