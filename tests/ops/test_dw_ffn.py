"""dw_ffn in every instruction set against the float64 reference, at every shape of M0 .. M5."""

from __future__ import annotations

import pytest
import torch

from evit_fast.ops import dw_ffn
from tests.ops.columns import ISAS, blob_of, check_op, instruction_set, run
from tests.ops.eager import Case, cases

# Beside the block's own map: one token, odd sides, one token over a tile, a row longer than the
# register tile.
MAPS = (None, (1, 1), (13, 9), (1, 15), (3, 31))


def params() -> list:
    found = []
    for case in cases("dw_ffn"):
        for size in MAPS:
            H, W = size or (case.side, case.side)
            for isa in ISAS:
                found.append(
                    pytest.param(case, H, W, isa, id=f"dw_ffn-{case.name}-{H}x{W}-{isa}-f32")
                )
    return found


@pytest.mark.parametrize("case,H,W,isa", params())
def test_equals_reference(case: Case, H: int, W: int, isa: str):
    check_op(isa, case.shape, case.weights, torch.randn(2, H, W, case.shape.C))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("C,F", [(16, 16), (48, 80), (112, 224), (16, 400), (208, 64)])
def test_any_width(C: int, F: int, isa: str):
    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, dtype=torch.float64)

    s = dw_ffn.Shape(C, F)
    w = dw_ffn.Weights(
        normal(C, 3, 3) / 3, normal(C), normal(F, C) / C**0.5, normal(F), normal(C, F) / F**0.5,
        normal(C),
    )  # fmt: skip
    check_op(isa, s, w, torch.randn(3, 5, 6, C))


@pytest.mark.parametrize("isa", ISAS)
def test_batches_of_every_tile_remainder(isa: str):
    case = next(c for c in cases("dw_ffn") if c.side == 4)
    x = torch.randn(17, 4, 4, case.shape.C)
    program, blob = blob_of(case.shape, case.weights)
    with instruction_set(isa):
        whole = run(program, blob, x)
        for B in range(1, 17):
            assert torch.equal(run(program, blob, x[:B]), whole[:B]), f"batch {B}"


@pytest.mark.parametrize("isa", ISAS)
def test_nan_and_inf_stay(isa: str):
    case = cases("dw_ffn")[0]
    x = torch.randn(1, 9, 9, case.shape.C)
    x[0, 1, 1, 3] = float("nan")
    x[0, 7, 7, 5] = float("inf")
    program, blob = blob_of(case.shape, case.weights)
    with instruction_set(isa):
        y = run(program, blob, x)
    want = dw_ffn.reference(x.double(), case.weights, case.shape)
    assert torch.equal(y.isnan(), want.isnan())
    assert want.isnan().any() and not want.isnan().all()
