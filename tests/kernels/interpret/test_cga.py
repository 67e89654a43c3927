"""Triton cga in the interpreter against the float64 reference.

The interpreter has no bfloat16 arithmetic: products run on float32 copies, there alone.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evit_fast.kernels import cga as kernels
from evit_fast.kernels.launches import Config
from evit_fast.ops import cga
from evit_fast.program import map_arrays
from tests.close import assert_close, budget, relative_error
from tests.kernels.interpret.guarded import Guarded
from tests.ops.eager import cases

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
ARCH = 80
LOG2E = 1.4426950408889634
FORMS = ((1, 0, 3), (1, 1, 5), (4, 0, 3), (4, 1, 4))  # PACK, PROJECT, window


def run(
    s: cga.Shape,
    w: cga.Weights,
    x: Tensor,
    dtype: torch.dtype,
    y_dtype: torch.dtype | None = None,
    **options,
) -> Tensor:
    """y of one call, on poisoned output and scratch; their canaries are checked."""
    y = Guarded(x.shape, y_dtype or x.dtype)
    space = Guarded((kernels.scratch(s, dtype, *x.shape[:3]),), torch.uint8)
    single = map_arrays(w, lambda t: t.float())
    natural = single._replace(
        qkv=tuple(t.to(dtype) for t in single.qkv), proj=single.proj.to(dtype)
    )
    packed = kernels.prepare(natural, s, dtype)
    kernels.launch(y.tensor, x, packed, s, space.tensor, arch=ARCH, **options)
    y.check("output")
    space.check("scratch")
    return y.tensor


def oracle(s: cga.Shape, w: cga.Weights, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The float64 reference, and the relative error that the reference has in `dtype`."""
    want = cga.reference(x.double(), w, s)
    in_dtype = map_arrays(w, lambda t: t.to(dtype))
    return want, relative_error(cga.reference(x.to(dtype), in_dtype, s), want)


def check(s: cga.Shape, w: cga.Weights, x: Tensor, dtype: torch.dtype, **options) -> None:
    """Right; the same bits for an image alone, with the same tiles."""
    want, own = oracle(s, w, x, dtype)
    y = run(s, w, x, dtype, **options)
    assert_close(y, want, budget(dtype, own), str(options))
    if x.shape[0] > 1:
        alone = run(s, w, x[-1:], dtype, **options)
        assert torch.equal(alone, y[-1:]), "an image alone has other bits than in a batch"


def random_weights(s: cga.Shape) -> cga.Weights:
    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64)

    NQ, DV, S = 2 * s.dk + s.dv, s.dv, s.tokens
    return cga.Weights(
        qkv=tuple(normal(NQ, DV) * (0.5 / DV**0.5) for _ in s.ks),
        qkv_bias=tuple(normal(NQ) * 0.3 for _ in s.ks),
        dw=tuple(normal(s.dk, k, k) * (0.5 / k) for k in s.ks),
        dw_bias=tuple(normal(s.dk) * 0.2 for _ in s.ks),
        bias=tuple(normal(S, S) * LOG2E for _ in s.ks),
        proj=normal(s.C, s.C) / s.C**0.5,
        proj_bias=normal(s.C) * 0.3,
    )


def window(PACK: int, PROJECT: int) -> dict[str, Config]:
    return {"window": kernels.window(PACK, PROJECT, 4)}


def params() -> list:
    """Every block shape on its own map, on maps that pad both ways, on one token."""
    quick = {("M0.0", (1, 1), "f16"), ("M0.2", None, "bf16"), ("M2.2", None, "f32")}
    quick |= {("M5.0", None, name) for name in FLOATS}
    return [
        pytest.param(
            case, size or (case.side, case.side), dtype,
            id=f"cga-{case.name}-{'own' if size is None else '{}x{}'.format(*size)}-{name}",
            marks=() if (case.name, size, name) in quick else pytest.mark.full,
        )
        for case in cases("cga")
        for size in (None, (13, 9), (1, 1), (14, 14))
        for name, dtype in FLOATS.items()
        if size != (case.side, case.side)
    ]  # fmt: skip


def some(*quick: object, of: tuple) -> list:
    """Parameters of which only a few run in `make test`."""
    return [pytest.param(*v, marks=() if v in quick else pytest.mark.full) for v in of]


@pytest.mark.parametrize(("case", "size", "dtype"), params())
def test_equals_reference(case, size, dtype):
    x = torch.randn(2, *size, case.shape.C).to(dtype)
    check(case.shape, case.weights, x, dtype, deterministic=True)


@pytest.mark.parametrize("name", ["M1.2", pytest.param("M4.0", marks=pytest.mark.full)])
@pytest.mark.parametrize("dtype", FLOATS.values(), ids=FLOATS)
def test_few_windows(dtype, name):
    case = next(c for c in cases("cga") if c.name == name)
    x = torch.randn(1, case.side, case.side, case.shape.C).to(dtype)
    check(case.shape, case.weights, x, dtype)


@pytest.mark.parametrize(
    "WIN,dtype",
    some(
        (1, torch.float16), (3, torch.float32), (6, torch.float16), (11, torch.float16),
        of=tuple((n, t) for n in (1, 2, 3, 5, 6, 8, 9, 11) for t in (torch.float32, torch.float16)),
    ),
)  # fmt: skip
def test_any_window(WIN, dtype):
    s = cga.Shape(96, 2, 16, WIN, (5, 1) if WIN < 8 else (3, 1))
    check(s, random_weights(s), torch.randn(1, WIN, WIN + 1, 96).to(dtype), dtype)


@pytest.mark.parametrize(
    "C,heads,PROJECT",
    some(
        (16, 1, 0), (224, 2, 1), (48, 1, 1),
        of=tuple(
            (C, heads, PROJECT)
            for C, heads in ((16, 1), (48, 1), (224, 2), (128, 8), (240, 3), (256, 2))
            for PROJECT in (0, 1)
        ),
    ),
)  # fmt: skip
def test_any_width(C, heads, PROJECT):
    """Heads and channels of one part, of two, and with columns that no channel fills."""
    s = cga.Shape(C, heads, 16, 2, tuple((1, 3, 5, 7)[i % 4] for i in range(heads)))
    x = torch.randn(2, 3, 2, C)
    check(s, random_weights(s), x, torch.float32, config=window(1, PROJECT))


@pytest.mark.parametrize(
    "PACK,PROJECT,dtype",
    some(
        (2, 0, torch.float32), (4, 1, torch.float16),
        of=tuple(
            (PACK, PROJECT, dtype)
            for PACK in (1, 2, 4)
            for PROJECT in (0, 1)
            for dtype in (torch.float32, torch.float16)
        ),
    ),
)  # fmt: skip
def test_windows_in_one_program(PACK, PROJECT, dtype):
    """Windows of two images in one program, the last program not full."""
    s = cga.Shape(64, 2, 16, 4, (3, 5))
    x = torch.randn(3, 4, 7, 64).to(dtype)
    check(s, random_weights(s), x, dtype, config=window(PACK, PROJECT))


@pytest.mark.parametrize("y_dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("x_dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("PROJECT", [0, 1])
def test_input_and_output_of_any_float(PROJECT, x_dtype, y_dtype):
    """The values of x are exact in every dtype: only y is rounded."""
    s = cga.Shape(64, 2, 16, 2, (3, 1))
    w, x = random_weights(s), torch.randn(2, 2, 2, 64).bfloat16()
    config = window(1, PROJECT)
    want = run(s, w, x.float(), torch.float16, torch.float32, config=config)
    y = run(s, w, x.to(x_dtype), torch.float16, y_dtype, config=config)
    assert_close(y, want, budget(y_dtype))
    if y_dtype == torch.float32:
        assert torch.equal(y, want)


@pytest.mark.parametrize(
    "value", [float("nan"), float("inf"), pytest.param(float("-inf"), marks=pytest.mark.full)]
)
@pytest.mark.parametrize("PACK,PROJECT,WIN", some((1, 0, 3), (4, 1, 4), of=FORMS))
def test_nan_and_inf_stay_in_their_window(PACK, PROJECT, WIN, value):
    s = cga.Shape(96, 2, 16, WIN, (3, 5))
    w, x = random_weights(s), torch.randn(2, WIN, 2 * WIN - 1, 96)
    x[0, 1, WIN - 1, 50], x[1, 0, WIN, 3] = value, value  # second head only; both heads
    want, _ = oracle(s, w, x, torch.float32)
    y = run(s, w, x, torch.float32, config=window(PACK, PROJECT))
    assert not want[0, :, WIN:].isnan().any() and not want[1, :, :WIN].isnan().any()
    assert want[0, :, :WIN].isnan().any() and want[1, :, WIN:].isnan().any()
    assert_close(y, want)


@pytest.mark.parametrize("PROJECT", [0, 1])
def test_inf_meets_no_padding(PROJECT):
    """Where v is Inf and scores are not, Inf stays Inf: no padded row multiplies it by 0."""
    s = cga.Shape(48, 1, 16, 3, (3,))
    w = map_arrays(random_weights(s), torch.abs)
    w.qkv[0][: 2 * s.dk] = 0  # q and k are their biases
    w.qkv_bias[0][2 * s.dk :] = float("inf")
    x = torch.rand(1, 3, 3, 48)
    want, _ = oracle(s, w, x, torch.float32)
    assert want.isinf().all()
    assert_close(run(s, w, x, torch.float32, config=window(1, PROJECT)), want)


def test_a_tap_outside_the_window_adds_nothing():
    """Whatever its weight is."""
    s = cga.Shape(16, 1, 16, 1, (3,))
    w, x = random_weights(s), torch.randn(2, 1, 2, 16)
    want, _ = oracle(s, w, x, torch.float32)
    dw = torch.full_like(w.dw[0], float("nan"))
    dw[:, 1, 1] = w.dw[0][:, 1, 1]
    assert_close(run(s, w._replace(dw=(dw,)), x, torch.float32), want)


def test_no_image_is_no_launch():
    s = cga.Shape(64, 2, 16, 4, (3, 5))
    packed = kernels.prepare(random_weights(s), s, torch.float32)
    x = torch.empty(0, 4, 4, 64)
    assert kernels.plan(x.clone(), x, packed, s, None, arch=ARCH) == []


@pytest.mark.parametrize(
    ("s", "dtype", "arch", "why"),
    [
        (cga.Shape(64, 2, 16, 11, (3, 5)), torch.float16, 80, None),
        (cga.Shape(64, 2, 16, 12, (3, 5)), torch.float16, 80, "11x11"),
        (cga.Shape(288, 2, 16, 7, (3, 5)), torch.float16, 80, "144"),
        (cga.Shape(64, 2, 16, 7, (3, 5)), torch.float64, 80, "float64"),
        (cga.Shape(64, 2, 16, 7, (3, 5)), torch.float16, 75, "sm_75"),
    ],
)
def test_supports(s, dtype, arch, why):
    found = kernels.supports(s, dtype, arch)
    assert found is None if why is None else why in found
