"""Cascaded group attention in every instruction set against the float64 reference."""

from __future__ import annotations

import pytest
import torch

from evit_fast.ops import cga
from tests.close import assert_close, budget
from tests.ops.columns import ISAS, blob_of, check_op, instruction_set, oracle, run
from tests.ops.eager import Case, cases

# Beside the block's own map: one token, odd sides that pad both ways, one token over a window.
MAPS = (None, (1, 1), (13, 9), (8, 8), (16, 5))
LOG2E = 1.4426950408889634


def params() -> list:
    found = []
    for case in cases("cga"):
        for size in MAPS:
            H, W = size or (case.side, case.side)
            for isa in ISAS:
                found.append(pytest.param(case, H, W, isa, id=f"cga-{case.name}-{H}x{W}-{isa}-f32"))
    return found


def random_weights(s: cga.Shape, spread: float = 1.0) -> cga.Weights:
    """Scores of order `spread`; weights small enough that a cascade of 16 heads stays tame."""
    NQ, DV, S = 2 * s.dk + s.dv, s.dv, s.tokens
    rand = lambda *shape: torch.randn(*shape).double()  # noqa: E731
    return cga.Weights(
        qkv=tuple(rand(NQ, DV) * (0.5 / DV**0.5) for _ in s.ks),
        qkv_bias=tuple(rand(NQ) * 0.3 for _ in s.ks),
        dw=tuple(rand(s.dk, k, k) * (0.5 / k) for k in s.ks),
        dw_bias=tuple(rand(s.dk) * 0.2 for _ in s.ks),
        bias=tuple(rand(S, S) * (spread * LOG2E) for _ in s.ks),
        proj=rand(s.C, s.C) / s.C**0.5,
        proj_bias=rand(s.C) * 0.3,
    )


@pytest.mark.parametrize("case,H,W,isa", params())
def test_equals_reference(case: Case, H: int, W: int, isa: str):
    check_op(isa, case.shape, case.weights, torch.randn(2, H, W, case.shape.C))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5, 6, 7, 9, 10, 12, 14, 17])
def test_any_window(window: int, isa: str):
    s = cga.Shape(96, 2, 16, window, (7, 5) if window % 2 else (3, 1))
    w = random_weights(s)
    for H, W in ((window, window), (window + 1, 2 * window), (5, 11)):
        check_op(isa, s, w, torch.randn(2, H, W, s.C))


@pytest.mark.parametrize("isa", ISAS)
def test_largest_window(isa: str):
    s = cga.Shape(16, 1, 16, 32, (7,))
    check_op(isa, s, random_weights(s), torch.randn(1, 32, 32, s.C))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(
    "C,heads", [(16, 1), (256, 16), (80, 1), (224, 2), (240, 3), (256, 1), (432, 3)]
)
@pytest.mark.parametrize("window", [4, 7])
def test_any_width(window: int, C: int, heads: int, isa: str):
    s = cga.Shape(C, heads, 16, window, tuple((1, 3, 5, 7)[i % 4] for i in range(heads)))
    check_op(isa, s, random_weights(s), torch.randn(3, window, window, C))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [4, 5, 7])
def test_batches_of_every_group(window: int, isa: str):
    s = cga.Shape(96, 2, 16, window, (5, 3))
    w = random_weights(s)
    program, blob = blob_of(s, w)
    x = torch.randn(35, window, window, s.C)
    want, single = oracle(s, w, x)
    with instruction_set(isa):
        whole = run(program, blob, x)
        assert_close(whole, want, budget(torch.float32, single), "35 images")
        for B in (1, 2, 3, 5, 6, 7, 15, 16, 17, 33):
            assert torch.equal(run(program, blob, x[:B]), whole[:B]), f"batch {B}"
        for threads in (2, 3, 8):
            assert torch.equal(run(program, blob, x, threads), whole), f"{threads} threads"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("window", [4, 5, 7])
def test_a_window_has_the_same_bits_wherever_it_lies(window: int, isa: str):
    s = cga.Shape(96, 2, 16, window, (5, 3))
    program, blob = blob_of(s, random_weights(s))
    x = torch.randn(1, 2 * window, 3 * window, s.C)
    with instruction_set(isa):
        y = run(program, blob, x)
        for i in range(0, 2 * window, window):
            for j in range(0, 3 * window, window):
                here = (slice(None), slice(i, i + window), slice(j, j + window))
                alone = run(program, blob, x[here].contiguous())
                assert torch.equal(alone, y[here]), f"window at {i}, {j}"


@pytest.mark.parametrize("isa", ISAS)
def test_widely_spread_scores(isa: str):
    s = cga.Shape(96, 3, 16, 7, (7, 5, 3))
    w = random_weights(s, spread=60.0)
    x = torch.randn(2, 7, 7, s.C)
    want, single = oracle(s, w, x)
    program, blob = blob_of(s, w)
    with instruction_set(isa):
        assert_close(run(program, blob, x), want, budget(torch.float32, single), "spread scores")


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("token", [(5, 2), (6, 6), (12, 9)])
def test_nan_and_inf_fill_their_window_alone(token: tuple[int, int], value: float, isa: str):
    s = cga.Shape(96, 3, 16, 7, (7, 5, 3))
    w = random_weights(s)
    x = torch.randn(1, 14, 14, s.C)
    x[0, token[0], token[1], 3] = value
    program, blob = blob_of(s, w)
    with instruction_set(isa):
        y = run(program, blob, x)
    want = cga.reference(x.double(), w, s)
    assert torch.equal(y.isnan(), want.isnan())
    assert want.isnan().any() and not want.isnan().all()


@pytest.mark.parametrize("isa", ISAS)
def test_no_images(isa: str):
    s = cga.Shape(96, 3, 16, 7, (7, 5, 3))
    program, blob = blob_of(s, random_weights(s))
    with instruction_set(isa):
        assert run(program, blob, torch.randn(0, 14, 14, s.C)).shape == (0, 14, 14, s.C)
