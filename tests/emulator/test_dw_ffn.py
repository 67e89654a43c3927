"""dw_ffn's CUDA kernels on the emulator, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evit_fast.cuda import dw_ffn
from tests.emulator.building import ORDERS
from tests.emulator.cases import TARGETS, USUAL, check, run, targets
from tests.ops.eager import Case, cases

MODELS = ("M0.0", "M5.0")


def chosen() -> list:
    return [
        pytest.param(
            case,
            *target,
            id=f"{case.name}-{name}",
            marks=() if case.name in MODELS and name in USUAL else pytest.mark.full,
        )
        for case in cases("dw_ffn")
        for name, target in TARGETS.items()
    ]


def tokens(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("deterministic", [False, True], ids=["few", "many"])
@pytest.mark.parametrize(("case", "arch", "dtype"), chosen())
def test_equals_reference(case: Case, arch: int, dtype: torch.dtype, deterministic: bool):
    for size in ((1, 5, 9), (3, 1, 1)):
        x = tokens(dtype, *size, case.shape.C)
        check(run(case.shape, case.weights, x, arch, dtype, deterministic=deterministic))


@pytest.mark.parametrize(("arch", "dtype"), targets())
def test_orders_images_and_nan(arch: int, dtype: torch.dtype):
    s, w = cases("dw_ffn")[0].shape, cases("dw_ffn")[0].weights
    x = tokens(dtype, 3, 4, 4, s.C)
    y = run(s, w, x, arch, dtype).y
    for order in ORDERS:
        assert torch.equal(run(s, w, x, arch, dtype, order=order).y, y)
    assert torch.equal(run(s, w, x[1:2].clone(), arch, dtype).y, y[1:2])
    x[1, 0, 0, 0] = float("nan")
    r = run(s, w, x, arch, dtype)
    assert torch.equal(r.y.isnan(), r.want.isnan())


def test_refusals():
    s = cases("dw_ffn")[0].shape
    assert "bfloat16 needs sm_80" in dw_ffn.supports(s, torch.bfloat16, 75)
    assert "sm_70 or newer" in dw_ffn.supports(s, torch.float16, 61)
    assert dw_ffn.supports(s, torch.float16, 70) is None
