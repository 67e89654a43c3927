"""Launches in a process of their own, under a sanitizer or none: what the process said of them."""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from torch import Tensor

from evit_fast.cuda.kernels import Launch
from tests.emulator.building import BUILDS, HEADERS, ORDERS, kernel_library
from tests.native_build import ROOT, compile_cpp

EMULATOR_STATUS = 3  # the emulator's own checks
OPTIONS = {
    "TSAN_OPTIONS": "exitcode=66 halt_on_error=1",
    "ASAN_OPTIONS": "exitcode=67 detect_leaks=0",
    "UBSAN_OPTIONS": "exitcode=68 print_stacktrace=1",
}
SANITIZERS = {66: "tsan", 67: "asan", 68: "asan"}


class Outcome(NamedTuple):
    """said: 'clean', 'emulator', 'tsan' or 'asan'; report: stderr."""

    said: str
    report: str


def run_apart(
    launches: list[Launch],
    build: str = "plain",
    order: str = "ascending",
    seed: int = 1,
    headers: Path = HEADERS,
) -> Outcome:
    """Runs launches, on copies of their tensors; where clean, the copies are copied back."""
    with TemporaryDirectory(prefix="evit_fast_case_") as folder:
        case = Path(folder, "case")
        tensors = _write(case, launches, build, order, seed, headers)
        done = subprocess.run(
            # ThreadSanitizer wants addresses where it expects them.
            ["setarch", "-R", str(_runner(build)), str(case)],
            env=os.environ | OPTIONS, capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        if done.returncode == 0 and not done.stderr:
            _read(case.with_suffix(".data"), tensors)
            return Outcome("clean", "")
    if done.returncode == EMULATOR_STATUS:
        return Outcome("emulator", done.stderr)
    said = SANITIZERS.get(done.returncode, f"status {done.returncode}")
    return Outcome(said, done.stderr)


def _write(
    case: Path, launches: list[Launch], build: str, order: str, seed: int, headers: Path
) -> list[Tensor]:
    tensors: dict[int, Tensor] = {}  # by address: the whole storages, as bytes
    lines = []
    for launch in launches:
        words = []
        for word in launch.words:
            if not isinstance(word, Tensor):
                words.append(str(int(word)))
                continue
            storage = word.untyped_storage()
            whole = torch.empty(0, dtype=torch.uint8).set_(storage)
            tensors.setdefault(storage.data_ptr(), whole)
            index = list(tensors).index(storage.data_ptr())
            words.append(f"b{index}+{word.data_ptr() - storage.data_ptr()}")
        built = kernel_library(launch.kernel, build, headers)
        numbers = (ORDERS[order], seed, launch.B, launch.H, launch.W, len(words))
        lines.append(" ".join(["launch", str(built), *map(str, numbers), *words]))
    found = list(tensors.values())
    case.write_text("\n".join([f"buffer {t.numel()}" for t in found] + lines) + "\n")
    with open(case.with_suffix(".data"), "wb") as file:
        for tensor in found:
            file.write(tensor.numpy().tobytes())
    return found


def _read(path: Path, tensors: list[Tensor]) -> None:
    with open(path, "rb") as file:
        for tensor in tensors:
            data = bytearray(file.read(tensor.numel()))
            if data:
                tensor.copy_(torch.frombuffer(data, dtype=torch.uint8))


_folder = TemporaryDirectory(prefix="evit_fast_runner_")


@cache
def _runner(build: str) -> Path:
    source = str(Path(__file__).with_name("runner.cpp").relative_to(ROOT))
    flags = (*BUILDS[build].link, "-ldl")
    return compile_cpp(Path(_folder.name, build), source, flags=flags)
