"""Triton classifier in the interpreter against the float64 reference.

The interpreter has no bfloat16 arithmetic: products run on float32 copies, there alone.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evit_fast.kernels import classifier as kernels
from evit_fast.kernels.launches import Config
from evit_fast.ops import classifier
from evit_fast.program import map_arrays
from tests.close import assert_close, budget, relative_error
from tests.kernels.interpret.guarded import Guarded
from tests.ops.eager import cases

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
MAPS = ((4, 4), (1, 1), (13, 9))
ARCH = 80


def run(
    s: classifier.Shape,
    w: classifier.Weights,
    x: Tensor,
    dtype: torch.dtype,
    y_dtype: torch.dtype | None = None,
    **options,
) -> Tensor:
    """y of one call, on a poisoned output; its canaries are checked."""
    y = Guarded((x.shape[0], s.channels_out), y_dtype or x.dtype)
    natural = w if w.w is None else classifier.Weights(w.w.to(dtype), w.bias.float())
    packed = kernels.prepare(natural, s, dtype)
    assert kernels.scratch(s, dtype, *x.shape[:3]) == 0
    kernels.launch(y.tensor, x, packed, s, arch=ARCH, **options)
    y.check("output")
    return y.tensor


def oracle(
    s: classifier.Shape, w: classifier.Weights, x: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """The float64 reference, and the relative error that the reference has in `dtype`."""
    want = classifier.reference(x.double(), w, s)
    in_dtype = map_arrays(w, lambda t: t.to(dtype))
    return want, relative_error(classifier.reference(x.to(dtype), in_dtype, s), want)


def check(s: classifier.Shape, w: classifier.Weights, x: Tensor, dtype: torch.dtype) -> None:
    """Right with the tiles for few and for many images; an image has the same bits alone."""
    want, own = oracle(s, w, x, dtype)
    for deterministic in (False, True):
        y = run(s, w, x, dtype, deterministic=deterministic)
        assert_close(y, want, budget(dtype, own), f"deterministic={deterministic}")
        if x.shape[0] > 1:
            alone = run(s, w, x[-1:], dtype, deterministic=deterministic)
            assert torch.equal(alone, y[-1:]), "an image alone has other bits than in a batch"


def random_weights(C: int, N: int) -> classifier.Weights:
    if N == 0:
        return classifier.Weights()
    return classifier.Weights(
        torch.randn(N, C, dtype=torch.float64) / C**0.5, torch.randn(N, dtype=torch.float64)
    )


def params() -> list:
    quick = {("M0.0", (4, 4), 2), ("M4.0", (1, 1), 17)}
    return [
        pytest.param(
            case, size, B, dtype,
            id=f"classifier-{case.name}-{size[0]}x{size[1]}-B{B}-{name}",
            marks=() if (case.name, size, B) in quick else pytest.mark.full,
        )
        for case in cases("classifier")
        for size in MAPS
        for B in (1, 2, 17)
        for name, dtype in FLOATS.items()
    ]  # fmt: skip


@pytest.mark.parametrize(("case", "size", "B", "dtype"), params())
def test_equals_reference(case, size, B, dtype):
    check(case.shape, case.weights, torch.randn(B, *size, case.shape.C).to(dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("B", [2, pytest.param(33, marks=pytest.mark.full)])
@pytest.mark.parametrize(
    "N", [0, 1, 10, 17, *(pytest.param(n, marks=pytest.mark.full) for n in (2, 15, 16, 100, 5000))]
)
def test_any_class_count(N, B, dtype):
    s = classifier.Shape(192, N)
    check(s, random_weights(192, N), torch.randn(B, 4, 4, 192).to(dtype), dtype)


@pytest.mark.parametrize("N", [0, 20])
@pytest.mark.parametrize("C", [16, 48, 400])
def test_any_width(C, N):
    s = classifier.Shape(C, N)
    check(s, random_weights(C, N), torch.randn(3, 3, 5, C), torch.float32)


@pytest.mark.parametrize("N", [0, 20])
@pytest.mark.parametrize("y_dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS.values(), ids=FLOATS)
def test_input_and_output_of_any_float(x_dtype, y_dtype, N):
    """The values of x are exact in every dtype: only y is rounded."""
    s, w = classifier.Shape(64, N), random_weights(64, N)
    x = torch.randn(2, 4, 4, 64).bfloat16()
    want = run(s, w, x.float(), torch.float16, torch.float32)
    assert not torch.equal(want.half().float(), want), "rounded to the op's dtype"
    y = run(s, w, x.to(x_dtype), torch.float16, y_dtype)
    assert_close(y, want, budget(y_dtype))
    if y_dtype == torch.float32:
        assert torch.equal(y, want)


@pytest.mark.parametrize("N", [0, 20])
def test_nan_and_inf_stay_in_their_image(N):
    s, w = classifier.Shape(64, N), random_weights(64, N)
    x = torch.randn(5, 4, 4, 64)
    x[1, 2, 3, 7], x[3, 0, 0, 63] = float("nan"), float("inf")
    want, _ = oracle(s, w, x, torch.float32)
    for deterministic in (False, True):
        assert_close(run(s, w, x, torch.float32, deterministic=deterministic), want)
    if N:
        w.w[3, 5] = float("nan")  # spoils one class of every image, and no other
        x = torch.randn(5, 4, 4, 64)
        want, _ = oracle(s, w, x, torch.float32)
        assert want.isnan().sum() == 5
        assert_close(run(s, w, x, torch.float32), want)


@pytest.mark.full
@pytest.mark.parametrize("N", [0, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_every_candidate(dtype, N):
    """What `evit-fast tune` may choose is right too."""
    s, w = classifier.Shape(384, N), random_weights(384, N)
    x = torch.randn(3, 4, 4, 384).to(dtype)
    want, own = oracle(s, w, x, dtype)
    for row in kernels.CANDIDATES(s, dtype)["linear" if N else "pool"]:
        assert_close(run(s, w, x, dtype, config=row), want, budget(dtype, own), str(row))


def test_no_image_is_no_launch():
    s = classifier.Shape(64, 10)
    packed = kernels.prepare(random_weights(64, 10), s, torch.float32)
    y, x = torch.empty(0, 10), torch.empty(0, 4, 4, 64)
    assert kernels.plan(y, x, packed, s, arch=ARCH) == []


def test_determinism_does_not_ask_for_the_number_of_images():
    s = classifier.Shape(64, 10)

    def key(B: int, deterministic: bool) -> tuple:
        return kernels.shape_class(s, torch.float16, B, 4, 4, deterministic)

    assert key(1, False) != key(2048, False)
    assert key(1, True) == key(2048, True)


def test_refusals_are_one_sentence():
    s = classifier.Shape(64, 10)
    assert kernels.supports(s, torch.bfloat16, 120) is None
    assert "sm_70" in kernels.supports(s, torch.float16, 70)
    assert "float64" in kernels.supports(s, torch.float64, 80)


@pytest.mark.parametrize("N", [0, 10])
def test_a_given_row_is_used(N):
    s = classifier.Shape(64, N)
    packed = kernels.prepare(random_weights(64, N), s, torch.float32)
    y, x = torch.empty(1, s.channels_out), torch.empty(1, 4, 4, 64)
    row = Config({"BM": 2, "BN": 32, "BK": 16}, 1, 1)
    assert [launch.config for launch in kernels.plan(y, x, packed, s, arch=ARCH, config=row)] == [
        row
    ]
