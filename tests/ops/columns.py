"""Running one op, or a program, in every native column.

Instruction sets are forced; output and workspace start as NaN, with canaries on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from evit_fast import _native, ops
from evit_fast.ops.line import LineShape, pack
from evit_fast.program import map_arrays
from tests.close import assert_close, budget, relative_error

ISAS = tuple(_native.isas())
CANARY = 123456.0
EDGE = 64  # floats on either side of a buffer


@contextmanager
def instruction_set(name: str) -> Iterator[None]:
    """Caps the native column at one instruction set."""
    before = _native.isa()
    _native.set_max_isa(name)
    try:
        assert _native.isa() == name
        yield
    finally:
        _native.set_max_isa(before)


class Guarded:
    """A float32 buffer of NaN with canaries on both sides. `shift` floats off 64-byte alignment."""

    def __init__(self, n: int, shift: int = 0) -> None:
        self.whole = torch.full((n + 2 * EDGE + 16,), CANARY)
        start = EDGE - self.whole.data_ptr() // 4 % 16 + shift
        self.view = self.whole[start : start + n]
        self.view.fill_(float("nan"))
        self.edges = (self.whole[:start], self.whole[start + n :])

    def check(self, what: str) -> None:
        for edge in self.edges:
            assert (edge == CANARY).all(), f"{what}: written outside its {self.view.numel()} floats"


def blob_of(shape: LineShape, weights: NamedTuple) -> tuple[str, Tensor]:
    """A float32 program of one line and its blob, 64-byte aligned."""
    line = shape.line()
    blob = torch.zeros(_native.op_bytes(line), dtype=torch.uint8)
    pack(line, weights, blob)
    return line, blob


def run(program: str, blob: Tensor, x: Tensor, threads: int = 1, shift: int = 0) -> Tensor:
    """Runs on poisoned output and workspace and checks their canaries; y in its own shape."""
    m = _native.Model(program, blob.data_ptr(), blob.numel())
    B = x.shape[0]
    H, W = x.shape[2:] if program.startswith("stem ") else x.shape[1:3]
    out_shape = m.output_shape(B, H, W)
    y = Guarded(int(torch.Size(out_shape).numel()), shift)
    nbytes = m.workspace_bytes(B, H, W, threads)
    assert nbytes % 4 == 0
    space = Guarded(nbytes // 4)
    kind = str(x.dtype).removeprefix("torch.")
    m.run(
        x.data_ptr(), kind, list(x.shape), list(x.stride()), y.view.data_ptr(),
        space.view.data_ptr(), nbytes, threads,
    )  # fmt: skip
    y.check(f"{program}: output")
    space.check(f"{program}: workspace")
    return y.view.view(out_shape)


def oracle(shape: LineShape, weights: NamedTuple, x: Tensor) -> tuple[Tensor, float]:
    """The float64 reference, and the relative error of the float32 reference on the same input."""
    op = ops.OPS[shape.op]
    wide = x if x.dtype == torch.uint8 else x.double()
    want = op.reference(wide, weights, shape)
    single = op.reference(x, map_arrays(weights, lambda t: t.float()), shape)
    return want, relative_error(single, want)


def check_op(isa: str, shape: LineShape, weights: NamedTuple, x: Tensor) -> None:
    """One op in one instruction set: right; the same bits misaligned, in a team, and alone."""
    want, single = oracle(shape, weights, x)
    program, blob = blob_of(shape, weights)
    with instruction_set(isa):
        y = run(program, blob, x)
        assert_close(y, want, budget(torch.float32, single), f"{program} {tuple(x.shape)}")
        assert torch.equal(run(program, blob, x, shift=1), y), "a misaligned output has other bits"
        for threads in (2, 3, 8):
            assert torch.equal(run(program, blob, x, threads), y), f"{threads} threads: other bits"
        if x.shape[0] > 1:
            last = run(program, blob, x[-1:])
            assert torch.equal(last, y[-1:]), "an image alone has other bits than in a batch"
