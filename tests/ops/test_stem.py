"""stem in every column against the float64 reference: M0 .. M5, image sizes, strides, pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

import evit_fast.columns  # noqa: F401  (registers the torch op)
from evit_fast import _native
from evit_fast.ops import stem
from tests.close import assert_close, budget
from tests.ops.columns import ISAS, blob_of, check_op, instruction_set, oracle, run
from tests.ops.eager import Case, cases

# The models' sizes, odd maps at every level, one pixel, sides below a vector, a row of many tiles.
SIZES = (
    (224, 224), (208, 208), (160, 192), (64, 64), (225, 223), (1, 1), (2, 3), (13, 9), (17, 33),
    (5, 700),
)  # fmt: skip
DTYPES = {"f32": torch.float32, "u8": torch.uint8}


def image(dtype: torch.dtype, *shape: int) -> Tensor:
    if dtype == torch.uint8:
        return torch.randint(0, 256, shape, dtype=dtype)
    return torch.randn(shape, dtype=dtype)


def params() -> list:
    found = []
    for case in cases("stem"):
        for H, W in SIZES:
            for isa in ISAS:
                for kind, dtype in DTYPES.items():
                    name = f"stem-{case.name}-{H}x{W}-{isa}-{kind}"
                    found.append(pytest.param(case, H, W, isa, dtype, id=name))
    return found


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


@pytest.mark.parametrize("case,H,W,isa,dtype", params())
def test_equals_reference(case: Case, H: int, W: int, isa: str, dtype: torch.dtype):
    check_op(isa, case.shape, case.weights, image(dtype, 1 if H * W > 9000 else 3, 3, H, W))


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", cases("stem"), ids=lambda case: case.name)
def test_reference_column(case: Case, dtype: torch.dtype):
    x = image(dtype, 2, 3, 49, 34)
    want, single = oracle(case.shape, case.weights, x)
    program, blob = blob_of(case.shape, case.weights)
    y = torch.ops.evit_fast.forward(x, program, blob, None, "reference")
    assert_close(y, want, budget(torch.float32, single))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("in_,C", [(1, 64), (2, 256), (4, 320), (64, 128), (5, 448), (3, 1024)])
def test_any_width(in_: int, C: int, isa: str):
    weights = random_weights(in_, C)
    for dtype in DTYPES.values():
        check_op(isa, stem.Shape(in_, C), weights, image(dtype, 2, in_, 35, 66))


def nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


# Views of an image [B, 3, 40, 70], none of them NCHW and contiguous.
LAYOUTS = {
    "channels_last": nhwc,
    "channels_last_crop": lambda x: nhwc(x)[..., 3:68],
    "every_second_column": lambda x: x[..., ::2],
    "every_third_row": lambda x: x[:, :, ::3],
    "rotated": lambda x: x.mT,
    "batch_last": lambda x: x.permute(1, 2, 3, 0).contiguous().permute(3, 0, 1, 2),
    "channels_in_rows": lambda x: x.permute(0, 2, 1, 3).contiguous().permute(0, 2, 1, 3),
    "grey": lambda x: x[:, :1].expand(-1, 3, -1, -1),
    "one_colour": lambda x: x[:, :, :1, :1].expand(-1, -1, 40, 70),
}


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_any_strides(layout: str, dtype: torch.dtype, isa: str):
    case = cases("stem")[0]
    x = LAYOUTS[layout](image(dtype, 2, 3, 40, 70))
    assert not x.is_contiguous()
    program, blob = blob_of(case.shape, case.weights)
    with instruction_set(isa):
        want = run(program, blob, x.contiguous())
        for threads in (1, 3):
            y = run(program, blob, x, threads)
            assert torch.equal(y, want), f"{layout}, {threads} threads: other bits than contiguous"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("axes", [(1,), (2,), (3,), (1, 2, 3)], ids=str)
@pytest.mark.parametrize("planar", [True, False], ids=["nchw", "nhwc"])
def test_negative_strides(planar: bool, axes: tuple[int, ...], dtype: torch.dtype, isa: str):
    """As the C API takes them; torch has none."""
    case = cases("stem")[-1]
    program, blob = blob_of(case.shape, case.weights)
    x = image(dtype, 1, 3, 33, 65).numpy()
    view = np.flip(x, axes)
    if not planar:
        view = np.flip(nhwc(torch.from_numpy(x)).numpy(), axes)
    flipped = torch.from_numpy(np.ascontiguousarray(view))
    m = _native.Model(program, blob.data_ptr(), blob.numel())
    y = torch.full(m.output_shape(1, 33, 65), float("nan"))
    space = torch.full((m.workspace_bytes(1, 33, 65, 1) // 4,), float("nan"))
    strides = [stride // x.itemsize for stride in view.strides]
    with instruction_set(isa):
        m.run(
            view.__array_interface__["data"][0], str(dtype).removeprefix("torch."),
            list(view.shape), strides, y.data_ptr(), space.data_ptr(), 4 * space.numel(), 1,
        )  # fmt: skip
        assert torch.equal(y, run(program, blob, flipped))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", cases("stem"), ids=lambda case: case.name)
def test_bits_do_not_depend_on_the_size_of_the_image(case: Case, dtype: torch.dtype, isa: str):
    """A token sees 15 pixels to either side, wherever the tiles of its row end."""
    x = image(dtype, 1, 3, 90, 330)
    program, blob = blob_of(case.shape, case.weights)
    with instruction_set(isa):
        whole = run(program, blob, x)
        for W in range(200, 330, 13):
            inner = (W - 16) // 16 + 1
            part = run(program, blob, x[..., :W])
            assert torch.equal(part[:, :, :inner], whole[:, :, :inner]), W
        assert torch.equal(run(program, blob, x[:, :, :64])[:, :4], whole[:, :4])


@pytest.mark.parametrize("isa", ISAS)
def test_nan_spreads_as_in_the_reference(isa: str):
    case = cases("stem")[0]
    x = torch.randn(1, 3, 80, 96)
    x[0, 1, 40, 50] = float("nan")
    want, _ = oracle(case.shape, case.weights, x)
    assert 0 < want.isnan().sum() < want.numel()
    program, blob = blob_of(case.shape, case.weights)
    with instruction_set(isa):
        assert_close(run(program, blob, x), want)
