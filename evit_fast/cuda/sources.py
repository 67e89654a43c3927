"""The CUDA sources inside the native library, and a kernel as a unit of the cubin cache."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache, lru_cache

from evit_fast import _native
from evit_fast.cubins import Unit
from evit_fast.cuda.kernels import Kernel

OPTIONS = ("--std=c++20",)  # template parameters of class type
_INCLUDE = re.compile(r'^#include "(.+)"$', re.M)


@cache
def texts() -> Mapping[str, str]:
    """csrc/cuda/*.cuh as they were when the native library was built, by file name."""
    return _native.cuda_sources()


def headers(source: str) -> dict[str, str]:
    """Those that a source includes, directly or not: an edit elsewhere compiles nothing anew."""
    found, rest = {}, [source]
    while rest:
        for name in _INCLUDE.findall(rest.pop()):
            if name in texts() and name not in found:
                found[name] = texts()[name]
                rest.append(found[name])
    return found


@lru_cache(maxsize=4096)
def unit(kernel: Kernel, arch: int) -> Unit:
    """What NVRTC compiles for a kernel. arch: as 90, of the device."""
    source = kernel.source
    return Unit(source, f"{kernel.name}.cu", arch, OPTIONS, headers(source))
