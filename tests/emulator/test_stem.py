"""stem's CUDA kernels on the emulator, against the float64 reference."""

from __future__ import annotations

import ctypes
from itertools import product
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evit_fast.cuda import stem as cuda
from evit_fast.ops import stem
from tests.emulator.building import ORDERS, library
from tests.emulator.cases import TARGETS, check, run, targets
from tests.ops.eager import Case, cases
from tests.ops.test_stem import LAYOUTS, image, random_weights

SIZES = ((1, 45, 70), (3, 5, 9), (3, 1, 1))  # images, rows, columns
USUAL = {
    ("M0.0", "sm_70-f16", "few"),
    ("M0.0", "sm_80-f16", "many"),
    ("M5.0", "sm_70-f16", "many"),
    ("M5.0", "sm_80-f16", "few"),
}
M0 = cases("stem")[0]


def chosen() -> list:
    return [
        pytest.param(
            case,
            *target,
            amount == "many",
            id=f"{case.name}-{name}-{amount}",
            marks=() if (case.name, name, amount) in USUAL else pytest.mark.full,
        )
        for case in cases("stem")
        for name, target in TARGETS.items()
        for amount in ("few", "many")
    ]


def numbers(dtype: torch.dtype, *shape: int) -> Tensor:
    """An image whose values do not depend on the tests that ran before."""
    generator = torch.Generator().manual_seed(sum(shape))
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype, generator=generator)
    return torch.randn(shape, generator=generator).to(dtype)


@pytest.mark.parametrize(("case", "arch", "dtype", "deterministic"), chosen())
def test_equals_reference(case: Case, arch: int, dtype: torch.dtype, deterministic: bool):
    for B, H, W in SIZES:
        x = numbers(dtype, B, 3, H, W)
        check(run(case.shape, case.weights, x, arch, dtype, deterministic=deterministic))


@pytest.mark.parametrize(("arch", "dtype"), targets(("sm_70-f16",)))
def test_orders_and_images(arch: int, dtype: torch.dtype):
    x = numbers(dtype, 3, 3, 35, 33)
    y = run(M0.shape, M0.weights, x, arch, dtype).y
    for order in ORDERS:
        assert torch.equal(run(M0.shape, M0.weights, x, arch, dtype, order=order).y, y)
    assert torch.equal(run(M0.shape, M0.weights, x[1:2], arch, dtype).y, y[1:2])


@pytest.mark.parametrize(("arch", "dtype"), targets(("sm_80-f16",)))
def test_few_and_many_have_the_same_bits(arch: int, dtype: torch.dtype):
    s = stem.Shape(5, 64)
    w, x = random_weights(5, 64), numbers(dtype, 2, 5, 21, 40)
    r = run(s, w, x, arch, dtype, deterministic=True)
    check(r)
    assert torch.equal(run(s, w, x, arch, dtype).y, r.y)


@pytest.mark.parametrize(("arch", "dtype"), targets(("sm_70-f16", "f32")))
def test_nan_and_infinity(arch: int, dtype: torch.dtype):
    """They reach the tokens that they reach in eager, and no other: not through zeros that fill
    up k, nor through tiles' ends.
    """
    for value in (float("nan"), float("inf"), float("-inf")):
        for row, column in ((0, 0), (16, 16), (31, 32), (40, 66)):
            x = numbers(dtype, 1, 3, 41, 67)
            x[0, row % 3, row, column] = value
            r = run(M0.shape, M0.weights, x, arch, dtype)
            assert not r.want.isfinite().all() and r.want.isfinite().any()
            check(r)


@pytest.mark.parametrize(("arch", "dtype"), targets(("sm_80-f16",)))
def test_pixels(arch: int, dtype: torch.dtype):
    for B, H, W in SIZES:
        check(run(M0.shape, M0.weights, numbers(torch.uint8, B, 3, H, W), arch, dtype))


@pytest.mark.parametrize(("arch", "dtype"), targets(("sm_70-f16",)))
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, arch: int, dtype: torch.dtype):
    x = LAYOUTS[layout](image(torch.float32, 2, 3, 40, 70).to(dtype))
    assert not x.is_contiguous()
    y = run(M0.shape, M0.weights, x, arch, dtype).y
    assert torch.equal(y, run(M0.shape, M0.weights, x.contiguous(), arch, dtype).y)


@pytest.mark.parametrize(("arch", "dtype"), targets(("sm_80-f16",)))
@pytest.mark.parametrize(
    ("x_dtype", "y_dtype"),
    [(torch.float32, torch.float32), (torch.bfloat16, torch.float32), (torch.uint8, torch.float32)],
    ids=["f32-f32", "bf16-f32", "u8-f32"],
)
@pytest.mark.full
def test_any_kind_in_and_out(
    x_dtype: torch.dtype, y_dtype: torch.dtype, arch: int, dtype: torch.dtype
):
    x = numbers(x_dtype, 2, 3, 19, 34)
    check(run(M0.shape, M0.weights, x, arch, dtype, y_dtype=y_dtype))


@pytest.mark.parametrize(("arch", "dtype"), targets())
@pytest.mark.parametrize("deterministic", [False, True], ids=["few", "many"])
@pytest.mark.parametrize(("in_", "C"), [(1, 64), (4, 320), (64, 128), (5, 448), (3, 1024)])
@pytest.mark.full
def test_any_width(in_: int, C: int, deterministic: bool, arch: int, dtype: torch.dtype):
    s, w = stem.Shape(in_, C), random_weights(in_, C)
    x = numbers(dtype, 1, in_, 35, 20)
    check(run(s, w, x, arch, dtype, deterministic=deterministic))


LAUNCHES = """
#include "stem.cuh"
extern "C" int pixels_bytes(const evit::cuda::StemSizes* s, int family) {
  return evit::cuda::stem_pixels_launch(*s, family, 1, 1, 1).shared_bytes;
}
extern "C" int conv_bytes(const evit::cuda::StemSizes* s, int family) {
  return evit::cuda::stem_conv_launch(*s, family, 1, 1, 1).shared_bytes;
}
"""


def test_shared_memory_is_what_the_header_says(tmp_path: Path):
    """The header compiles as C++17 without the emulator; Python's bytes are its; 64 KiB, what
    sm_75 has, are enough for every stem.
    """
    (tmp_path / "launches.cpp").write_text(LAUNCHES)
    flags = ("-std=c++17", "-Wno-unused-function")
    header = library(tmp_path / "launches.so", tmp_path / "launches.cpp", *flags)
    shapes = [stem.Shape(in_, C) for in_ in (1, 3, 4, 5, 64) for C in range(64, 1025, 64)]
    for s, tiles, many in product(shapes, (0, 70, 75, 80), (False, True)):
        block = cuda.pixels_config(s, tiles, 1, many)
        fields = (ctypes.c_int * 13)(s.in_, s.C, *block, *[0] * 6, cuda.WARPS, 0, 0)
        assert header.pixels_bytes(fields, tiles) == cuda.pixels_bytes(s, block, tiles) <= 65536
        for cin, cout in ((s.C // 4, s.C // 2), (s.C // 2, s.C)):
            c = cuda.conv_config(cin, cout, tiles, 1, many)
            fields = (ctypes.c_int * 13)(0, 0, 0, 0, cin, cout, 0, *c, 0, 0)
            assert header.conv_bytes(fields, tiles) <= 65536


def test_refusals():
    s = M0.shape
    assert "bfloat16 needs sm_80" in cuda.supports(s, torch.bfloat16, 75)
    assert "sm_70 or newer" in cuda.supports(s, torch.float16, 61)
    assert cuda.supports(s, torch.float16, 70) is None


def test_nothing_to_do():
    """No image, no launch."""
    x, y = torch.empty(0, 3, 32, 32), torch.empty(0, 2, 2, 64)
    w = cuda.prepare(M0.weights, M0.shape, torch.float32, 0)
    assert cuda.plan(y, x, w, M0.shape, None, arch=80) == []
