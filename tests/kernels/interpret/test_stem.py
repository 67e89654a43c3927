"""Triton stem in the interpreter against the float64 reference.

The interpreter has no bfloat16 arithmetic: products run on float32 copies, there alone.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from evit_fast.kernels import stem as kernels
from evit_fast.kernels.launches import Config
from evit_fast.ops import stem
from tests.close import assert_close, budget, relative_error
from tests.kernels.interpret.guarded import Guarded
from tests.ops.eager import cases

FLOATS = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
PIXELS = {"float": None, "u8": torch.uint8}
# Odd maps at some level, even ones at all, one token, one pixel.
SIZES = ((33, 47), (64, 64), (16, 16), (1, 1))
ARCH = 80


def image(kind: torch.dtype, *shape: int) -> Tensor:
    if kind == torch.uint8:
        return torch.randint(0, 256, shape, dtype=kind)
    return torch.randn(shape).to(kind)


def narrow(w: stem.Weights, dtype: torch.dtype) -> stem.Weights:
    """As an upload gives them: convolutions in the op's dtype, the rest float32."""
    return stem.Weights(
        **{
            k: v.to(dtype if k.startswith("conv") else torch.float32)
            for k, v in w._asdict().items()
        }
    )


def run(
    s: stem.Shape,
    w: stem.Weights,
    x: Tensor,
    dtype: torch.dtype,
    y_dtype: torch.dtype | None = None,
    **options,
) -> Tensor:
    """y of one call, on poisoned output and scratch; their canaries are checked."""
    B, _, H, W = x.shape
    y = Guarded((B, *stem.out_hw(H, W), s.C), y_dtype or dtype)
    space = Guarded((kernels.scratch(s, dtype, B, H, W),), torch.uint8)
    packed = kernels.prepare(narrow(w, dtype), s, dtype)
    kernels.launch(y.tensor, x, packed, s, space.tensor, arch=ARCH, **options)
    y.check("output")
    space.check("scratch")
    return y.tensor


def oracle(s: stem.Shape, w: stem.Weights, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The float64 reference, and the relative error that the reference has in `dtype`."""
    pixels = x.dtype == torch.uint8
    want = stem.reference(x if pixels else x.double(), w, s)
    in_dtype = stem.Weights(*(t.to(dtype) for t in w))
    return want, relative_error(stem.reference(x if pixels else x.to(dtype), in_dtype, s), want)


def check(s: stem.Shape, w: stem.Weights, x: Tensor, dtype: torch.dtype) -> None:
    """Right with the tiles for few and for many images; an image has the same bits alone."""
    want, own = oracle(s, w, x, dtype)
    for deterministic in (False, True):
        y = run(s, w, x, dtype, deterministic=deterministic)
        assert_close(y, want, budget(dtype, own), f"deterministic={deterministic}")
        if x.shape[0] > 1:
            alone = run(s, w, x[-1:], dtype, deterministic=deterministic)
            assert torch.equal(alone, y[-1:]), "an image alone has other bits than in a batch"


def random_weights(in_: int, C: int) -> stem.Weights:
    """float64; conv1_u8 on its own: the op does not ask where it comes from."""

    def conv(out: int, inner: int) -> Tensor:
        return torch.randn(out, inner, 3, 3, dtype=torch.float64) / (4.5 * inner) ** 0.5

    def vector(n: int) -> Tensor:
        return 0.3 * torch.randn(n, dtype=torch.float64)

    c1, c2, c3 = C // 8, C // 4, C // 2
    pad = 255 * torch.rand(in_, dtype=torch.float64)
    return stem.Weights(
        conv(c1, in_), vector(c1), conv(c1, in_) / 60, vector(c1), pad,
        conv(c2, c1), vector(c2), conv(c3, c2), vector(c3), conv(C, c3), vector(C),
    )  # fmt: skip


def params() -> list:
    quick = {("M0.0", name, kind) for name in FLOATS for kind in PIXELS}
    quick |= {("M5.0", "f16", "u8"), ("M5.0", "f32", "float")}
    return [
        pytest.param(
            case, size, dtype, PIXELS[kind] or dtype,
            id=f"stem-{case.name}-{size[0]}x{size[1]}-{name}-{kind}",
            marks=() if size == SIZES[0] and (case.name, name, kind) in quick else pytest.mark.full,
        )
        for case in cases("stem")
        for size in SIZES
        for name, dtype in FLOATS.items()
        for kind in PIXELS
    ]  # fmt: skip


@pytest.mark.parametrize(("case", "size", "dtype", "kind"), params())
def test_equals_reference(case, size, dtype, kind):
    check(case.shape, case.weights, image(kind, 2, 3, *size), dtype)


@pytest.mark.full
@pytest.mark.parametrize("case", cases("stem"), ids=lambda case: case.name)
def test_224(case):
    x = image(torch.uint8, 1, 3, 224, 224)
    want, own = oracle(case.shape, case.weights, x, torch.float16)
    for deterministic in (False, True):
        y = run(case.shape, case.weights, x, torch.float16, deterministic=deterministic)
        assert_close(y, want, budget(torch.float16, own))


WIDTHS = ((1, 64), (20, 64), (64, 64), (2, 256), (4, 320), (64, 128), (5, 448), (3, 1024))


def widths() -> list:
    return [
        pytest.param(
            in_, C, kind,
            id=f"stem-{in_}-{C}-{kind}",
            marks=() if (in_, C, kind) == (20, 64, "u8") else pytest.mark.full,
        )
        for in_, C in WIDTHS
        for kind in PIXELS
    ]  # fmt: skip


@pytest.mark.parametrize(("in_", "C", "kind"), widths())
def test_any_width(in_, C, kind):
    x = image(PIXELS[kind] or torch.float32, 2, in_, 9, 18)
    check(stem.Shape(in_, C), random_weights(in_, C), x, torch.float32)


def nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# Views of an image [2, 3, 34, 41], none of them NCHW and contiguous.
LAYOUTS = {
    "channels_last": nhwc,
    "channels_last_crop": lambda x: nhwc(x)[..., 3:38],
    "every_second_column": lambda x: x[..., ::2],
    "every_third_row": lambda x: x[:, :, ::3],
    "rotated": lambda x: x.mT,
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "grey": lambda x: x[:, :1].expand(-1, 3, -1, -1),
}


@pytest.mark.parametrize("kind", [torch.float32, torch.uint8], ids=["float", "u8"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout, kind):
    case = cases("stem")[0]
    x = LAYOUTS[layout](image(kind, 2, 3, 34, 41))
    assert not x.is_contiguous()
    want = run(case.shape, case.weights, x.contiguous(), torch.float16)
    assert torch.equal(run(case.shape, case.weights, x, torch.float16), want)


@pytest.mark.parametrize("x_dtype", FLOATS.values(), ids=FLOATS)
@pytest.mark.parametrize("y_dtype", FLOATS.values(), ids=FLOATS)
def test_input_and_output_of_any_float(x_dtype, y_dtype):
    """The values of x are exact in every dtype: only y is rounded."""
    case = cases("stem")[0]
    x = image(torch.bfloat16, 1, 3, 17, 30)
    want = run(case.shape, case.weights, x.float(), torch.float16, torch.float32)
    assert not torch.equal(want.half().float(), want), "rounded to the op's dtype"
    y = run(case.shape, case.weights, x.to(x_dtype), torch.float16, y_dtype)
    assert_close(y, want, budget(y_dtype))
    if y_dtype == torch.float32:
        assert torch.equal(y, want)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_spread_as_in_the_reference(value, deterministic):
    case = cases("stem")[0]
    x = torch.randn(3, 3, 46, 64)
    x[0, 1, 20, 40] = x[1, 0, 45, 63] = x[2, 2, 0, 0] = value
    want, own = oracle(case.shape, case.weights, x, torch.float16)
    assert 0 < (~want.isfinite()).sum() < want.numel()
    y = run(case.shape, case.weights, x, torch.float16, torch.float32, deterministic=deterministic)
    assert_close(y, want, budget(torch.float16, own))


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["f32", "f16"])
@pytest.mark.parametrize("case", cases("stem"), ids=lambda case: case.name)
def test_every_candidate(case, dtype):
    """What `evit-fast tune` may choose is right too."""
    x = image(dtype, 1, 3, 33, 47)
    want, own = oracle(case.shape, case.weights, x, dtype)
    for kernel, rows in kernels.CANDIDATES(case.shape, dtype).items():
        for row in rows:
            y = run(case.shape, case.weights, x, dtype, config={kernel: row})
            assert_close(y, want, budget(dtype, own), f"{kernel} {row}")


def test_no_image_is_no_launch():
    s = stem.Shape(3, 64)
    packed = kernels.prepare(random_weights(3, 64), s, torch.float32)
    y, x = torch.empty(0, 2, 2, 64), torch.empty(0, 3, 32, 32)
    assert kernels.plan(y, x, packed, s, None, arch=ARCH) == []


def test_determinism_does_not_ask_for_the_number_of_images():
    s = stem.Shape(3, 192)

    def rows(B: int, deterministic: bool) -> set[tuple]:
        key = kernels.shape_class(s, torch.float16, B, 224, 224, deterministic)
        return {key}

    assert rows(1, False) != rows(64, False)
    assert rows(1, True) == rows(64, True)


def test_refusals_are_one_sentence():
    s = stem.Shape(3, 64)
    assert kernels.supports(s, torch.float16, 80) is None
    assert "sm_75" in kernels.supports(s, torch.float16, 75)
    assert "float64" in kernels.supports(s, torch.float64, 80)
    packed = kernels.prepare(random_weights(3, 64), s, torch.float32)
    x = torch.empty(1, 3, 33, 33, device="meta").as_strided((1, 3, 33, 33), (1, 1, 1 << 27, 3))
    y = torch.empty(1, 3, 3, 64, device="meta")
    with pytest.raises(NotImplementedError, match="2\\^31 and more inside one image"):
        kernels.plan(y, x, packed, s, None, arch=ARCH)


def test_a_given_row_is_used():
    s = stem.Shape(3, 64)
    packed = kernels.prepare(random_weights(3, 64), s, torch.float32)
    space = torch.empty(kernels.scratch(s, torch.float32, 1, 32, 32), dtype=torch.uint8)
    row = Config({"BT": 16, "BN": 16, "BK": 32}, 1, 1)
    y, x = torch.empty(1, 2, 2, 64), torch.empty(1, 3, 32, 32)
    launches = kernels.plan(y, x, packed, s, space, arch=ARCH, config={"conv": row})
    assert [launch.config == row for launch in launches] == [False, True, True]
