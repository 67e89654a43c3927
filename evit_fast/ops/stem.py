"""Patch embedding: four 3x3 stride-2 convolutions with ReLU between them.   Paper section 3.2.

    x          [B, IN, H, W]       float: already normalised; uint8: pixels 0..255. Any strides
    y          [B, H', W', C]      token-major; each convolution halves a side, rounding up
    w.conv1    [C/8, IN, 3, 3]     BN folded, for float input; zero outside the image
    w.conv1_u8 [C/8, IN, 3, 3]     conv1 / (255 * std), for pixels
    w.bias1_u8 [C/8]               bias1 - sum(conv1 * mean / std)
    w.pad_u8   [IN]                255 * mean: the pixel that normalises to zero
    w.conv2    [C/4, C/8, 3, 3]    BN folded, as conv3 [C/2, C/4, 3, 3] and conv4 [C, C/2, 3, 3]
    w.bias1 .. w.bias4             [C/8], [C/4], [C/2], [C], float32

Outside the image pixels have the value pad_u8, so that a tap there adds exactly what it adds for
float input: nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from evit_fast import _native
from evit_fast.ops.line import LineShape, run_line


@dataclass(frozen=True)
class Shape(LineShape):
    """in_: image channels; C: channels of the tokens."""

    op: ClassVar[str] = "stem"
    in_: int
    C: int

    @property
    def channels_in(self) -> int:
        return self.in_

    @property
    def channels_out(self) -> int:
        return self.C

    @property
    def widths(self) -> tuple[int, int, int, int, int]:
        """Channels before conv1 and after each of the four."""
        return self.in_, self.C // 8, self.C // 4, self.C // 2, self.C


class Weights(NamedTuple):
    conv1: Any
    bias1: Any
    conv1_u8: Any
    bias1_u8: Any
    pad_u8: Any
    conv2: Any
    bias2: Any
    conv3: Any
    bias3: Any
    conv4: Any
    bias4: Any


parse = Shape.parse


def reference(x: torch.Tensor, w: Weights, s: Shape) -> torch.Tensor:
    """x [B, IN, H, W] of w's dtype, or uint8 -> [B, H', W', C] of w's dtype."""
    B, IN, H, W = x.shape
    if x.dtype == torch.uint8:
        pixels = w.pad_u8[:, None, None].expand(B, IN, H + 2, W + 2).clone()
        pixels[:, :, 1:-1, 1:-1] = x
        y = F.conv2d(pixels, w.conv1_u8, w.bias1_u8, stride=2)
    else:
        y = F.conv2d(x, w.conv1, w.bias1, stride=2, padding=1)
    y = F.conv2d(F.relu(y), w.conv2, w.bias2, stride=2, padding=1)
    y = F.conv2d(F.relu(y), w.conv3, w.bias3, stride=2, padding=1)
    y = F.conv2d(F.relu(y), w.conv4, w.bias4, stride=2, padding=1)
    return y.permute(0, 2, 3, 1).contiguous()


def out_hw(H: int, W: int) -> tuple[int, int]:
    """Rows and columns of tokens for an image of H x W pixels."""
    for _ in range(4):
        H, W = (H + 1) // 2, (W + 1) // 2
    return H, W


def cost(s: Shape, B: int, H: int, W: int, dtype: torch.dtype) -> tuple[int, int]:
    """(FLOPs, fewest bytes moved); a multiply-add counts as two, ReLU as none."""
    macs, h, w = 0, H, W
    for cin, cout in zip(s.widths, s.widths[1:], strict=False):
        h, w = (h + 1) // 2, (w + 1) // 2
        macs += B * h * w * cout * cin * 9
    moved = B * (s.in_ * H * W + s.C * h * w) * dtype.itemsize
    return 2 * macs, moved + _native.op_bytes(s.line(dtype=dtype))


def stem(x: torch.Tensor, w: Weights, s: Shape) -> torch.Tensor:
    """The op alone: x [B, IN, H, W] float or uint8 -> [B, H', W', C] in x's dtype or float32."""
    return run_line(x, w, s)
