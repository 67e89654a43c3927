"""classifier's CUDA kernels on the emulator, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evit_fast.cuda import classifier as cuda
from evit_fast.ops import classifier
from tests.emulator.building import ORDERS
from tests.emulator.cases import TARGETS, USUAL, check, run, targets
from tests.ops.eager import Case, cases

SIZES = ((1, 4, 4), (3, 5, 9), (3, 1, 1), (18, 1, 2))  # images, rows, columns
CASES = cases("classifier")


def named(case: Case) -> bool:
    """The heads of M0 and M1, and of M4 and M5."""
    return case.shape.C in (192, 384)


def chosen() -> list:
    return [
        pytest.param(
            case,
            *target,
            id=f"{case.name}-{name}",
            marks=() if named(case) and name in USUAL else pytest.mark.full,
        )
        for case in CASES
        for name, target in TARGETS.items()
    ]


def tokens(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def random_weights(C: int, N: int) -> classifier.Weights:
    if not N:
        return classifier.Weights()
    generator = torch.Generator().manual_seed(N)
    w = torch.randn(N, C, dtype=torch.float64, generator=generator) / C**0.5
    return classifier.Weights(w, torch.randn(N, dtype=torch.float64, generator=generator))


@pytest.mark.parametrize("deterministic", [False, True], ids=["few", "many"])
@pytest.mark.parametrize(("case", "arch", "dtype"), chosen())
def test_equals_reference(case: Case, arch: int, dtype: torch.dtype, deterministic: bool):
    for size in SIZES:
        x = tokens(dtype, *size, case.shape.C)
        check(run(case.shape, case.weights, x, arch, dtype, deterministic=deterministic))


@pytest.mark.parametrize(("arch", "dtype"), targets(("sm_80-f16",)))
@pytest.mark.parametrize("N", [0, 1, 10, 17, 33])
def test_any_class_count(N: int, arch: int, dtype: torch.dtype):
    s, w = classifier.Shape(48, N), random_weights(48, N)
    for deterministic in (False, True):
        x = tokens(dtype, 5, 3, 2, 48)
        check(run(s, w, x, arch, dtype, deterministic=deterministic))


@pytest.mark.parametrize(("arch", "dtype"), targets(("sm_70-f16",)))
@pytest.mark.parametrize("C", [976, pytest.param(4096, marks=pytest.mark.full)])
def test_channels_that_come_in_chunks(C: int, arch: int, dtype: torch.dtype):
    s, w = classifier.Shape(C, 20), random_weights(C, 20)
    for deterministic in (False, True):
        x = tokens(dtype, 2, 3, 3, C)
        check(run(s, w, x, arch, dtype, deterministic=deterministic))


@pytest.mark.parametrize(("arch", "dtype"), targets(("sm_70-f16", "sm_80-f16")))
def test_orders_batches_and_nan(arch: int, dtype: torch.dtype):
    s, w = classifier.Shape(64, 40), random_weights(64, 40)
    x = tokens(dtype, 70, 4, 5, 64)  # more than one block of 64 images
    many = run(s, w, x, arch, dtype).y
    for order in ORDERS:
        assert torch.equal(run(s, w, x, arch, dtype, order=order, deterministic=True).y, many)
        assert torch.equal(run(s, w, x[:20], arch, dtype, order=order).y, many[:20])
    for value in (float("nan"), float("inf")):
        x[1, 2, 3, 5] = value
        for deterministic in (False, True):
            r = run(s, w, x[:3], arch, dtype, deterministic=deterministic)
            assert not r.want[1].isfinite().any() and r.want[::2].isfinite().all()
            check(r)


@pytest.mark.parametrize(("arch", "dtype"), targets(("sm_80-f16",)))
@pytest.mark.parametrize("N", [0, 24])
def test_any_kind_in_and_out(N: int, arch: int, dtype: torch.dtype):
    s, w = classifier.Shape(32, N), random_weights(32, N)
    for x_dtype, y_dtype in ((torch.float32, dtype), (dtype, torch.float32)):
        x = tokens(x_dtype, 2, 3, 3, 32)
        check(run(s, w, x, arch, dtype, y_dtype=y_dtype))


def test_one_image_takes_several_blocks():
    s = classifier.Shape(384, 1000)
    for family in (0, 70, 75, 80):
        c = cuda.config(s, family, 1, False)
        assert 16 * c.tiles * 15 < s.N


def test_refusals():
    s = CASES[0].shape
    assert "bfloat16 needs sm_80" in cuda.supports(s, torch.bfloat16, 75)
    assert "sm_70 or newer" in cuda.supports(s, torch.float16, 61)
    assert cuda.supports(s, torch.float16, 70) is None
