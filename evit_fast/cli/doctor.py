"""Shows what this machine and this installation offer; each missing part is one sentence.

It only looks: nothing is downloaded, compiled or changed, and the exit code is 0.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import os
import platform
from collections.abc import Callable
from pathlib import Path

from evit_fast.cli.flags import add_flags, emit


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add_flags(parser, "--json")


def run(args: argparse.Namespace) -> int:
    facts = {name: _ask(probe) for name, probe in PROBES.items()}
    width = max(map(len, facts))
    emit(args, "\n".join(f"{name:<{width}}  {fact}" for name, fact in facts.items()), facts)
    return 0


def _ask(probe: Callable[[], str]) -> str:
    """A doctor never fails: what a probe raises is its answer."""
    try:
        return probe()
    except Exception as e:
        return f"cannot be asked: {type(e).__name__}: {e}"


def _evit_fast() -> str:
    import evit_fast

    return f"{evit_fast.__version__} in {Path(evit_fast.__file__).parent}"


def _python() -> str:
    return f"{platform.python_version()} on {platform.system()} {platform.machine()}"


def _processor() -> str:
    name = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.lower().startswith("model name"):
                name = line.split(":", 1)[1].strip()
                break
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{name}, {usable} of {os.cpu_count()} logical processors usable here"


def _torch() -> str:
    import torch

    return f"{torch.__version__}, {torch.get_num_threads()} threads"


def _native() -> str:
    try:
        from evit_fast import _native
    except ImportError as e:
        return f"missing: {e}; build it with `pip install .` (or `make build`)"
    return f"loaded from {_native.__file__}"


def _instruction_sets() -> str:
    try:
        from evit_fast import _native
    except ImportError:
        return "unknown without the native library"
    cap = os.environ.get("EVIT_FAST_MAX_ISA")
    limit = f", capped by EVIT_FAST_MAX_ISA={cap}" if cap else ""
    return f"uses {_native.isa()}; this machine has {', '.join(_native.isas())}{limit}"


def _gpu() -> str:
    import torch

    if torch.version.cuda is None:
        return "this torch is built without CUDA; models run on the CPU"
    if not torch.cuda.is_available():
        return f"torch has CUDA {torch.version.cuda} but finds no usable GPU"
    cards = []
    for i in range(torch.cuda.device_count()):
        p = torch.cuda.get_device_properties(i)
        memory = f"{p.total_memory / 2**30:.0f} GiB"
        cards.append(f"{p.name} (sm_{p.major}{p.minor}, {memory}): {_column(i)}")
    return "; ".join(cards)


def _column(index: int) -> str:
    """Which column serves a GPU, asked for the smallest program there is."""
    import torch

    from evit_fast import columns, gpu

    place = gpu.place(torch.device("cuda", index))
    column, why = columns.choose("classifier C=64 N=0 at=0", place)
    return f"the {column} column" + (f" ({why})" if why else "")


def _driver() -> str:
    version = ctypes.c_int()
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "no NVIDIA driver (libcuda.so.1) on this machine"
    if cuda.cuDriverGetVersion(ctypes.byref(version)) != 0:
        return "libcuda.so.1 is there but gives no version"
    return f"takes CUDA up to {version.value // 1000}.{version.value % 1000 // 10}"


def _nvrtc() -> str:
    from evit_fast import nvrtc

    if found := nvrtc.found():
        return "; ".join(map(str, found))
    return f"not installed, and only CUDA kernels need it: pip install {nvrtc.WHEEL}"


def _cuda_kernels() -> str:
    from evit_fast.cuda import column
    from evit_fast.ops import OPS

    missing = []
    for op in OPS:
        try:
            column.kernels(op, 70)
        except ModuleNotFoundError:
            missing.append(op)
    have = ", ".join(op for op in OPS if op not in missing)
    return have + (f"; none in this version for {', '.join(missing)}" if missing else "")


def _cubins() -> str:
    from evit_fast import cubins

    folder = cubins.folder()
    files = list(folder.glob("*.cubin"))
    size = sum(f.stat().st_size for f in files) / 2**20
    return f"{folder} ({len(files)} kernels, {size:.0f} MiB)"


def _optional(package: str, purpose: str) -> Callable[[], str]:
    def probe() -> str:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return f"not installed; {purpose} needs it"

    return probe


def _weights() -> str:
    from evit_fast import hub

    files = [f.name for s in hub.SUFFIXES for f in sorted(hub.folder().glob(f"*{s}"))]
    return f"{hub.folder()} ({', '.join(files) or 'empty'})"


def _cache(variable: str, default: str) -> Callable[[], str]:
    def probe() -> str:
        folder = Path(os.environ.get(variable) or Path.home() / default)
        if not folder.is_dir():
            return f"{folder} (empty)"
        size = sum(f.stat().st_size for f in folder.rglob("*") if f.is_file())
        return f"{folder} ({size / 2**20:.0f} MiB)"

    return probe


PROBES: dict[str, Callable[[], str]] = {
    "evit_fast": _evit_fast,
    "python": _python,
    "processor": _processor,
    "torch": _torch,
    "native library": _native,
    "instruction sets": _instruction_sets,
    "GPU": _gpu,
    "GPU driver": _driver,
    "NVRTC": _nvrtc,
    "CUDA kernels": _cuda_kernels,
    "cubin cache": _cubins,
    "triton": _optional("triton", "the Triton column on GPUs"),
    "timm": _optional("timm", "accelerating a model that timm made"),
    "huggingface_hub": _optional("huggingface_hub", "pretrained=True"),
    "onnx": _optional("onnx", "ONNX export"),
    "onnxruntime": _optional("onnxruntime", "the comparison with ONNX Runtime"),
    "pretrained weights": _weights,
    "hub cache": _cache("HF_HOME", ".cache/huggingface"),
    "triton cache": _cache("TRITON_CACHE_DIR", ".triton/cache"),
}
