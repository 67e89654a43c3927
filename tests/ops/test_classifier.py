"""classifier in every instruction set against the float64 reference.

Also class counts that are no multiple of a panel of 16.
"""

from __future__ import annotations

import pytest
import torch

from evit_fast.ops import classifier
from tests.ops.columns import ISAS, check_op
from tests.ops.eager import Case, cases

MAPS = (None, (1, 1), (13, 9))


def params() -> list:
    found = []
    for case in cases("classifier"):
        for size in MAPS:
            H, W = size or (case.side, case.side)
            for isa in ISAS:
                found.append(
                    pytest.param(case, H, W, isa, id=f"classifier-{case.name}-{H}x{W}-{isa}-f32")
                )
    return found


@pytest.mark.parametrize("case,H,W,isa", params())
def test_equals_reference(case: Case, H: int, W: int, isa: str):
    check_op(isa, case.shape, case.weights, torch.randn(3, H, W, case.shape.C))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("N", [0, 1, 2, 10, 15, 16, 17, 100, 21841])
@pytest.mark.parametrize("B", [1, 2, 5, 16])
def test_any_class_count(N: int, B: int, isa: str):
    C = 192
    w = classifier.Weights(None, None)
    if N > 0:
        w = classifier.Weights(
            torch.randn(N, C, dtype=torch.float64) / C**0.5, torch.randn(N, dtype=torch.float64)
        )
    check_op(isa, classifier.Shape(C, N), w, torch.randn(B, 4, 4, C))
