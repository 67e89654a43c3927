"""Cascaded group attention: y = x + proj(relu(cat(head_0 .. head_{HEADS-1}))).   Paper section 3.1.

    x, y           [B, H, W, C]        token-major, contiguous
    w.qkv[i]       [2*DK + DV, DV]     rows q, k, v, BN folded
    w.dw[i]        [DK, KS_i, KS_i]    depthwise on q, BN folded, times DK**-0.5 * log2(e); float32
    w.dw_bias[i]   [DK]                times DK**-0.5 * log2(e) too; float32
    w.bias[i]      [S, S]              row = query, column = key, times log2(e); float32
    w.proj         [C, C]              BN folded
    w.qkv_bias[i]  [2*DK + DV]         as w.proj_bias [C] float32 in every dtype

The map is cut into windows of WIN x WIN = S tokens. Head i reads its slice of x plus the output of
head i-1. q's convolution is zero-padded at the window's border. log2(e) is folded in so that
probabilities are 2**(score - max) / sum: exp2 without a multiplication.
A map that WIN does not divide is padded with zero tokens at the bottom and on the right before
anything else. They get k and v from qkv_bias, take part in the softmax unmasked, and are cropped
after the projection: timm's rule (efficientvit_msra.py).
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
    """C: channels; dk: width of q and k; window: its side; ks: q's kernel side, per head."""

    op: ClassVar[str] = "cga"
    C: int
    heads: int
    dk: int
    window: int
    ks: tuple[int, ...]

    @property
    def dv(self) -> int:
        """Width of v per head."""
        return self.C // self.heads

    @property
    def tokens(self) -> int:
        """S: tokens per window."""
        return self.window**2

    @property
    def channels_in(self) -> int:
        return self.C

    @property
    def channels_out(self) -> int:
        return self.C


class Weights(NamedTuple):
    """Per-head fields are tuples of `heads` arrays."""

    qkv: tuple
    qkv_bias: tuple
    dw: tuple
    dw_bias: tuple
    bias: tuple
    proj: Any
    proj_bias: Any


parse = Shape.parse


def reference(x: torch.Tensor, w: Weights, s: Shape) -> torch.Tensor:
    """x [B, H, W, C] -> [B, H, W, C], one floating dtype throughout."""
    B, H, W, C = x.shape
    WIN, DV = s.window, s.dv
    NH, NW = -(-H // WIN), -(-W // WIN)
    t = F.pad(x, (0, 0, 0, NW * WIN - W, 0, NH * WIN - H))
    t = t.view(B, NH, WIN, NW, WIN, C).transpose(2, 3).reshape(B * NH * NW, WIN, WIN, C)
    out = []
    for i in range(s.heads):
        feat = t[..., i * DV : (i + 1) * DV] + (out[-1] if i else 0)  # [NWIN, WIN, WIN, DV]
        q, k, v = F.linear(feat, w.qkv[i], w.qkv_bias[i]).split([s.dk, s.dk, DV], dim=-1)
        q = depthwise(q, w.dw[i], w.dw_bias[i]).flatten(1, 2)  # [NWIN, S, DK]
        score = q @ k.flatten(1, 2).mT + w.bias[i]  # [NWIN, S, S]
        p = torch.exp2(score - score.amax(-1, keepdim=True))
        p = p / p.sum(-1, keepdim=True)
        out.append((p @ v.flatten(1, 2)).view(feat.shape))
    y = F.linear(F.relu(torch.cat(out, dim=-1)), w.proj, w.proj_bias)
    y = y.view(B, NH, NW, WIN, WIN, C).transpose(2, 3).reshape(B, NH * WIN, NW * WIN, C)
    return (x + y[:, :H, :W]).contiguous()


def out_hw(H: int, W: int) -> tuple[int, int]:
    return H, W


def cost(s: Shape, B: int, H: int, W: int, dtype: torch.dtype) -> tuple[int, int]:
    """(FLOPs, fewest bytes moved); a multiply-add counts as two, softmax as none.

    Padded tokens are counted, except in the projection: nothing reads their output.
    """
    windows = B * -(-H // s.window) * -(-W // s.window)
    per_token = sum(
        s.dv * (2 * s.dk + s.dv) + s.dk * ks**2 + s.tokens * (s.dk + s.dv) for ks in s.ks
    )
    macs = windows * s.tokens * per_token + B * H * W * s.C**2
    moved = 2 * B * H * W * s.C * dtype.itemsize
    return 2 * macs, moved + _native.op_bytes(s.line(dtype=dtype))


def cga(x: torch.Tensor, w: Weights, s: Shape) -> torch.Tensor:
    """The op alone: x [B, H, W, C] -> [B, H, W, C], x's dtype."""
    return run_line(x, w, s)
