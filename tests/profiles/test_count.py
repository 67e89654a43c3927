"""Counted FLOPs and bytes against sums by hand."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from evit_fast.bench.models import cost
from evit_fast.config import resolve
from evit_fast.model import create_model
from evit_fast.model_ops import model_ops
from evit_fast.ops import OPS
from evit_fast.profiles.count import Counter, flops_of


def counted(work):
    with torch.no_grad(), Counter() as counter:
        work()
    return [(op.kind.removeprefix("aten::"), op.group, op.flops, op.bytes) for op in counter.ops]


def test_ops_by_hand() -> None:
    x, w = torch.randn(2, 8, 5, 5), torch.randn(6, 8, 3, 3)
    size = 2 * 6 * 5 * 5
    assert counted(lambda: F.conv2d(x, w, padding=1)) == [
        ("convolution", "conv_gemm", 2 * size * 8 * 9, 4 * (400 + 432 + size))
    ]
    d = torch.randn(8, 1, 3, 3)
    assert counted(lambda: F.conv2d(x, d, padding=1, groups=8)) == [
        ("convolution", "depthwise", 2 * 400 * 9, 4 * (400 + 72 + 400))
    ]
    a, b = torch.randn(3, 4, 7), torch.randn(3, 7, 5)
    assert counted(lambda: a @ b) == [("bmm", "attention", 2 * 3 * 4 * 7 * 5, 4 * (84 + 105 + 60))]
    m, bias, v = torch.randn(4, 7), torch.randn(9), torch.randn(9, 7)
    assert counted(lambda: F.linear(m, v, bias)) == [
        ("addmm", "conv_gemm", 2 * 4 * 7 * 9, 4 * (28 + 63 + 9 + 36))
    ]
    assert counted(lambda: a.softmax(-1)) == [("_softmax", "softmax", 5 * 84, 4 * 2 * 84)]
    assert counted(lambda: x.mean((2, 3))) == [("mean", "pooling", 400, 4 * (400 + 16))]


def test_views_are_none_and_copies_have_no_flops() -> None:
    x = torch.randn(2, 6, 4)
    assert counted(lambda: x.transpose(1, 2).view(2, 2, 2, 6)[:, 0].expand(3, 2, 2, 6)) == []
    assert counted(lambda: x.contiguous()) == []
    assert counted(lambda: x.mT.contiguous()) == [("clone", "movement", 0, 4 * 2 * 48)]
    assert counted(lambda: torch.cat([x, x[:1]])) == [("cat", "movement", 0, 4 * (48 + 24 + 72))]


def test_bytes_are_distinct() -> None:
    x = torch.randn(4, 8)
    row = torch.randn(8)
    assert counted(lambda: x + x)[0][3] == 4 * (32 + 32)  # once in, once out
    assert counted(lambda: x + row.expand(4, 8))[0][3] == 4 * (32 + 8 + 32)
    assert counted(lambda: x.relu_())[0][2:] == (32, 4 * (32 + 32))  # read and written


def test_an_unknown_op_is_an_error() -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match=r"no class for the op 'aten::cumsum'"):
        counted(lambda: torch.cumsum(x, 0))


@pytest.mark.parametrize("model", ["m0", "m5"])
def test_a_model_does_the_arithmetic_of_its_fused_ops(model) -> None:
    """Products and depthwise: nothing of the network is counted twice or left out."""
    eager = create_model(model).eval()
    x = torch.randn(1, 3, 224, 224)
    with torch.no_grad(), Counter() as counter:
        eager(x)
    products = ("conv_gemm", "depthwise", "attention")
    flops = sum(op.flops for op in counter.ops if op.group in products)
    expected, moved = cost(f"efficientvit_{model}", 1, 224)
    # The residuals are in the centre taps of the fused depthwise weights: no FLOPs either way.
    assert flops == pytest.approx(expected, rel=1e-3)
    assert sum(op.bytes for op in counter.ops) > 2 * moved


def test_flops_from_sizes() -> None:
    """As ONNX Runtime gives them: a transposed operand, a bias, packed weights named by us."""
    assert flops_of("FusedMatMul", "attention", [[4, 16, 49], [4, 16, 49]], [4, 49, 49]) == (
        2 * 4 * 49 * 49 * 16
    )
    assert flops_of("Gemm", "conv_gemm", [[2, 192], [192, 10], [10]], [2, 10]) == 2 * 2 * 192 * 10
    conv = [[1, 8, 5, 5], [6, 8, 3, 3], [6]]
    assert flops_of("Conv", "conv_gemm", conv, [1, 6, 5, 5]) == 2 * 6 * 25 * 72
    assert flops_of("Transpose", "movement", [[4, 4]], [4, 4]) == 0


def test_ops_are_part_of_a_fused_op() -> None:
    """Each fused op's share of the arithmetic is the sum of the eager ops that it stands for."""
    eager = create_model("m1").eval()
    x = torch.randn(2, 3, 224, 224)
    with torch.no_grad(), Counter() as counter:
        eager(x)
    assert all(op.part for op in counter.ops)
    expected: dict[str, int] = {}
    for shape, side in model_ops(resolve("m1")):
        flops, _ = OPS[shape.op].cost(shape, 2, side, side, torch.float32)
        expected[shape.op] = expected.get(shape.op, 0) + flops
    for part, flops in expected.items():
        products = ("conv_gemm", "depthwise", "attention")
        found = [op.flops for op in counter.ops if op.part == part and op.group in products]
        assert sum(found) == pytest.approx(flops, rel=1e-3), part
    with torch.no_grad():
        eager(x)  # the counter has taken its hooks away
    assert counter._parts == []
