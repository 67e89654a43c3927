"""classifier in CUDA (csrc/cuda/classifier.cuh): weights as its kernels read them; its launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from evit_fast.cuda.kernels import KINDS, Kernel, Launch, family, refusal
from evit_fast.fragments import TILE, pack_tiles
from evit_fast.ops.classifier import Shape, Weights

FEW_IMAGES = 64  # up to here one launch; more are pooled once, by a launch of their own


class Packed(NamedTuple):
    """With N = 0 both are empty; the dtype stays."""

    w: torch.Tensor  # [N up to 16 / 16, C / 16, 256]
    bias: torch.Tensor  # [N up to 16] float32


class Config(NamedTuple):
    """Whether a block pools; its images, warps and tiles of 16 classes; channels at a time."""

    fused: int
    rows: int
    warps: int
    tiles: int
    chunk: int


def config(s: Shape, family: int, B: int, deterministic: bool) -> Config:
    """deterministic: the same for every number of images.

    few: a tile of classes a warp, 16 blocks at N=1000. many: 64 images read a weight once; half
    the channels of M4 and M5 at a time, 26 KiB, so that three blocks fit on an SM of sm_70. float32
    numbers take twice the room: 32 images.
    """
    if B <= FEW_IMAGES and not deterministic:
        return Config(1, 16, 4, 4, _chunk(s.C, 384))
    return Config(0, 64 if family else 32, 4, 8, _chunk(s.C, 192))


def _chunk(C: int, most: int) -> int:
    """The largest multiple of 16 up to `most` that divides C."""
    return max(k for k in range(TILE, most + 1, TILE) if C % k == 0)


def supports(s: Shape, dtype: torch.dtype, arch: int) -> str | None:
    """None: every classifier runs, in every dtype that the kernels have; else why not."""
    return refusal(dtype, arch)


def prepare(w: Weights, s: Shape, dtype: torch.dtype, family: int) -> Packed:
    """The natural weights in the kernels' layout, on w's device. N=0 has none to say which."""
    if not s.N:
        return Packed(torch.empty(0, dtype=dtype), torch.empty(0))
    more = -s.N % TILE
    return Packed(
        w=pack_tiles(F.pad(w.w.to(dtype), (0, 0, 0, more)), family, "b"),
        bias=F.pad(w.bias.float(), (0, more)),
    )


def scratch(s: Shape, dtype: torch.dtype, B: int, H: int, W: int) -> int:
    """Bytes of the means, a multiple of 256: a deterministic forward pools apart at every B."""
    return -(-B * s.C * dtype.itemsize // 256) * 256 if s.N else 0


def plan(
    y: torch.Tensor,
    x: torch.Tensor,
    w: Packed,
    s: Shape,
    space: torch.Tensor | None,
    *,
    arch: int,
    deterministic: bool = False,
) -> list[Launch]:
    """x [B, H, W, C], y [B, N] ([B, C] where N = 0), contiguous, float32, float16 or bfloat16;
    space: scratch() bytes.
    """
    B, H, W, _ = x.shape
    if x.numel() == 0:
        return []
    dtype = w.w.dtype
    tiles = family(arch, dtype)
    c = config(s, tiles, B, deterministic)
    x_kind, y_kind, kind = KINDS[x.dtype], KINDS[y.dtype], KINDS[dtype]
    # A kernel's sizes hold no config but its own, so that each is compiled once.
    nothing = Config(0, TILE, 1, 1, TILE)

    def pool(to: torch.Tensor, to_kind: int) -> Launch:
        sizes = (s.C, 0, *nothing, x_kind, to_kind)
        return Launch(Kernel("classifier", "pool", sizes, dtype, tiles), (to, x, B, H * W), B, H, W)

    if not s.N:
        return [pool(y, y_kind)]
    sizes = (s.C, s.N, *c, x_kind if c.fused else kind, y_kind)
    words = (y, x if c.fused else space, w.w, w.bias, B, H * W)
    linear = Launch(Kernel("classifier", "linear", sizes, dtype, tiles), words, B, H, W)
    return [linear] if c.fused else [pool(space, kind), linear]
