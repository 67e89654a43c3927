"""Token interaction and feed-forward: y = x + dw(x), then y + w2 relu(w1 y).   Paper section 3.1.

x, y       [B, H, W, C]    token-major, contiguous
w.dw       [C, 3, 3]       depthwise, zero-padded, BN folded; the centre tap carries the residual
w.w1       [F, C]          BN folded
w.w2       [C, F]          BN folded
w.dw_bias  [C]             as w.b1 [F], w.b2 [C] and w.dw float32 in every dtype
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from evit_fast import _native
from evit_fast.ops.depthwise import depthwise
from evit_fast.ops.line import LineShape, run_line


@dataclass(frozen=True)
class Shape(LineShape):
    """C: channels; F: hidden width."""

    op: ClassVar[str] = "dw_ffn"
    C: int
    F: int

    @property
    def channels_in(self) -> int:
        return self.C

    @property
    def channels_out(self) -> int:
        return self.C


class Weights(NamedTuple):
    dw: Any
    dw_bias: Any
    w1: Any
    b1: Any
    w2: Any
    b2: Any


parse = Shape.parse


def reference(x: torch.Tensor, w: Weights, s: Shape) -> torch.Tensor:
    """x [B, H, W, C] -> [B, H, W, C], one floating dtype throughout."""
    y = depthwise(x, w.dw, w.dw_bias)  # the residual is in the centre tap
    hidden = F.relu(F.linear(y, w.w1, w.b1))  # [B, H, W, F]
    return (y + F.linear(hidden, w.w2, w.b2)).contiguous()


def out_hw(H: int, W: int) -> tuple[int, int]:
    return H, W


def cost(s: Shape, B: int, H: int, W: int, dtype: torch.dtype) -> tuple[int, int]:
    """(FLOPs, fewest bytes moved); a multiply-add counts as two, ReLU as none."""
    T = B * H * W
    macs = T * (9 * s.C + 2 * s.C * s.F)
    return 2 * macs, 2 * T * s.C * dtype.itemsize + _native.op_bytes(s.line(dtype=dtype))


def dw_ffn(x: torch.Tensor, w: Weights, s: Shape) -> torch.Tensor:
    """The op alone: x [B, H, W, C] -> [B, H, W, C], x's dtype."""
    return run_line(x, w, s)
