"""The reference of every op against the eager modules it stands for, in float64, and its cost."""

from __future__ import annotations

import inspect

import pytest
import torch
from torch import Tensor

from evit_fast import fold, ops, program
from evit_fast.config import VARIANTS
from evit_fast.model import EfficientVit
from tests.close import assert_close, budget
from tests.ops.eager import MEAN, STD, Case, cases, eager_ops, model, tensors
from tests.randomize import randomize

EXACT = 1e-12  # relative L2 in float64: the order of sums only
SIZES = ((1, 1), (13, 9), None)  # None: the map at 224 x 224
MMACS = (79.2, 167.1, 201.0, 262.7, 299.3, 521.6)  # of M0 .. M5 at 224, the paper's table


def nhwc(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1) if x.dim() == 4 else x


def run(case: Case, x: Tensor) -> Tensor:
    """The reference on NCHW input."""
    op = ops.OPS[case.shape.op]
    return op.reference(x if op is ops.stem else nhwc(x), case.weights, case.shape)


def all_cases() -> list:
    params = []
    for op in ops.OPS:
        for case in cases(op):
            for size in SIZES:
                H, W = size or (case.side, case.side)
                params.append(pytest.param(case, H, W, id=f"{op}-{case.name}-{H}x{W}"))
    return params


@pytest.mark.parametrize("case,H,W", all_cases())
def test_equals_eager(case: Case, H: int, W: int):
    x = torch.randn(3, case.shape.channels_in, H, W, dtype=torch.float64)
    with torch.no_grad():
        y = run(case, x)
        assert_close(y, nhwc(case.eager(x)), EXACT)
    op = ops.OPS[case.shape.op]
    assert y.is_contiguous() and y.shape == (3, *op.out_hw(H, W), case.shape.channels_out)


@pytest.mark.parametrize("H,W", [(7, 7), (14, 14), (8, 8), (15, 6), (1, 20)])
@pytest.mark.parametrize("window", [1, 3, 7])
def test_cga_windows_padding_and_cropping(window: int, H: int, W: int):
    m = randomize(EfficientVit(VARIANTS["efficientvit_m0"], img_size=16 * window), seed=3).double()
    block = m.eval().stages[0].blocks[0].mixer
    (shape, weights), *_ = (f for f in fold.fold(m, MEAN, STD) if f[0].op == "cga")
    assert shape.window == window
    x = torch.randn(2, shape.C, H, W, dtype=torch.float64)
    with torch.no_grad():
        y = ops.cga.reference(nhwc(x), tensors(weights), shape)
        assert_close(y, nhwc(block(x)), EXACT)


@pytest.mark.parametrize("H,W", [(1, 1), (2, 31), (17, 33), (64, 48)])
def test_stem_takes_pixels_and_corrects_the_border(H: int, W: int):
    m = randomize(EfficientVit(VARIANTS["efficientvit_m2"]), seed=5).double().eval()
    mean, std = (0.9, 0.1, 0.5), (0.1, 0.7, 0.3)
    shape, weights = fold.fold(m, mean, std)[0]
    pixels = torch.randint(0, 256, (2, 3, H, W), dtype=torch.uint8)
    mean_, std_ = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
    with torch.no_grad():
        want = nhwc(m.patch_embed((pixels.double() / 255 - mean_) / std_))
        assert_close(ops.stem.reference(pixels, tensors(weights), shape), want, EXACT)


def test_classifier_averages_two_heads():
    config = VARIANTS["efficientvit_m0"]
    m = randomize(EfficientVit(config, 10, distillation=True), seed=1).double().eval()
    shape, weights = fold.fold(m, MEAN, STD)[-1]
    x = torch.randn(2, shape.C, 4, 3, dtype=torch.float64)
    with torch.no_grad():
        pooled = x.mean((2, 3))
        want = (m.head(pooled) + m.head_dist(pooled)) / 2
        assert_close(ops.classifier.reference(nhwc(x), tensors(weights), shape), want, EXACT)
    assert shape == ops.classifier.Shape(C=192, N=10)


def test_classifier_without_classes_pools():
    x = torch.randn(2, 5, 3, 192, dtype=torch.float64)
    shape = ops.classifier.Shape(C=192, N=0)
    y = ops.classifier.reference(x, ops.classifier.Weights(), shape)
    assert_close(y, x.mean((1, 2)), EXACT)


@pytest.mark.parametrize("op", ops.OPS)
def test_no_images(op: str):
    case = cases(op)[0]
    x = torch.randn(0, case.shape.channels_in, 9, 9, dtype=torch.float64)
    assert run(case, x).shape == (0, *ops.OPS[op].out_hw(9, 9), case.shape.channels_out)


@pytest.mark.parametrize(
    "dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16], ids=str
)
@pytest.mark.parametrize("op", ops.OPS)
def test_one_op_alone(op: str, dtype: torch.dtype):
    """The entry function packs and runs a program of one line in x's dtype."""
    case = cases(op)[0]
    x = torch.randn(2, case.shape.channels_in, 17, 12)
    if op != "stem":
        x = nhwc(x).contiguous()
    y = getattr(ops.OPS[op], op)(x.to(dtype), case.weights, case.shape)
    assert y.dtype == dtype
    want = ops.OPS[op].reference(x.to(dtype).double(), case.weights, case.shape)
    assert_close(y, want, budget(dtype))


def test_stem_alone_takes_pixels():
    case = cases("stem")[0]
    x = torch.randint(0, 256, (1, 3, 31, 18), dtype=torch.uint8)
    y = ops.stem.stem(x, case.weights, case.shape)
    assert y.dtype == torch.float32
    assert_close(y, ops.stem.reference(x, case.weights, case.shape), budget(torch.float32))


@pytest.mark.parametrize("name,mmacs", list(zip(VARIANTS, MMACS, strict=True)))
def test_costs_add_up_to_the_paper(name: str, mmacs: float):
    text, blob = fold.build(fold.fold(model(name), MEAN, STD))
    flops = moved = 0
    for op, x, _ in program.walk(text, (1, 3, 224, 224)):
        H, W = x[2:] if op.name == "stem" else x[1:3]
        more = ops.OPS[op.name].cost(op.shape, 1, H, W, torch.float32)
        flops, moved = flops + more[0], moved + more[1]
    assert round(flops / 2e6, 1) == mmacs
    assert 4 * 3 * 224**2 + blob.numel() < moved < 2 * (4 * 3 * 224**2 + blob.numel())


def test_cost_follows_batch_and_dtype():
    shape = ops.dw_ffn.Shape(C=64, F=128)
    one, two = (ops.dw_ffn.cost(shape, B, 7, 7, torch.float32) for B in (1, 2))
    assert two[0] == 2 * one[0] and two[1] - one[1] == 2 * 49 * 64 * 4
    assert ops.dw_ffn.cost(shape, 1, 7, 7, torch.bfloat16)[1] < one[1] * 0.6


def test_reference_is_short():
    """The meaning of an op fits 25 lines."""
    for op in ops.OPS.values():
        assert len(inspect.getsource(op.reference).splitlines()) <= 25, op.__name__


def test_every_eager_module_is_covered():
    """Nothing of the model lies outside the five ops."""
    m = model("efficientvit_m0")
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        y = x
        for part in eager_ops(m):
            y = part(y)
        assert_close(y, m(x), EXACT)
