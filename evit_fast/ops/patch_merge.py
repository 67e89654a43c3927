"""Downsampling between stages: an inverted bottleneck with squeeze-excite.   Paper section 3.2.

h    = relu(w1 x + b1)
g    = relu(depthwise 3x3 of stride 2 (h) + dw_bias)
gate = sigmoid(se2 relu(se1 mean(g) + se1_bias) + se2_bias)      mean over the map
y    = w3 (g * gate) + b3

x        [B, H, W, C]                      token-major, contiguous
y        [B, ceil(H/2), ceil(W/2), CO]     token-major, contiguous
w.w1     [F, C]                            BN folded
w.dw     [F, 3, 3]                         zero-padded, BN folded; float32
w.se1    [R, F]                            w.se2 [F, R]
w.w3     [CO, F]                           BN folded
w.b1     [F]                               as the other biases float32 in every dtype
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
    """C, CO: channels in and out; F: hidden width; R: width of the squeeze."""

    op: ClassVar[str] = "patch_merge"
    C: int
    F: int
    R: int
    CO: int

    @property
    def channels_in(self) -> int:
        return self.C

    @property
    def channels_out(self) -> int:
        return self.CO


class Weights(NamedTuple):
    w1: Any
    b1: Any
    dw: Any
    dw_bias: Any
    se1: Any
    se1_bias: Any
    se2: Any
    se2_bias: Any
    w3: Any
    b3: Any


parse = Shape.parse


def reference(x: torch.Tensor, w: Weights, s: Shape) -> torch.Tensor:
    """x [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), CO], one floating dtype throughout."""
    h = F.relu(F.linear(x, w.w1, w.b1))  # [B, H, W, F]
    g = F.relu(depthwise(h, w.dw, w.dw_bias, stride=2))  # [B, H', W', F]
    squeezed = F.relu(F.linear(g.mean((1, 2), keepdim=True), w.se1, w.se1_bias))  # [B, 1, 1, R]
    gate = torch.sigmoid(F.linear(squeezed, w.se2, w.se2_bias))  # [B, 1, 1, F]
    return F.linear(g * gate, w.w3, w.b3).contiguous()


def out_hw(H: int, W: int) -> tuple[int, int]:
    return (H + 1) // 2, (W + 1) // 2


def cost(s: Shape, B: int, H: int, W: int, dtype: torch.dtype) -> tuple[int, int]:
    """(FLOPs, fewest bytes moved); a multiply-add counts as two, the rest as none."""
    h, w = out_hw(H, W)
    macs = B * (H * W * s.C * s.F + h * w * s.F * (9 + s.CO) + 2 * s.F * s.R)
    moved = B * (H * W * s.C + h * w * s.CO) * dtype.itemsize
    return 2 * macs, moved + _native.op_bytes(s.line(dtype=dtype))


def patch_merge(x: torch.Tensor, w: Weights, s: Shape) -> torch.Tensor:
    """The op alone: x [B, H, W, C] -> [B, ceil(H/2), ceil(W/2), CO], x's dtype."""
    return run_line(x, w, s)
