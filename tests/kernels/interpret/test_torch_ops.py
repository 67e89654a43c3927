"""Triton ops as ops of torch, run in the interpreter: what they give, and what they refuse."""

from __future__ import annotations

import importlib

import pytest
import torch

from evit_fast.kernels import torch_ops
from evit_fast.ops import OPS
from evit_fast.program import map_arrays
from tests.close import assert_close
from tests.ops import eager


def arguments(op: str, B: int = 1, H: int = 4, W: int = 5):
    """x, packed weights, natural float64 weights and shape of M0's first shape of an op."""
    case = eager.cases(op)[0]
    s = case.shape
    if op == "stem":
        H, W = 8 * H, 8 * W
    x = torch.randn(B, s.channels_in, H, W)
    if op != "stem":
        x = x.permute(0, 2, 3, 1).contiguous()
    kernels = importlib.import_module(f"evit_fast.kernels.{op}")
    packed = kernels.prepare(map_arrays(case.weights, torch.Tensor.float), s, torch.float32)
    return x, packed, case.weights, s


@pytest.mark.parametrize("op", OPS)
def test_gives_what_the_op_means(op):
    x, packed, weights, s = arguments(op)
    y = torch_ops.call(x, packed, s.line())
    assert_close(y, OPS[op].reference(x.double(), weights, s), what=op)
    assert y.dtype == torch.float32


@pytest.mark.parametrize("op", ["stem", "dw_ffn"])
def test_takes_any_strides(op):
    x, packed, _, s = arguments(op)
    y = torch_ops.call(x, packed, s.line())
    other = x.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not other.is_contiguous()
    assert torch.equal(torch_ops.call(other, packed, s.line()), y)


def test_pixels_become_float32():
    _, packed, weights, s = arguments("stem")
    pixels = torch.randint(0, 256, (1, 3, 32, 32), dtype=torch.uint8)
    y = torch_ops.call(pixels, packed, s.line())
    assert_close(y, OPS["stem"].reference(pixels, weights, s))
    assert y.dtype == torch.float32


@pytest.mark.parametrize("op", OPS)
def test_no_image_is_an_empty_result(op):
    x, packed, weights, s = arguments(op)
    y = torch_ops.call(x[:0], packed, s.line())
    assert y.shape == (0, *OPS[op].reference(x.double(), weights, s).shape[1:])


@pytest.mark.parametrize("op", ["dw_ffn", "cga"])
def test_inputs_are_left_alone_and_not_returned(op):
    x, packed, _, s = arguments(op)
    torch.library.opcheck(
        torch_ops.DEFINED[op],
        (x, list(packed), s.line(), False, 80),
        test_utils="test_schema",
    )


def test_an_architecture_without_tensor_cores_is_refused():
    x, packed, _, s = arguments("cga")
    with pytest.raises(NotImplementedError, match="sm_70"):
        torch_ops.call(x, packed, s.line(), arch=70)


def test_a_wrong_input_is_one_sentence():
    x, packed, _, s = arguments("cga")
    with pytest.raises(ValueError, match="C=64, but C=32"):
        torch_ops.call(x[..., :32], packed, s.line())
