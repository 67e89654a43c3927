"""Triton patch_merge in the interpreter against the float64 reference.

The interpreter has no bfloat16 arithmetic: products run on float32 copies, there alone.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evit_fast.kernels import patch_merge as kernels
from evit_fast.ops import patch_merge
from evit_fast.program import map_arrays
from tests.close import assert_close, budget, relative_error
from tests.kernels.interpret.guarded import Guarded
from tests.ops.eager import cases

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
HALVES = {"f16": torch.float16, "bf16": torch.bfloat16}
MATRICES = {"w1", "se1", "se2", "w3"}
ARCH = 80
NAN = float("nan")


def fused(Q: int, BF: int = 32) -> dict:
    return {"fused": kernels._hidden(64, Q, BF, 32, 8, 2)}


def run(
    s: patch_merge.Shape,
    w: patch_merge.Weights,
    x: Tensor,
    dtype: torch.dtype,
    y_dtype: torch.dtype | None = None,
    **options,
) -> Tensor:
    """y of one call, on poisoned output and scratch; their canaries are checked."""
    B, H, W, _ = x.shape
    y = Guarded((B, *patch_merge.out_hw(H, W), s.CO), y_dtype or x.dtype)
    space = Guarded((kernels.scratch(s, dtype, B, H, W),), torch.uint8)
    natural = w._replace(
        **{k: t.to(dtype if k in MATRICES else torch.float32) for k, t in w._asdict().items()}
    )
    packed = kernels.prepare(natural, s, dtype)
    kernels.launch(y.tensor, x, packed, s, space.tensor, arch=ARCH, **options)
    y.check("output")
    space.check("scratch")
    return y.tensor


def oracle(
    s: patch_merge.Shape, w: patch_merge.Weights, x: Tensor, dtype: torch.dtype
) -> tuple[Tensor, float]:
    """The float64 reference, and the relative error that the reference has in `dtype`."""
    want = patch_merge.reference(x.double(), w, s)
    in_dtype = map_arrays(w, lambda t: t.to(dtype))
    return want, relative_error(patch_merge.reference(x.to(dtype), in_dtype, s), want)


def check(
    s: patch_merge.Shape, w: patch_merge.Weights, x: Tensor, dtype: torch.dtype, **options
) -> None:
    """Right; the same bits for an image alone, with the same tiles."""
    want, own = oracle(s, w, x, dtype)
    y = run(s, w, x, dtype, **options)
    assert_close(y, want, budget(dtype, own), str(options))
    if x.shape[0] > 1:
        alone = run(s, w, x[-1:], dtype, **options)
        assert torch.equal(alone, y[-1:]), "an image alone has other bits than in a batch"


def random_weights(C: int, F: int, R: int, CO: int) -> patch_merge.Weights:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    return patch_merge.Weights(
        normal(F, C) / C**0.5, normal(F), normal(F, 3, 3) / 3, normal(F), normal(R, F) / F**0.5,
        normal(R), normal(F, R) / R**0.5, normal(F), normal(CO, F) / F**0.5, normal(CO),
    )  # fmt: skip


def params(maps: tuple, dtypes: dict, quick: set, wanted=lambda case: True) -> list:
    """Every shape of M0 .. M5 on `maps`; None is the merge's own map."""
    return [
        pytest.param(
            case, size or (case.side, case.side), dtype,
            id=f"patch_merge-{case.name}-{'own' if size is None else '{}x{}'.format(*size)}-{name}",
            marks=() if (case.name, size, name) in quick else pytest.mark.full,
        )
        for case in cases("patch_merge")
        if wanted(case)
        for size in maps
        for name, dtype in dtypes.items()
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("case", "size", "dtype"),
    params(
        (None, (13, 9), (1, 1), (2, 5), (24, 24)),
        FLOATS,
        {
            ("M0.0", None, "f32"),
            ("M0.0", (13, 9), "f16"),
            ("M0.0", (1, 1), "f16"),
            ("M0.0", (2, 5), "f32"),
            ("M0.0", (24, 24), "f16"),
            ("M5.0", None, "f16"),
            ("M5.1", None, "bf16"),
        },
    ),
)
def test_many_outputs(case, size, dtype):
    """Own maps, odd ones, one token, a map of several tiles; two images."""
    x = torch.randn(2, *size, case.shape.C).to(dtype)
    check(case.shape, case.weights, x, dtype, deterministic=True)


@pytest.mark.parametrize(
    ("case", "size", "dtype"),
    params(
        (None, (13, 9), (24, 24)),
        FLOATS,
        {("M0.0", None, "f32"), ("M0.0", (13, 9), "f16"), ("M0.1", None, "f16")},
    ),
)
def test_few_outputs(case, size, dtype):
    """Tiles smaller than a map, with the row and the column before their own outputs."""
    x = torch.randn(1 + (case.side < 14), *size, case.shape.C).to(dtype)
    check(case.shape, case.weights, x, dtype)


@pytest.mark.parametrize(
    ("case", "size", "dtype"),
    params(
        ((14, 14), (7, 7), (13, 9), (1, 1), (2, 5)),
        HALVES,
        {("M0.0", (14, 14), "f16"), ("M0.0", (7, 7), "bf16"), ("M0.1", (13, 9), "f16")},
        lambda case: case.shape.F <= 512,
    ),
)
def test_fused(case, size, dtype):
    """On the maps and shapes of the split form; four images a program where a map has 16 outputs,
    and a last program that is not full.
    """
    n = patch_merge.out_hw(*size)
    Q = 16 if n[0] * n[1] <= 16 else 64
    x = torch.randn(6 if Q == 16 else 2, *size, case.shape.C).to(dtype)
    check(case.shape, case.weights, x, dtype, config=fused(Q))


@pytest.mark.parametrize(
    ("size", "dtype"),
    [
        pytest.param(
            size, dtype,
            id=f"{size[0]}x{size[1]}-{name}",
            marks=() if name == "f16" or size == (17, 30) else pytest.mark.full,
        )
        for size in (
            (1, 1), (1, 2), (2, 1), (3, 3), (5, 4), (1, 140), (150, 1), (3, 70), (17, 30), (16, 16)
        )
        for name, dtype in FLOATS.items()
    ],
)  # fmt: skip
def test_any_map(size, dtype):
    """Whole maps, rows, columns and squares of tiles, with both tables."""
    s, w = patch_merge.Shape(16, 32, 16, 32), random_weights(16, 32, 16, 32)
    x = torch.randn(3, *size, 16).to(dtype)
    check(s, w, x, dtype)
    check(s, w, x, dtype, deterministic=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize(
    "widths",
    [
        (16, 16, 16, 16),
        (80, 96, 112, 48),
        pytest.param((48, 208, 32, 80), marks=pytest.mark.full),
    ],
    ids=str,
)
def test_any_width(widths, dtype):
    s, w, x = patch_merge.Shape(*widths), random_weights(*widths), torch.randn(3, 7, 5, widths[0])
    check(s, w, x.to(dtype), dtype)
    check(s, w, x.to(dtype), dtype, deterministic=True)
    if dtype == torch.float16:
        check(s, w, x.half(), dtype, config=fused(16))
        check(s, w, x.half(), dtype, config=fused(64, 16))


@pytest.mark.parametrize("kernel", ["hidden", "dense", "project"])
@pytest.mark.parametrize(
    "dtype",
    [pytest.param(torch.float32, marks=pytest.mark.full), torch.float16],
    ids=["f32", "f16"],
)
def test_every_candidate(dtype, kernel):
    """On a map of several tiles: images of one program share their place in it."""
    widths = (16, 144, 16, 80)
    s, w, x = patch_merge.Shape(*widths), random_weights(*widths), torch.randn(3, 11, 18, 16)
    for config in kernels.CANDIDATES(s, dtype)[kernel]:
        check(s, w, x.to(dtype), dtype, deterministic=True, config={kernel: config})


@pytest.mark.parametrize("form", ["split", "fused"])
@pytest.mark.parametrize("bad", [NAN, float("inf"), -float("inf")], ids=str)
def test_a_bad_token_spoils_its_image_as_in_eager_and_no_other(bad, form):
    """Three images of one program, whose hidden widths are padded. The gate spreads it."""
    widths = (32, 48, 16, 16)
    s, w, x = patch_merge.Shape(*widths), random_weights(*widths), torch.randn(3, 7, 6, 32).half()
    options = {"deterministic": True} if form == "split" else {"config": fused(16)}
    clean = run(s, w, x, torch.float16, **options)
    x[1, 6, 5, 3] = bad
    y = run(s, w, x, torch.float16, **options)
    want = patch_merge.reference(x.double(), w, s)
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())
    assert torch.equal(y[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize("form", ["split", "fused"])
def test_an_infinite_mean_is_a_gate_of_one(form):
    """Infinities through positive weights only, finite elsewhere: padded channels bring no NaN."""
    s = patch_merge.Shape(16, 48, 48, 16)
    w = patch_merge.Weights(*(t.abs() + 0.01 for t in random_weights(16, 48, 48, 16)))
    x = torch.randn(2, 5, 5, 16).half()
    x[0, 2, 2] = float("inf")
    options = {"deterministic": True} if form == "split" else {"config": fused(16)}
    y, want = run(s, w, x, torch.float16, **options), patch_merge.reference(x.double(), w, s)
    assert want[0].isinf().any() and want[0].isfinite().any()
    assert_close(y, want, budget(torch.float16))


@pytest.mark.parametrize("form", ["split", "fused"])
def test_gate_saturates_without_overflow(form):
    s, w = patch_merge.Shape(16, 64, 16, 32), random_weights(16, 64, 16, 32)
    w = w._replace(se2_bias=torch.linspace(-400.0, 400.0, 64, dtype=torch.float64))
    options = {"deterministic": True} if form == "split" else {"config": fused(16)}
    check(s, w, torch.randn(2, 6, 6, 16).half(), torch.float16, **options)


@pytest.mark.parametrize("form", ["split", "fused"])
@pytest.mark.parametrize("y_dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS.values(), ids=FLOATS)
def test_input_and_output_of_any_float(x_dtype, y_dtype, form):
    """The values of x are exact in every dtype: only y is rounded."""
    s, w = patch_merge.Shape(16, 32, 16, 16), random_weights(16, 32, 16, 16)
    x = torch.randn(2, 6, 6, 16).bfloat16()
    options = {"deterministic": True} if form == "split" else {"config": fused(16)}
    want = run(s, w, x.float(), torch.float16, torch.float32, **options)
    y = run(s, w, x.to(x_dtype), torch.float16, y_dtype, **options)
    assert_close(y, want, budget(y_dtype))
    if y_dtype == torch.float32:
        assert torch.equal(y, want)


def names(s: patch_merge.Shape, dtype: torch.dtype, B: int, side: int, **options) -> list[str]:
    meta = torch.device("meta")
    x = torch.empty(B, side, side, s.C, device=meta)
    y = torch.empty(B, *patch_merge.out_hw(side, side), s.CO, device=meta)
    w = map_arrays(random_weights(s.C, s.F, s.R, s.CO), lambda t: t.to(meta, dtype))
    space = torch.empty(kernels.scratch(s, dtype, B, side, side), dtype=torch.uint8, device=meta)
    launches = kernels.plan(y, x, kernels.prepare(w, s, dtype), s, space, arch=ARCH, **options)
    return [launch.kernel.fn.__name__ for launch in launches]


def test_which_form_runs():
    split = ["hidden_kernel", "dense_kernel", "dense_kernel", "project_kernel"]
    small, wide = (case.shape for case in cases("patch_merge") if case.name in ("M0.0", "M5.0"))
    half = torch.float16
    assert names(small, half, 2048, 14) == ["fused_kernel"]
    assert names(small, half, 8, 14) == split
    assert names(small, half, 2048, 14, deterministic=True) == split
    assert names(small, half, 2048, 24) == split
    assert names(small, torch.float32, 2048, 14) == split
    assert names(wide, half, 2048, 14) == split
    assert names(small, half, 0, 14) == []


def test_below_sm_80_is_refused():
    s = cases("patch_merge")[0].shape
    assert kernels.supports(s, torch.float16, 80) is None
    assert "sm_75" in kernels.supports(s, torch.float16, 75)
