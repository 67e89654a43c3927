"""Op and model cases played through the C API by a C++ program: here, and on an emulated aarch64.

The cross build is CMake's own with Debian's compiler; qemu's user mode runs what it makes.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

import evit_fast
from evit_fast import _native
from evit_fast.bench.weights import randomize
from evit_fast.fold import build, fold
from evit_fast.program import run_reference
from tests.close import budget, relative_error
from tests.native_build import ROOT, TREE, allocation_counter, run, tool
from tests.ops.columns import blob_of, oracle
from tests.ops.eager import cases

COMPILER, EMULATOR = "aarch64-linux-gnu-g++", "qemu-aarch64"
MODELS = ("M0", "M5")  # narrowest and widest
MAPS = ((13, 9), (7, 7))  # padded and cropped windows, tails of every tile; one window


def write(folder: Path, x: Tensor, want: Tensor, bound: float, **files: bytes) -> Path:
    """One case, as tests/native/play_cases.cpp reads it."""
    folder.mkdir()
    kind = int(x.dtype == torch.uint8)
    (folder / "case").write_text(f"{kind} {' '.join(map(str, x.shape))} {bound:.17g}\n")
    (folder / "x").write_bytes(x.contiguous().numpy().tobytes())
    (folder / "y").write_bytes(want.double().contiguous().numpy().tobytes())
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


def op_cases(root: Path) -> Iterator[Path]:
    for op in ("stem", "dw_ffn", "cga", "patch_merge", "classifier"):
        for case in cases(op):
            if not case.name.startswith(MODELS):
                continue
            if op == "stem":
                inputs = [torch.randn(2, 3, 33, 47), torch.randint(0, 256, (1, 3, 48, 32)).byte()]
            else:
                inputs = [torch.randn(2, H, W, case.shape.C) for H, W in MAPS]
            for x in inputs:
                want, single = oracle(case.shape, case.weights, x)
                program, blob = blob_of(case.shape, case.weights)
                yield write(
                    root / f"{op}-{case.name}-{'x'.join(map(str, x.shape))}",
                    x, want, budget(torch.float32, single),
                    program=program.encode(), blob=blob.numpy().tobytes(),
                )  # fmt: skip


def model_case(root: Path) -> Path:
    """A saved file: opened, verified and run."""
    eager = evit_fast.create_model("m0", num_classes=10).eval()
    randomize(eager)
    x = torch.randn(3, 3, 96, 80)
    folded = fold(eager, eager.config.mean, eager.config.std)
    want = run_reference(x.double(), *build(folded, torch.float64))
    single = relative_error(run_reference(x, *build(folded)), want)
    folder = write(root / "m0", x, want, budget(torch.float32, single))
    evit_fast.save(evit_fast.accelerate(eager), folder / "model.evit")
    return folder


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> list[Path]:
    torch.manual_seed(0)
    root = tmp_path_factory.mktemp("cases")
    return [*op_cases(root), model_case(root)]


def player(out: Path, compiler: str, library: Path, *flags: str) -> Path:
    source = ROOT / "tests/native/play_cases.cpp"
    warnings = ("-Wall", "-Wextra", "-Werror")
    run(
        compiler, "-std=c++17", "-O1", *warnings, "-I", ROOT / "csrc/include", source, library,
        *flags, "-pthread", "-ldl", "-o", out,
    )  # fmt: skip
    return out


def play(command: list, folders: list[Path], last_line: str = "ok", **env: str) -> set[str]:
    """The instruction sets that played every case."""
    uncapped = {"EVIT_FAST_MAX_THREADS": "256"}
    *lines, last = run(*command, *folders, env=os.environ | uncapped | env).splitlines()
    assert last == last_line
    isas = {line.split()[0] for line in lines}
    assert len(lines) == len(isas) * len(folders)
    return isas


def test_cases_on_this_machine(tmp_path, folders):
    program = player(tmp_path / "play", "g++", TREE / "libevit_fast.a")
    counter = allocation_counter(tmp_path)
    isas = play([program], folders, "ok, no allocations", LD_PRELOAD=str(counter))
    assert isas == set(_native.isas())


def test_cases_on_aarch64(tmp_path, folders):
    for program in (COMPILER, EMULATOR):
        if shutil.which(program) is None:
            pytest.skip(f"{program} is missing; apt-get install g++-aarch64-linux-gnu qemu-user")
    tree = tmp_path / "build"
    run(
        tool("cmake"), "-S", ROOT, "-B", tree, "-G", "Ninja", "-DEVIT_FAST_PYTHON=OFF",
        "-DCMAKE_SYSTEM_NAME=Linux", "-DCMAKE_SYSTEM_PROCESSOR=aarch64",
        f"-DCMAKE_CXX_COMPILER={COMPILER}", f"-DCMAKE_MAKE_PROGRAM={tool('ninja')}",
    )  # fmt: skip
    run(tool("cmake"), "--build", tree, "--target", "evit_fast", "--parallel", "2")
    program = player(tmp_path / "play", COMPILER, tree / "libevit_fast.a", "-static")
    assert play([EMULATOR, program], folders) == {"scalar", "neon"}
