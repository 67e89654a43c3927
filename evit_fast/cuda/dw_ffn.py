"""dw_ffn in CUDA (csrc/cuda/dw_ffn.cuh): weights as its kernels read them, and its launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from evit_fast.cuda.kernels import KINDS, Kernel, Launch, family, refusal
from evit_fast.fragments import pack_tiles
from evit_fast.ops.dw_ffn import Shape, Weights

MAX_C = 512  # the sums of a block stay in registers
HIDDEN = 64  # hidden units of a step: kDwFfnHidden
FEW = 1024  # tokens: 16 blocks of 64, on cards of 40 to 148 SMs


class Packed(NamedTuple):
    dw: torch.Tensor  # [9, C] float32
    dw_bias: torch.Tensor  # [C] float32
    w1: torch.Tensor  # [FP / 16, C / 16, 256], FP: F up to a multiple of HIDDEN
    b1: torch.Tensor  # [FP] float32
    w2: torch.Tensor  # [C / 16, FP / 16, 256]
    b2: torch.Tensor  # [C] float32


class Config(NamedTuple):
    """tokens of a block, its warps, and programs that share the hidden units."""

    tokens: int
    warps: int
    split: int


def config(s: Shape, dtype: torch.dtype, family: int, tokens: int, deterministic: bool) -> Config:
    """deterministic: the same for every number of images."""
    if tokens <= FEW and not deterministic:
        return Config(16, 4, max(1, min(8, s.F // (2 * HIDDEN))))
    # On sm_70, 64 tokens spill at C=384, and at C=192 with 4 warps; sm_75 has 64 KiB for C=384.
    wide = family == 0 or (family < 80 and s.C > 288)
    rows = 16 if family == 0 and s.C > 352 else 32 if wide else 64
    return Config(rows, 8 if s.C > (144 if family == 70 else 192) else 4, 1)


def supports(s: Shape, dtype: torch.dtype, arch: int) -> str | None:
    """None, or why the op does not run so."""
    if why := refusal(dtype, arch):
        return why
    if s.C > MAX_C:
        return f"cuda: dw_ffn keeps C channels in registers, at most {MAX_C}; C={s.C} is more"
    return None


def prepare(w: Weights, s: Shape, dtype: torch.dtype, family: int) -> Packed:
    """The natural weights in the kernels' layout, on w's device."""
    more = -s.F % HIDDEN  # hidden units of zeros: relu(0) times 0
    return Packed(
        dw=w.dw.reshape(s.C, 9).T.float().contiguous(),
        dw_bias=w.dw_bias.float().contiguous(),
        w1=pack_tiles(F.pad(w.w1.to(dtype), (0, 0, 0, more)), family, "b"),
        b1=F.pad(w.b1.float(), (0, more)),
        w2=pack_tiles(F.pad(w.w2.to(dtype), (0, more)), family, "b"),
        b2=w.b2.float().contiguous(),
    )


def scratch(s: Shape, dtype: torch.dtype, B: int, H: int, W: int) -> int:
    """Bytes of partial sums, a multiple of 256."""
    split = config(s, dtype, 80, B * H * W, False).split
    return 0 if split == 1 else -(-split * B * H * W * s.C * 4 // 256) * 256


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
    """x, y [B, H, W, C] contiguous, float32, float16 or bfloat16; space: scratch() bytes."""
    B, H, W, _ = x.shape
    if x.numel() == 0:
        return []
    dtype = w.w1.dtype
    tiles = family(arch, dtype)
    c = config(s, dtype, tiles, B * H * W, deterministic)
    sizes = (s.C, s.F, *c, KINDS[x.dtype], KINDS[y.dtype])
    out = y if c.split == 1 else space
    ffn = Kernel("dw_ffn", "ffn", sizes, dtype, tiles)
    launches = [Launch(ffn, (out, x, *w, B, H, W), B, H, W)]
    if c.split > 1:
        total = Kernel("dw_ffn", "sum", sizes, dtype, tiles)
        launches.append(Launch(total, (y, out, x.numel()), B, H, W))
    return launches
