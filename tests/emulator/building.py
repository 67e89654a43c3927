"""Builds device code with g++ for the emulator, and runs launches there."""

from __future__ import annotations

import ctypes
import hashlib
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from evit_fast.cuda.kernels import Kernel, Launch
from tests.native_build import ROOT, run

FLAGS = (
    "-std=c++20", "-O1", "-g", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror",
    f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'tests/emulator'}",
)  # fmt: skip
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}

# Behind a kernel's source: one launch, with the shape that the library would ask for.
ENTRY = """
extern "C" void launch(const void* words, long B, long H, long W, int order, unsigned seed) {{
  using namespace evit::cuda;
  const LaunchShape shape = {name}_launch(kSizes, {family}, B, H, W);
  emulator::Launch launch;
  launch.grid = {{unsigned(shape.blocks_x), unsigned(shape.blocks_y), 1}};
  launch.block.x = unsigned(shape.threads);
  launch.shared_bytes = size_t(shape.shared_bytes);
  launch.order = emulator::Order(order);
  launch.seed = seed;
  Args args;
  __builtin_memcpy(&args, words, sizeof args);
  void* pointers[] = {{&args}};
  emulator::run_kernel(&{name}, launch, pointers);
}}
extern "C" long args_bytes() {{ return sizeof(evit::cuda::Args); }}
"""


_folder = TemporaryDirectory(prefix="evit_fast_emulated_")


def compile_emulated(out: Path, source: str | Path, *flags: str) -> Path:
    """The emulator's runtime (never with a sanitizer of `flags`) and one file of device code."""
    runtime = _runtime(tuple(flag for flag in flags if not flag.startswith(("-fsanitize", "-W"))))
    run("g++", *FLAGS, *flags, ROOT / source, runtime, "-o", out)
    return out


@cache
def _runtime(flags: tuple[str, ...]) -> Path:
    out = Path(_folder.name, f"runtime-{'-'.join(flags).replace('/', '_')}.o")
    flags = tuple(flag for flag in flags if flag != "-shared")
    run("g++", *FLAGS, *flags, "-c", ROOT / "tests/emulator/emulator.cpp", "-o", out)
    return out


def library(out: Path, source: str | Path, *flags: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_emulated(out, source, "-fPIC", "-shared", *flags)))


@cache
def emulated(kernel: Kernel) -> ctypes.CDLL:
    """A kernel for the emulator, compiled once per process."""
    text = kernel.source + ENTRY.format(name=kernel.name, family=kernel.family)
    name = f"{kernel.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
    source = Path(_folder.name, f"{name}.cpp")
    source.write_text(text)
    built = library(source.with_suffix(".so"), source, "-Wno-unused-parameter")
    built.args_bytes.restype = ctypes.c_long
    return built


def emulate(launches: list[Launch], order: str = "ascending", seed: int = 0) -> None:
    """Runs launches one after the other, on CPU tensors."""
    for launch in launches:
        built = emulated(launch.kernel)
        words = launch.args()
        assert built.args_bytes() == 8 * len(words), f"{launch.kernel.name}: Args differ"
        built.launch(
            (ctypes.c_uint64 * len(words))(*words),
            *map(ctypes.c_long, (launch.B, launch.H, launch.W)),
            ORDERS[order], ctypes.c_uint(seed),
        )  # fmt: skip
