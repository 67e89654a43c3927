"""Builds device code with g++ for the emulator."""

from __future__ import annotations

import ctypes
from pathlib import Path

from tests.native_build import ROOT, run

FLAGS = (
    "-std=c++17", "-O1", "-g", "-fno-strict-aliasing", "-Wall", "-Wextra", "-Werror",
    f"-I{ROOT / 'csrc/cuda'}", f"-I{ROOT / 'tests/emulator'}",
)  # fmt: skip


def compile_emulated(out: Path, source: str | Path, *flags: str) -> Path:
    """The emulator's runtime (never with a sanitizer of `flags`) and one file of device code."""
    runtime = out.with_suffix(".runtime.o")
    shared = [flag for flag in flags if not flag.startswith("-fsanitize")]
    run("g++", *FLAGS, *shared, "-c", ROOT / "tests/emulator/emulator.cpp", "-o", runtime)
    run("g++", *FLAGS, *flags, ROOT / source, runtime, "-o", out)
    return out


def library(out: Path, source: str | Path, *flags: str) -> ctypes.CDLL:
    return ctypes.CDLL(str(compile_emulated(out, source, "-fPIC", "-shared", *flags)))
