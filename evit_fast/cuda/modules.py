"""Kernels on devices: compiled through the cubin cache, loaded once per device and process.

A child that this process forks loads its own: what the driver gave belongs to the parent.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache

from evit_fast import _native, cubins, gpu, nvrtc
from evit_fast.cuda.kernels import Kernel
from evit_fast.cuda.sources import unit

_lock = threading.RLock()
_contexts: dict[int, int] = {}  # by device
_functions: dict[tuple[int, int, Kernel], int] = {}  # by device, architecture, kernel
_compiled: set[tuple[int, Kernel]] = set()


def forget() -> None:
    """Knows nothing of any device any more; what is loaded stays loaded."""
    global _lock
    _lock = threading.RLock()
    for known in (_contexts, _functions, _compiled):
        known.clear()
    missing.cache_clear()


@lru_cache(maxsize=16)
def missing(arch: int) -> str:
    """Why no CUDA kernel can run on this machine's sm_<arch>, "" where they can: a driver, and
    either an NVRTC or a cache that was filled elsewhere.
    """
    try:
        _native.cuda_driver()
        nvrtc.find(arch)
    except RuntimeError as e:
        if not str(e).startswith("nvrtc: ") or not cubins.default().holds(arch):
            return str(e)
    return ""


def compile_all(kernels: Iterable[Kernel], arch: int) -> None:
    """Those that the cache lacks are compiled, in threads. Errors: as cubins.get."""
    new = [kernel for kernel in dict.fromkeys(kernels) if (arch, kernel) not in _compiled]
    if new:
        workers = min(len(new), len(os.sched_getaffinity(0)))
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(lambda kernel: cubins.get(unit(kernel, arch)), new))
        _compiled.update((arch, kernel) for kernel in new)


def context(device: int) -> int:
    """The driver's handle of torch's context on a device. RuntimeError: the driver gives none."""
    with _lock:
        if device not in _contexts:
            _contexts[device] = _native.cuda_context(device)
        return _contexts[device]


def function(kernel: Kernel, arch: int, device: int, load: bool = True) -> int:
    """The driver's handle of a kernel on a device. RuntimeError: with load=False, one that is not
    loaded yet: the stream is being captured, and loading would break the capture.
    """
    key = (device, arch, kernel)
    found = _functions.get(key)
    if found is not None:
        return found
    if not load:
        raise RuntimeError(
            f"evit_fast: this forward is being captured into a CUDA graph, but {kernel.name} is "
            "not on the device yet; run the model once on such an input before the capture"
        )
    with _lock:
        if key not in _functions:
            code = cubins.get(unit(kernel, arch))
            _functions[key] = _native.cuda_kernel(context(device), code, kernel.name)
        return _functions[key]


gpu.after_fork(forget)
