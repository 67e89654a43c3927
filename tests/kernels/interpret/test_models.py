"""Whole models through accelerate(backend="triton"), in Triton's interpreter, against float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import evit_fast
from evit_fast.config import Config
from evit_fast.images import normalise
from evit_fast.model import EfficientVit, create_model
from tests.close import assert_close, budget, relative_error
from tests.randomize import randomize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


SMALL = Config("small", (64, 64, 64), (1, 1, 1), (4, 2, 4), (5, 3, 3, 1))


def model(name: str) -> EfficientVit:
    return randomize(create_model(name, num_classes=10), seed=int(name[-1])).eval()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(4))


def exact(m: EfficientVit, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(m).double()(x.double())


def own_error(m: EfficientVit, x: Tensor, want: Tensor, dtype: torch.dtype) -> float:
    """Of the reference column in the same dtype."""
    with torch.no_grad():
        return relative_error(evit_fast.accelerate(m, dtype=dtype, backend="reference")(x), want)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("m0", torch.float32),
        ("m5", torch.float32),
        pytest.param("m0", torch.float16, marks=pytest.mark.full),
        pytest.param("m5", torch.float16, marks=pytest.mark.full),
        # The interpreter has no bfloat16 arithmetic: the operands of products become float32.
        pytest.param("m5", torch.bfloat16, marks=pytest.mark.full),
        *(pytest.param(f"m{i}", torch.float32, marks=pytest.mark.full) for i in range(1, 5)),
    ],
    ids=lambda value: str(value).removeprefix("torch."),
)
def test_logits(name: str, dtype: torch.dtype):
    m, x = model(name), images(1, 3, 64, 80)
    want = exact(m, x)
    # Of M0 the tiles for few images too; they are more programs, and M5 is large enough without.
    settings = {"backend": "triton", "strict": True, "deterministic": name != "m0"}
    fast = evit_fast.accelerate(m, dtype=dtype, **settings)
    rows = evit_fast.explain(fast)
    assert {(row.column, row.isa, row.reason) for row in rows} == {("triton", "interpreter", "")}
    with torch.no_grad():
        y = fast(x)
    assert_close(y, want, budget(dtype, own_error(m, x, want, dtype)), f"{name} {dtype}")


def test_slices_pixels_and_batches():
    m = randomize(EfficientVit(SMALL, num_classes=5), seed=1).eval()
    fast = evit_fast.accelerate(m, backend="triton", deterministic=True)
    x = torch.randint(0, 256, (2, 48, 64, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    floats = normalise(x, MEAN, STD)
    want = exact(m, floats)
    rel = budget(torch.float32, own_error(m, floats, want, torch.float32))
    with torch.no_grad():
        y = fast(x)
        assert_close(y, want, rel)
        assert torch.equal(fast(x[1:]), y[1:]), "an image alone has other bits than in a batch"
        last, maps = fast.forward_intermediates(floats[1:].half())
        assert {t.dtype for t in maps} == {torch.float16}
        assert_close(fast.forward_head(last.float()), want[1:], 3e-3)
