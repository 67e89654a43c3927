"""Builds device code with g++ for the emulator, and runs launches there."""

from __future__ import annotations

import ctypes
import hashlib
import os
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

from evit_fast.cuda.kernels import Kernel, Launch
from tests.native_build import ROOT, run

HEADERS = ROOT / "csrc/cuda"
EMULATOR = ROOT / "tests/emulator"
FLAGS = (
    "-std=c++20", "-O1", "-g", "-fPIC", "-fno-strict-aliasing", "-ffp-contract=off",
    "-Wall", "-Wextra", "-Werror", f"-I{EMULATOR}",
)  # fmt: skip
ORDERS = {"ascending": 0, "descending": 1, "shuffled": 2}


class Build(NamedTuple):
    """Flags of the device code, of the emulator's runtime and of the linker; the runtime's files.

    The runtime never has -fsanitize. `counts` has what g++ calls for ThreadSanitizer, and links
    its own counters in ThreadSanitizer's place.
    """

    device: tuple[str, ...] = ()
    runtime: tuple[str, ...] = ()
    link: tuple[str, ...] = ()
    files: tuple[str, ...] = ("emulator.cpp",)


ADDRESS = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
THREAD = ("-fsanitize=thread",)
COUNTS = ("-DEMULATOR_COUNTS",)
BUILDS = {
    "plain": Build(),
    "asan": Build(device=ADDRESS, link=ADDRESS),
    "tsan": Build(device=THREAD, link=THREAD),
    "counts": Build((*THREAD, *COUNTS), COUNTS, files=("emulator.cpp", "counts.cpp")),
}

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


def compile_emulated(
    out: Path, source: str | Path, *flags: str, build: str = "plain", headers: Path = HEADERS
) -> Path:
    """One file of device code and the emulator's runtime as the shared library `out`.

    headers: the folder that stands for csrc/cuda.
    """
    b = BUILDS[build]
    device = out.with_suffix(".o")
    run("g++", *FLAGS, f"-I{headers}", *b.device, *flags, "-c", ROOT / source, "-o", device)
    run("g++", "-shared", *b.link, device, *_runtime(build), "-o", out)
    return out


def library(out: Path, source: str | Path, *flags: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_emulated(out, source, *flags)))


def kernel_library(kernel: Kernel, build: str = "plain", headers: Path = HEADERS) -> Path:
    """A kernel for the emulator, with ENTRY; compiled once.

    Environment: EVIT_FAST_EMULATED, a folder that keeps what was compiled; a change of the headers
    or of the emulator compiles again.
    """
    text = kernel.source + ENTRY.format(name=kernel.name, family=kernel.family)
    key = hashlib.sha256((text + _digest(headers) + _digest(EMULATOR)).encode())
    out = _folder() / f"{kernel.name}-{build}-{key.hexdigest()[:16]}.so"
    if not out.exists():
        with TemporaryDirectory(dir=_folder()) as folder:
            source = Path(folder, "kernel.cpp")
            source.write_text(text)
            flags = ("-Wno-unused-parameter",)
            built = compile_emulated(
                source.with_suffix(".so"), source, *flags, build=build, headers=headers
            )
            built.rename(out)
    return out


@cache
def emulated(kernel: Kernel, build: str = "plain") -> ctypes.CDLL:
    built = ctypes.CDLL(str(kernel_library(kernel, build)))
    built.args_bytes.restype = ctypes.c_long
    return built


def emulate(
    launches: list[Launch], order: str = "ascending", seed: int = 0, build: str = "plain"
) -> None:
    """Runs launches one after the other, on CPU tensors."""
    for launch in launches:
        built = emulated(launch.kernel, build)
        words = launch.args()
        assert built.args_bytes() == 8 * len(words), f"{launch.kernel.name}: Args differ"
        built.launch(
            (ctypes.c_uint64 * len(words))(*words),
            *map(ctypes.c_long, (launch.B, launch.H, launch.W)),
            ORDERS[order], ctypes.c_uint(seed),
        )  # fmt: skip


_temporary = TemporaryDirectory(prefix="evit_fast_emulated_")


def _folder() -> Path:
    folder = Path(os.environ.get("EVIT_FAST_EMULATED") or _temporary.name)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@cache
def _runtime(build: str) -> tuple[Path, ...]:
    objects = []
    for file in BUILDS[build].files:
        out = Path(_temporary.name, f"{build}-{file}.o")
        run("g++", *FLAGS, *BUILDS[build].runtime, "-O2", "-c", EMULATOR / file, "-o", out)
        objects.append(out)
    return tuple(objects)


@cache
def _digest(folder: Path) -> str:
    files = sorted(f for f in folder.iterdir() if f.suffix in (".cuh", ".h", ".cpp"))
    digest = hashlib.sha256("".join(FLAGS).encode())
    for file in files:
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return digest.hexdigest()
