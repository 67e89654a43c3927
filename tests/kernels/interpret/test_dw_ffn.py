"""Triton dw_ffn in the interpreter against the float64 reference.

The interpreter has no bfloat16 arithmetic: products run on float32 copies, there alone.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evit_fast.kernels import dw_ffn as kernels
from evit_fast.ops import dw_ffn
from evit_fast.program import map_arrays
from tests.close import assert_close, budget, relative_error
from tests.kernels.interpret.guarded import Guarded
from tests.ops.eager import cases

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
MATRICES = {"w1", "w2"}
ARCH = 80


def run(
    s: dw_ffn.Shape,
    w: dw_ffn.Weights,
    x: Tensor,
    dtype: torch.dtype,
    y_dtype: torch.dtype | None = None,
    **options,
) -> Tensor:
    """y of one call, on poisoned output and scratch; their canaries are checked."""
    y = Guarded(x.shape, y_dtype or x.dtype)
    space = Guarded((kernels.scratch(s, dtype, *x.shape[:3]),), torch.uint8)
    natural = w._replace(
        **{
            name: t.to(dtype if name in MATRICES else torch.float32)
            for name, t in w._asdict().items()
        }
    )
    packed = kernels.prepare(natural, s, dtype)
    kernels.launch(y.tensor, x, packed, s, space.tensor, arch=ARCH, **options)
    y.check("output")
    space.check("scratch")
    return y.tensor


def oracle(
    s: dw_ffn.Shape, w: dw_ffn.Weights, x: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """The float64 reference, and the relative error that the reference has in `dtype`."""
    want = dw_ffn.reference(x.double(), w, s)
    in_dtype = map_arrays(w, lambda t: t.to(dtype))
    return want, relative_error(dw_ffn.reference(x.to(dtype), in_dtype, s), want)


def check(s: dw_ffn.Shape, w: dw_ffn.Weights, x: Tensor, dtype: torch.dtype, **options) -> None:
    """Right; the same bits for an image alone, with the same tiles."""
    want, own = oracle(s, w, x, dtype)
    y = run(s, w, x, dtype, **options)
    assert_close(y, want, budget(dtype, own), str(options))
    if x.shape[0] > 1:
        alone = run(s, w, x[-1:], dtype, **options)
        assert torch.equal(alone, y[-1:]), "an image alone has other bits than in a batch"


def random_weights(C: int, F: int) -> dw_ffn.Weights:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    return dw_ffn.Weights(
        normal(C, 3, 3) / 3, normal(C), normal(F, C) / C**0.5, normal(F), normal(C, F) / F**0.5,
        normal(C),
    )  # fmt: skip


def params(maps: tuple, quick: set) -> list:
    """Every shape of M0 .. M5 on `maps`; None is the block's own map."""
    return [
        pytest.param(
            case, size or (case.side, case.side), dtype,
            id=f"dw_ffn-{case.name}-{'own' if size is None else '{}x{}'.format(*size)}-{name}",
            marks=() if (case.name, size, name) in quick else pytest.mark.full,
        )
        for case in cases("dw_ffn")
        for size in maps
        for name, dtype in FLOATS.items()
    ]  # fmt: skip


# 3 x 43 is one token over a tile of 16, 32, 64 or 128.
@pytest.mark.parametrize(
    ("case", "size", "dtype"),
    params(
        (None, (13, 9), (1, 1), (3, 43)),
        {
            *(("M0.0", size, "f16") for size in (None, (13, 9), (1, 1), (3, 43))),
            *(("M4.1", None, name) for name in FLOATS),
            ("M2.0", None, "f32"),
            ("M5.0", None, "f16"),
        },
    ),
)
def test_many_tokens(case, size, dtype):
    x = torch.randn(2, *size, case.shape.C).to(dtype)
    check(case.shape, case.weights, x, dtype, deterministic=True)


@pytest.mark.parametrize(
    ("case", "size", "dtype"),
    params(
        (None, (1, 1)),
        {("M0.0", None, "f32"), ("M4.1", None, "f16"), *(("M4.1", (1, 1), n) for n in FLOATS)},
    ),
)
def test_few_tokens(case, size, dtype):
    """Shares of the hidden units where C is large."""
    B = 1 if case.side > 4 and size[0] > 1 else 2
    check(case.shape, case.weights, torch.randn(B, *size, case.shape.C).to(dtype), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize(
    ("C", "F"),
    [(16, 16), (48, 80), (112, 224), (16, 400), pytest.param(208, 64, marks=pytest.mark.full)],
)
def test_any_width(C, F, dtype):
    """F that BF does not divide, shares without a hidden unit, channels beyond the last part."""
    s, w = dw_ffn.Shape(C, F), random_weights(C, F)
    for deterministic in (False, True):
        x = torch.randn(2, 3, 4, C).to(dtype)
        check(s, w, x, dtype, deterministic=deterministic)


@pytest.mark.parametrize("y_dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS.values(), ids=FLOATS)
def test_input_and_output_of_any_float(x_dtype, y_dtype):
    """The values of x are exact in every dtype: only y is rounded."""
    s, w = dw_ffn.Shape(64, 128), random_weights(64, 128)
    x = torch.randn(2, 4, 4, 64).bfloat16()
    want = run(s, w, x.float(), torch.float16, torch.float32)
    y = run(s, w, x.to(x_dtype), torch.float16, y_dtype)
    assert_close(y, want, budget(y_dtype))
    if y_dtype == torch.float32:
        assert torch.equal(y, want)


@pytest.mark.parametrize("deterministic", [False, True])
def test_the_residual_is_float32_in_every_dtype(deterministic):
    """Rounded to bfloat16 it would be off by 0.2 %."""
    s, w = dw_ffn.Shape(240, 480), random_weights(240, 480)
    w.w2.zero_()
    x = torch.randn(1, 3, 3, 240)
    want, _ = oracle(s, w, x, torch.float32)
    y = run(s, w, x, torch.bfloat16, torch.float32, deterministic=deterministic)
    assert_close(y, want, budget(torch.float32))


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize(
    ("C", "F", "deterministic"), [(64, 128, False), (144, 288, False), (240, 480, True)]
)
def test_nan_and_inf_stay_where_they_are(C, F, deterministic):
    """In the neighbours in their own image; images begin in the middle of a tile."""
    s, w = dw_ffn.Shape(C, F), random_weights(C, F)
    x = torch.randn(3, 3, 3, C)
    x[0, 2, 2, 3], x[2, 0, 1, 5] = float("nan"), float("inf")
    want, _ = oracle(s, w, x, torch.float32)
    y = run(s, w, x, torch.float32, deterministic=deterministic)
    assert torch.equal(y.isnan(), want.isnan())
    assert want.isnan().any() and not want[1].isnan().any()
    assert_close(y, want)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("deterministic", [False, True])
def test_inf_meets_no_padding(deterministic):
    """Where every weight is positive Inf stays Inf: nothing multiplies it by a padded 0."""
    s, w = dw_ffn.Shape(112, 80), map_arrays(random_weights(112, 80), torch.abs)
    x = torch.rand(2, 3, 3, 112).half()
    row = kernels.CONFIGS.row(ARCH, kernels.shape_class(s, x.dtype, 2, 3, 3, deterministic))
    assert s.F % row.tiles["BF"], "nothing is padded"
    x[1, 1, 1, 7] = float("inf")
    want, _ = oracle(s, w, x, torch.float16)
    assert want[1].isinf().all() and not want.isnan().any()
    y = run(s, w, x, torch.float16, deterministic=deterministic)
    assert_close(y, want, budget(torch.float16))


def test_a_tap_outside_the_image_adds_nothing():
    """Whatever its weight is."""
    s, w = dw_ffn.Shape(64, 128), random_weights(64, 128)
    x = torch.randn(2, 1, 1, 64)
    want, _ = oracle(s, w, x, torch.float32)
    w.dw[:, 0], w.dw[:, 2], w.dw[:, 1, 0], w.dw[:, 1, 2] = (float("nan"),) * 4
    assert_close(run(s, w, x, torch.float32), want)


@pytest.mark.full
@pytest.mark.parametrize("C", [64, 224, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
def test_every_candidate(dtype, C):
    """What `evit-fast tune` may choose is right too."""
    s, w = dw_ffn.Shape(C, 2 * C), random_weights(C, 2 * C)
    x = torch.randn(2, 4, 4, C).to(dtype)
    candidates = kernels.CANDIDATES(s, dtype)
    assert len(candidates) >= 2
    for config in candidates:
        check(s, w, x, dtype, config=config)


def test_no_image_is_no_launch():
    s = dw_ffn.Shape(64, 128)
    packed = kernels.prepare(random_weights(64, 128), s, torch.float32)
    x = torch.empty(0, 4, 4, 64)
    assert kernels.plan(x.clone(), x, packed, s, None, arch=ARCH) == []


def test_scratch_is_for_shares():
    narrow, wide = dw_ffn.Shape(64, 128), dw_ffn.Shape(384, 768)
    assert kernels.scratch(narrow, torch.float16, 1, 14, 14) == 0
    assert kernels.scratch(wide, torch.float16, 1, 4, 4) == 12 * 16 * 384 * 4
    assert kernels.scratch(wide, torch.float16, 2048, 4, 4) == 0


def test_determinism_does_not_ask_for_the_number_of_images():
    s = dw_ffn.Shape(384, 768)

    def key(B: int, deterministic: bool) -> tuple:
        return kernels.shape_class(s, torch.float16, B, 4, 4, deterministic)

    assert key(1, False) != key(2048, False)
    assert key(1, True) == key(2048, True)


def test_refusals_are_one_sentence():
    s = dw_ffn.Shape(64, 128)
    assert kernels.supports(s, torch.bfloat16, 120) is None
    assert "sm_70" in kernels.supports(s, torch.float16, 70)
    assert "float64" in kernels.supports(s, torch.float64, 80)
    assert "C is 400" in kernels.supports(dw_ffn.Shape(400, 800), torch.float16, 80)
    wide = dw_ffn.Shape(384, 768)
    packed = kernels.prepare(random_weights(384, 768), wide, torch.float16)
    x = torch.empty(2048, 4, 4, 384, dtype=torch.float16, device="meta")
    shares = kernels.CONFIGS.row(ARCH, kernels.shape_class(wide, torch.float16, 1, 4, 4, False))
    with pytest.raises(ValueError, match="SPLIT=12 is for at most 2048 tokens, not 32768"):
        kernels.plan(x, x, packed, wide, None, arch=ARCH, config=shares)
