"""Every CUDA kernel, compiled for every card: no stack, no spill, shared memory that the card has,
tensor cores, and the numbers of the committed table, evit_fast/cuda/compiled.csv.
"""

from __future__ import annotations

import os
import re

import pytest
import torch

from evit_fast.config import VARIANTS
from evit_fast.cuda import column, compiled, sass
from evit_fast.cuda.compiled import KEY, Resources, faults
from evit_fast.cuda.launch_shapes import compile_kernel
from evit_fast.fragments import family
from evit_fast.ops import OPS
from evit_fast.ops.line import dtype_name

VERSION, TABLE = compiled.read_table()
REWRITE = "run make compiled-cuda, read what changed, and commit evit_fast/cuda/compiled.csv"
HAVE = tuple(OPS)
FEW = ("efficientvit_m0", "efficientvit_m5")
FEW_ARCHS = (70, 80, 90)
# Products of matrices; the rest sums, pools or gates.
GEMMS = {
    ("dw_ffn", "ffn"), ("cga", "attention"), ("cga", "projection"), ("patch_merge", "hidden"),
    ("patch_merge", "project"), ("patch_merge", "whole"), ("stem", "pixels"), ("stem", "conv"),
}  # fmt: skip
ROW = ("dw_ffn", "ffn", "C=64 F=128", "1", "float16", "70", "tokens=64 warps=4")
GOOD = Resources(128, 0, 0, 48 << 10, 128, 2, 9000)


def jobs(quick: torch.dtype | None = None) -> list:
    """(op, dtype, arch); those of another dtype than `quick` are marked full."""
    return [
        pytest.param(
            op,
            dtype,
            arch,
            id=f"{op}-{dtype_name(dtype)}-sm_{arch}",
            marks=() if dtype == quick else pytest.mark.full,
        )
        for op in HAVE
        for dtype in compiled.DTYPES
        for arch in compiled.ARCHS
        if compiled.runs(dtype, arch)
    ]


def check(op: str, dtype: torch.dtype, arch: int, models: tuple[str, ...]) -> None:
    """Compiles an op's kernels for a card and compares all they take with the table."""
    assert compiled.version() == VERSION, (
        f"{compiled.TABLE.name} is of NVRTC {VERSION}, and this is {compiled.version()}: "
        f"pip install nvidia-cuda-nvrtc-cu12=={VERSION}, or {REWRITE}"
    )
    wrong = []
    for key, r in compiled.measure([(op, dtype, arch)], os.cpu_count(), models):
        row = " ".join(key)
        if isinstance(r, str):
            wrong.append(r)
            continue
        wrong += [f"{row}: {fault}" for fault in faults(key, r)]
        if (found := compiled.row_values(r)) != TABLE.get(key):
            wrong.append(f"{row}: {compiled.VALUES} are {found}, the table has {TABLE.get(key)}")
    if wrong:
        pytest.fail(f"{len(wrong)} faults, {REWRITE}; e.g. " + "\n".join(wrong[:5]))


@pytest.mark.parametrize("op", HAVE)
@pytest.mark.parametrize("arch", FEW_ARCHS)
def test_m0_and_m5(op, arch):
    check(op, torch.float16, arch, FEW)


@pytest.mark.parametrize(("op", "dtype", "arch"), jobs())
def test_every_kernel(op, dtype, arch):
    check(op, dtype, arch, tuple(VARIANTS))


@pytest.mark.parametrize(("op", "dtype", "arch"), jobs(quick=torch.float16))
def test_the_table_holds_every_kernel(op, dtype, arch):
    needed = [compiled.row_key(b, dtype, arch) for b in compiled.binaries(op, dtype, arch)]
    assert len(needed) == len(set(needed)), "two kernels share a row: add what tells them apart"
    held = {k for k in TABLE if (k[0], k[4], k[5]) == (op, dtype_name(dtype), str(arch))}
    missing, stale = sorted(set(needed) - held), sorted(held - set(needed))
    if missing or stale:
        example = " ".join((missing + stale)[0])
        pytest.fail(f"{len(missing)} rows missing, {len(stale)} stale, e.g. {example}; {REWRITE}")


@pytest.mark.parametrize("arch", compiled.ARCHS)
@pytest.mark.parametrize("op", HAVE)
def test_another_size_compiles_nothing(op, arch):
    """Maps and batches change arguments, grids, and which kernels of a shape run: all of them are
    made at its first forward.
    """
    half = torch.float16
    for s in {b.shape for b in compiled.binaries(op, half, arch)}:
        weights = compiled.packed(s, half, family(arch, half))
        first = set(column.kernels(op, arch).possible(weights, s, half, half, half, False))
        for B, H, W in ((1, 5, 9), (3, 13, 6), (64, 20, 28)):
            H, W = (H * 16, W * 16) if op == "stem" else (H, W)
            launches = compiled.plan(s, half, B, H, W, arch)
            assert launches and {one.kernel for one in launches} <= first


def kernels(arch: int, models: tuple[str, ...]) -> list:
    return [b.kernel for op in HAVE for b in compiled.binaries(op, torch.float16, arch, models)]


def check_code(arch: int, models: tuple[str, ...]) -> None:
    sass.nvdisasm(arch)  # RuntimeError: names the tool that is missing
    mma = "HMMA.884" if arch == 70 else "HMMA.1688" if arch == 75 else "HMMA.16816"
    for kernel in kernels(arch, models):
        code = sass.disassemble(compile_kernel(kernel, arch).code, arch)
        names = sass.instructions(code)
        assert names, f"{kernel.name}: nothing was read from the disassembly"
        local = [name for name in names if re.match(r"LDL|STL", name)]
        assert not local, f"{kernel.name} {kernel.sizes} on sm_{arch}: {local}"
        if (kernel.op, kernel.stage) in GEMMS:
            assert any(n.startswith(mma) for n in names), f"{kernel.name}: no {mma} on sm_{arch}"


@pytest.mark.parametrize("arch", [80, 90])
def test_tensor_cores_of_m0(arch):
    check_code(arch, FEW[:1])


@pytest.mark.full
@pytest.mark.parametrize("arch", compiled.ARCHS)
def test_tensor_cores(arch):
    check_code(arch, tuple(VARIANTS))


def test_faults_are_seen():
    assert not faults(ROW, GOOD)
    assert "stack" in faults(ROW, GOOD._replace(stack=8))[0]
    assert "spilled" in faults(ROW, GOOD._replace(spills=4))[0]
    assert "98304 at most" in faults(ROW, GOOD._replace(shared_bytes=97 << 10))[0]
    assert "fit on no SM" in faults(ROW, GOOD._replace(blocks=0))[0]


def test_a_missing_tool_is_named(monkeypatch, tmp_path):
    monkeypatch.setenv("EVIT_FAST_NVDISASM", str(tmp_path / "nvdisasm"))
    with pytest.raises(RuntimeError, match=r"needs the nvdisasm of CUDA 12.*make"):
        sass.nvdisasm(70)


def test_writing_keeps_the_rows_that_were_not_asked_for(tmp_path, monkeypatch):
    path, other = tmp_path / "compiled.csv", (*ROW[:5], "80", ROW[6])
    compiled.write_table({ROW: ("1",) * 5, other: ("2",) * 5}, set(), path)
    new = ("cga", *ROW[1:])
    compiled.write_table({new: ("3",) * 5}, {("dw_ffn", "float16", "70")}, path)
    assert compiled.read_table(path) == (
        compiled.version(), {other: ("2",) * 5, new: ("3",) * 5},
    )  # fmt: skip
    monkeypatch.setattr(compiled, "version", lambda: "99.1")
    compiled.write_table({ROW: ("4",) * 5}, set(), path)
    assert compiled.read_table(path) == ("99.1", {ROW: ("4",) * 5})
    assert KEY.index("arch") == 5
