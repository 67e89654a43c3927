"""Head: average pool, then one linear layer.   Paper section 3.2; distillation: arXiv 2012.12877.

    x         [B, H, W, C]    token-major, contiguous
    y         [B, N]          logits; with N = 0 the pooled features, [B, C]
    w.w       [N, C]          BN1d folded; two distilled heads averaged
    w.bias    [N]             float32
With N = 0 both weights are None.
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
    """C: channels; N: classes, 0 for pooling only."""

    op: ClassVar[str] = "classifier"
    C: int
    N: int

    @property
    def channels_in(self) -> int:
        return self.C

    @property
    def channels_out(self) -> int:
        return self.N or self.C


class Weights(NamedTuple):
    w: Any = None
    bias: Any = None


parse = Shape.parse


def reference(x: torch.Tensor, w: Weights, s: Shape) -> torch.Tensor:
    """x [B, H, W, C] -> [B, N], or [B, C] when N = 0; one floating dtype throughout."""
    pooled = x.mean((1, 2))  # [B, C]
    return F.linear(pooled, w.w, w.bias) if s.N else pooled


def out_hw(H: int, W: int) -> tuple[()]:
    """No rows and columns are left."""
    return ()


def cost(s: Shape, B: int, H: int, W: int, dtype: torch.dtype) -> tuple[int, int]:
    """(FLOPs, fewest bytes moved); a multiply-add counts as two, pooling as none."""
    moved = B * (H * W * s.C + s.channels_out) * dtype.itemsize
    return 2 * B * s.C * s.N, moved + _native.op_bytes(s.line(dtype=dtype))


def classifier(x: torch.Tensor, w: Weights, s: Shape) -> torch.Tensor:
    """The op alone: x [B, H, W, C] -> [B, N] (N = 0: [B, C]), x's dtype."""
    return run_line(x, w, s)
