"""dw_ffn of the CUDA column on the emulator, against the float64 reference."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evit_fast.cuda import dw_ffn
from evit_fast.fragments import family
from evit_fast.ops.dw_ffn import reference
from evit_fast.program import map_arrays
from tests.close import assert_close, budget
from tests.emulator.building import ORDERS, emulate
from tests.ops.eager import Case, cases

CARDS = {
    "sm70-f16": (70, torch.float16),
    "sm75-f16": (75, torch.float16),
    "sm80-f16": (80, torch.float16),
    "sm80-bf16": (80, torch.bfloat16),
    "f32": (80, torch.float32),
}
QUICK = ("M0.0", "M5.0")
QUICK_CARDS = ("sm70-f16", "sm80-f16")
EDGE = 64  # canaries on either side of the output
CANARY = 77.0


def chosen():
    for case in cases("dw_ffn"):
        for card in CARDS:
            quick = case.name in QUICK and card in QUICK_CARDS
            marks = () if quick else pytest.mark.full
            yield pytest.param(case, card, id=f"{case.name}-{card}", marks=marks)


def run(case: Case, card: str, x: Tensor, order: str = "ascending", **options) -> Tensor:
    """On a poisoned output and workspace; nothing is written outside them."""
    arch, dtype = CARDS[card]
    s, whole = case.shape, torch.full((x.numel() + 2 * EDGE,), CANARY, dtype=x.dtype)
    y = whole[EDGE:-EDGE].view(x.shape).fill_(float("nan"))
    weights = map_arrays(case.weights, lambda t: t.float())
    packed = dw_ffn.prepare(weights, s, dtype, family(arch, dtype))
    space = torch.full((dw_ffn.scratch(s, dtype, *x.shape[:3]) + 256,), 255, dtype=torch.uint8)
    emulate(dw_ffn.plan(y, x, packed, s, space, arch=arch, **options), order)
    assert (whole[:EDGE] == CANARY).all() and (whole[-EDGE:] == CANARY).all()
    assert (space[-256:] == 255).all()
    return y


def tokens(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


@pytest.mark.parametrize("deterministic", [False, True], ids=["few", "many"])
@pytest.mark.parametrize(("case", "card"), list(chosen()))
def test_against_float64(case: Case, card: str, deterministic: bool):
    dtype = CARDS[card][1]
    for B, H, W in ((1, 5, 9), (3, 1, 1)):
        x = tokens(dtype, B, H, W, case.shape.C)
        y = run(case, card, x, deterministic=deterministic)
        want = reference(x.double(), case.weights, case.shape)
        assert_close(y, want, budget(dtype), f"{case.name} {card} {tuple(x.shape)}")


@pytest.mark.parametrize("card", QUICK_CARDS)
def test_orders_images_and_nan(card: str):
    case = cases("dw_ffn")[0]
    x = tokens(torch.float16, 3, 4, 4, case.shape.C)
    y = run(case, card, x)
    for order in ORDERS:
        assert torch.equal(run(case, card, x, order), y)
    assert torch.equal(run(case, card, x[1:2].clone()), y[1:2])
    x[1, 0, 0, 0] = float("nan")
    got = run(case, card, x)
    want = reference(x.double(), case.weights, case.shape)
    assert torch.equal(got.isnan(), want.isnan())


def test_refusals():
    s = cases("dw_ffn")[0].shape
    assert "bfloat16 needs sm_80" in dw_ffn.supports(s, torch.bfloat16, 75)
    assert "sm_70 or newer" in dw_ffn.supports(s, torch.float16, 61)
    assert dw_ffn.supports(s, torch.float16, 70) is None
