"""Triton classifier: average pool, then one linear layer.

Meaning and shapes: evit_fast/ops/classifier.py. One program = BM images x BN classes: it sums the
tokens of its images in float32, BK channels at a time, and multiplies the means by w; pooled
features never leave the SM. Grid (blocks of BM images, blocks of BN classes).

Every block of classes pools again. At 16 tokens, C=384, N=1000 that is 12 KiB of x an image and
block, from L2: for one image 63 blocks read less than the 768 KiB of w; for 2048 images BN=256
makes it 100 MB, some 20 us of a forward that takes 20 ms.

With N=0 classifier_pool_kernel writes the means: one program = BM images x BK channels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from evit_fast.kernels.dot import dot
from evit_fast.kernels.launches import INTERPRETED, Config, Launch, Table, cdiv, launcher, refusal
from evit_fast.ops.classifier import Shape, Weights

FEW_IMAGES = 64  # up to here 16 rows and few classes a program; more fill the card with wide tiles


def _tiles(BM: int, BN: int, BK: int, warps: int, stages: int = 1) -> Config:
    return Config({"BM": BM, "BN": BN, "BK": BK}, warps, stages)


def _pool(BM: int, BK: int, warps: int) -> Config:
    return Config({"BM": BM, "BK": BK}, warps, 1)


# Keys: kernel, bytes of a value, images.
# few: BK takes all channels of M0 .. M5 in one or two rounds: the loads of 8 tokens and of w are
# all under way before the first is needed.
CONFIGS = Table(
    op="classifier",
    rows={
        80: {
            ("linear", 2, "few"): _tiles(16, 16, 256, 8),
            ("linear", 2, "many"): _tiles(32, 256, 32, 8, 3),
            ("linear", 4, "few"): _tiles(16, 16, 64, 4),
            ("linear", 4, "many"): _tiles(32, 64, 32, 8),
            ("pool", 2, "few"): _pool(1, 128, 1),
            ("pool", 2, "many"): _pool(8, 128, 4),
            ("pool", 4, "few"): _pool(1, 128, 1),
            ("pool", 4, "many"): _pool(8, 128, 4),
        }
    },
)


def CANDIDATES(s: Shape, dtype: torch.dtype) -> dict[str, list[Config]]:
    """What `evit-fast tune` tries beside the rows, by kernel."""
    few = [_tiles(16, BN, BK, 4) for BN in (16, 32) for BK in (64, 128, 256)]
    many = [_tiles(BM, BN, 32, 8) for BM in (32, 64) for BN in (128, 256)]
    if dtype.itemsize == 4:
        few = [_tiles(16, 16, BK, 4) for BK in (32, 64, 128)]
        many = [_tiles(32, BN, 32, warps) for BN in (32, 64, 128) for warps in (4, 8)]
    pool = [_pool(BM, BK, 4) for BM in (4, 8) for BK in (64, 128)]
    return {"linear": few + many, "pool": pool}


@triton.jit
def mean(x_ptr, offs_b, mask, k, T, C: tl.constexpr):
    """Mean over the T tokens of images offs_b [BM] in channels k [BK]: [BM, BK] float32.

    Tokens are added one by one, in their order.
    """
    x_ptrs = x_ptr + (offs_b.to(tl.int64) * T * C)[:, None] + k[None, :]
    total = tl.zeros(mask.shape, tl.float32)
    for t in range(0, T, 8):
        for i in tl.static_range(8):  # eight loads under way
            x = tl.load(x_ptrs + (t + i) * C, mask=mask & (t + i < T), other=0.0)
            total += x.to(tl.float32)
    return total / T


@triton.jit(do_not_specialize=["B", "T"])
def classifier_linear_kernel(
    y_ptr, x_ptr, w_ptr, bias_ptr, B, T,
    C: tl.constexpr, N: tl.constexpr, WIDE: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """x [B, T, C], w [N, C] -> y [B, N]."""
    offs_b = tl.program_id(0) * BM + tl.arange(0, BM)
    offs_n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask_b, mask_n = offs_b < B, offs_n < N
    acc = tl.zeros([BM, BN], tl.float32)
    for k0 in range(0, C, BK):
        k = k0 + tl.arange(0, BK)
        mask_w = mask_n[:, None] & (k < C)[None, :]
        w = tl.load(w_ptr + offs_n[:, None] * C + k[None, :], mask=mask_w, other=0.0)  # [BN, BK]
        pooled = mean(x_ptr, offs_b, mask_b[:, None] & (k < C)[None, :], k, T, C)
        acc = dot(pooled.to(w.dtype), tl.trans(w), acc, WIDE)
    acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    y_ptrs = y_ptr + offs_b.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask_b[:, None] & mask_n[None, :])


@triton.jit(do_not_specialize=["B", "T"])
def classifier_pool_kernel(
    y_ptr, x_ptr, B, T, C: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr
):  # fmt: skip
    """x [B, T, C] -> y [B, C]."""
    offs_b = tl.program_id(0) * BM + tl.arange(0, BM)
    k = tl.program_id(1) * BK + tl.arange(0, BK)
    mask = (offs_b < B)[:, None] & (k < C)[None, :]
    pooled = mean(x_ptr, offs_b, mask, k, T, C)
    y_ptrs = y_ptr + offs_b.to(tl.int64)[:, None] * C + k[None, :]
    tl.store(y_ptrs, pooled.to(y_ptr.dtype.element_ty), mask=mask)


class Packed(NamedTuple):
    """w [N, C] in the op's dtype, bias [N] float32. With N=0 both are empty; the dtype stays."""

    w: torch.Tensor
    bias: torch.Tensor


def supports(s: Shape, dtype: torch.dtype, arch: int) -> str | None:
    """None: every classifier runs, in every dtype that the kernels have; else why not."""
    return refusal(dtype, arch)


def prepare(w: Weights, s: Shape, dtype: torch.dtype) -> Packed:
    """The op's weights as the kernels read them, on their device. N=0 has none to say which."""
    if not s.N:
        return Packed(torch.empty(0, s.C, dtype=dtype), torch.empty(0))
    return Packed(w.w.to(dtype).contiguous(), w.bias.float().contiguous())


def scratch(s: Shape, dtype: torch.dtype, B: int, H: int, W: int) -> int:
    """Bytes: none."""
    return 0


def shape_class(
    s: Shape, dtype: torch.dtype, B: int, H: int, W: int, deterministic: bool
) -> tuple[str, int, str]:
    """Key of CONFIGS."""
    few = not deterministic and B <= FEW_IMAGES
    return "linear" if s.N else "pool", dtype.itemsize, "few" if few else "many"


def plan(
    y: torch.Tensor,
    x: torch.Tensor,
    w: Packed,
    s: Shape,
    space: torch.Tensor | None = None,
    *,
    arch: int,
    deterministic: bool = False,
    config: Config | None = None,
) -> list[Launch]:
    """One launch. x [B, H, W, C], contiguous; y [B, N], with N=0 [B, C]; any float dtypes."""
    B, H, W, _ = x.shape
    if B == 0:
        return []
    dtype = w.w.dtype
    row = config or CONFIGS.row(arch, shape_class(s, dtype, B, H, W, deterministic))
    tiles = row.tiles
    if not s.N:
        return [
            Launch(
                classifier_pool_kernel,
                (cdiv(B, tiles["BM"]), cdiv(s.C, tiles["BK"])),
                {"y_ptr": y, "x_ptr": x, "B": B, "T": H * W},
                {"C": s.C},
                row,
            )
        ]
    return [
        Launch(
            classifier_linear_kernel,
            (cdiv(B, tiles["BM"]), cdiv(s.N, tiles["BN"])),
            {"y_ptr": y, "x_ptr": x, "w_ptr": w.w, "bias_ptr": w.bias, "B": B, "T": H * W},
            {"C": s.C, "N": s.N, "WIDE": INTERPRETED and dtype == torch.bfloat16},
            row,
        )
    ]


launch = launcher(plan)
