"""One image through a whole model, every op on the emulator, against the float64 eager model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evit_fast.config import VARIANTS
from evit_fast.fold import fold
from evit_fast.model import EfficientVit
from tests.close import assert_close, budget, relative_error
from tests.emulator.building import emulate
from tests.emulator.cases import TARGETS, USUAL, plan
from tests.ops.eager import MEAN, STD, model, tensors


def run(name: str, x: Tensor, arch: int, dtype: torch.dtype, order: str) -> Tensor:
    """Logits [B, N]; maps between the ops have the dtype, x and the logits are float32."""
    ops = fold(model(name), MEAN, STD)
    for i, (s, w) in enumerate(ops):
        last = i + 1 == len(ops)
        p = plan(s, tensors(w), x, arch, dtype, y_dtype=torch.float32 if last else dtype)
        emulate(p.launches, order, seed=i)
        x = p.y
    return x


@torch.no_grad()
def expected(name: str, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The float64 logits; the error of the eager model in `dtype`."""
    double = model(name)
    narrow = EfficientVit(VARIANTS[name]).to(dtype).eval()
    narrow.load_state_dict(double.state_dict())
    want = double(x.double())
    return want, relative_error(narrow(x.to(dtype)), want)


def params() -> list:
    """M5 takes half a minute: `make test` has M0 in the usual targets alone."""
    return [
        pytest.param(name, side, *target, id=f"{name[-2:].upper()}-{side}-{label}", marks=marks)
        for name, side in (("efficientvit_m0", 224), ("efficientvit_m5", 96))
        for label, target in TARGETS.items()
        for marks in [() if name[-1] == "0" and label in USUAL else pytest.mark.full]
    ]


@pytest.mark.parametrize(("name", "side", "arch", "dtype"), params())
def test_logits(name: str, side: int, arch: int, dtype: torch.dtype):
    x = torch.randn(1, 3, side, side)
    want, eager = expected(name, x, dtype)
    assert_close(run(name, x, arch, dtype, "shuffled"), want, budget(dtype, eager), name)
