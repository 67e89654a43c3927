"""patch_merge in every instruction set against the float64 reference, at every shape of M0..M5."""

from __future__ import annotations

import pytest
import torch

from evit_fast.ops import patch_merge
from tests.ops.columns import ISAS, check_op
from tests.ops.eager import Case, cases

# Beside the merge's own map: one token (its stride-2 window lies mostly outside), even and odd
# sides, long rows.
MAPS = (None, (1, 1), (2, 2), (13, 9), (1, 30), (6, 33))


def params() -> list:
    found = []
    for case in cases("patch_merge"):
        for size in MAPS:
            H, W = size or (case.side, case.side)
            for isa in ISAS:
                found.append(
                    pytest.param(case, H, W, isa, id=f"patch_merge-{case.name}-{H}x{W}-{isa}-f32")
                )
    return found


@pytest.mark.parametrize("case,H,W,isa", params())
def test_equals_reference(case: Case, H: int, W: int, isa: str):
    check_op(isa, case.shape, case.weights, torch.randn(2, H, W, case.shape.C))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("C,F,R,CO", [(16, 16, 16, 16), (48, 208, 32, 80), (80, 96, 112, 48)])
def test_any_width(C: int, F: int, R: int, CO: int, isa: str):
    def weight(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64) / shape[-1] ** 0.5

    w = patch_merge.Weights(
        weight(F, C), weight(F), weight(F, 3, 3), weight(F), weight(R, F), weight(R), weight(F, R),
        weight(F), weight(CO, F), weight(CO),
    )  # fmt: skip
    check_op(isa, patch_merge.Shape(C, F, R, CO), w, torch.randn(3, 7, 5, C))


@pytest.mark.parametrize("isa", ISAS)
def test_gate_saturates_without_overflow(isa: str):
    case = cases("patch_merge")[0]
    bias = torch.linspace(-400.0, 400.0, case.shape.F, dtype=torch.float64)
    w = case.weights._replace(se2_bias=bias)
    check_op(isa, case.shape, w, torch.randn(2, 6, 6, case.shape.C))
