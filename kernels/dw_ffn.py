"""dw_ffn in Triton: y = x + dw(x), then y + w2 relu(w1 y).

One program computes BT consecutive tokens (rows of the map, images in a row), all C channels, over
its share of the hidden units. x is read once (the nine taps meet in L1), the sum is written once; y
and the hidden activations never leave the SM. Grid (tokens / BT, SPLIT).

With SPLIT > 1 each program of a token block takes 1/SPLIT of the hidden units and writes a float32
partial sum; a second kernel adds them in order. One SM draws weights from L2 at some 64 bytes a
clock, so C=384 alone costs it about 10 us whatever BT is, and one image has 16 tokens there: SPLIT
is what puts more than one SM to work.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl

from evit_fast.kernels.dot import dot
from evit_fast.kernels.launches import (
    INTERPRETED,
    TYPES,
    Config,
    Launch,
    Table,
    cdiv,
    parts,
    refusal,
    run,
)
from evit_fast.ops.dw_ffn import Shape, Weights

MAX_C = 384
FEW = 1024  # tokens: 16 blocks of 64, on cards of 40 to 148 SMs
MAX_SPLIT = 12  # of any row or candidate: scratch() does not know the architecture
HIDDEN_STEP = 128  # packed hidden units are padded to a multiple of it: no mask for any BF


def _tiles(BT: int, BF: int, SPLIT: int, warps: int, stages: int = 2) -> Config:
    return Config({"BT": BT, "BF": BF, "SPLIT": SPLIT}, warps, stages)


# Key: bytes of a value, C rounded up to one of WIDTHS, tokens.
WIDTHS = (64, 128, 192, 256, 384)
CONFIGS = Table(
    {
        80: {
            (2, 64, "few"): _tiles(16, 64, 1, 4),
            (2, 128, "few"): _tiles(16, 64, 2, 4),
            (2, 192, "few"): _tiles(16, 32, 4, 4),
            (2, 256, "few"): _tiles(16, 32, 8, 4),
            (2, 384, "few"): _tiles(16, 32, 12, 4),
            (2, 64, "many"): _tiles(64, 64, 1, 4),
            (2, 128, "many"): _tiles(64, 64, 1, 4),
            (2, 192, "many"): _tiles(64, 32, 1, 4),
            (2, 256, "many"): _tiles(64, 32, 1, 4),
            (2, 384, "many"): _tiles(64, 32, 1, 4),
            (4, 64, "few"): _tiles(16, 16, 1, 4),
            (4, 128, "few"): _tiles(16, 16, 2, 4),
            (4, 192, "few"): _tiles(16, 16, 4, 4),
            (4, 256, "few"): _tiles(16, 16, 8, 4),
            (4, 384, "few"): _tiles(16, 16, 12, 4),
            (4, 64, "many"): _tiles(32, 32, 1, 4),
            (4, 128, "many"): _tiles(32, 32, 1, 4),
            (4, 192, "many"): _tiles(32, 16, 1, 4),
            (4, 256, "many"): _tiles(32, 16, 1, 4),
            (4, 384, "many"): _tiles(16, 16, 1, 4),
        },
    }
)


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def depthwise(x_ptr, dw_ptr, bias_ptr, offs_t, offs_c, H, W, T, C: tl.constexpr, CP: tl.constexpr):
    """The 3x3 convolution, the residual in its centre tap: [BT, len(offs_c)] in float32.

    A tap outside the image adds nothing: its neighbours there are other images' tokens.
    """
    row, column = offs_t // W % H, offs_t % W
    mask_c = offs_c < C  # channels beyond C have no weights: they stay 0
    y = tl.zeros((offs_t.shape[0], offs_c.shape[0]), tl.float32) + tl.load(bias_ptr + offs_c)
    for tap in range(9):
        dh, dw = tap // 3 - 1, tap % 3 - 1
        inside = (row + dh >= 0) & (row + dh < H) & (column + dw >= 0) & (column + dw < W)
        inside = (inside & (offs_t < T))[:, None]
        x = tl.load(
            x_ptr + (offs_t + dh * W + dw).to(tl.int64)[:, None] * C + offs_c,
            mask=inside & mask_c,
            other=0.0,
        )
        w = tl.load(dw_ptr + tap * CP + offs_c)
        y += tl.where(inside, x.to(tl.float32) * w, 0.0)
    return y


@triton.jit(do_not_specialize=["T", "H", "W"])
def dw_ffn_kernel(
    out_ptr,  # [SPLIT, T, C]: the op's output, or partial sums in float32
    x_ptr,  # [T, C]
    dw_ptr,  # [9, CP]
    dw_bias_ptr,  # [CP]
    w1_ptr,  # [FP, CP]
    b1_ptr,  # [FP]
    w2_ptr,  # [FP, CP]
    b2_ptr,  # [CP]
    T,
    H,
    W,
    C: tl.constexpr,
    F: tl.constexpr,
    P0: tl.constexpr,
    P1: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    SPLIT: tl.constexpr,
):
    CP: tl.constexpr = P0 + P1
    FS: tl.constexpr = (F + BF * SPLIT - 1) // (BF * SPLIT) * BF  # hidden units of one share
    split = tl.program_id(1)
    offs_t = tl.program_id(0) * BT + tl.arange(0, BT)
    offs_0 = tl.arange(0, P0)
    acc0 = depthwise(x_ptr, dw_ptr, dw_bias_ptr, offs_t, offs_0, H, W, T, C, CP)
    y0 = acc0.to(DTYPE)  # [BT, P0], for the product; the sum goes on in float32
    acc0 += tl.load(b2_ptr + offs_0)
    if SPLIT > 1:
        acc0 = tl.where(split == 0, acc0, 0.0)
    if P1 > 0:
        offs_1 = P0 + tl.arange(0, P1)
        acc1 = depthwise(x_ptr, dw_ptr, dw_bias_ptr, offs_t, offs_1, H, W, T, C, CP)
        y1 = acc1.to(DTYPE)
        acc1 += tl.load(b2_ptr + offs_1)
        if SPLIT > 1:
            acc1 = tl.where(split == 0, acc1, 0.0)

    for f in range(split * FS, min(F, split * FS + FS), BF):
        offs_f = f + tl.arange(0, BF)
        rows = offs_f[:, None] * CP
        h = tl.zeros((BT, BF), tl.float32) + tl.load(b1_ptr + offs_f)
        h = dot(y0, tl.load(w1_ptr + rows + offs_0).T, h, WIDE)
        if P1 > 0:
            h = dot(y1, tl.load(w1_ptr + rows + offs_1).T, h, WIDE)
        h = relu(h)
        if F % BF != 0:  # padded hidden units: 0 * Inf would be NaN
            h = tl.where(offs_f < F, h, 0.0)
        h = h.to(DTYPE)
        acc0 = dot(h, tl.load(w2_ptr + rows + offs_0), acc0, WIDE)
        if P1 > 0:
            acc1 = dot(h, tl.load(w2_ptr + rows + offs_1), acc1, WIDE)

    out = out_ptr + (split.to(tl.int64) * T + offs_t)[:, None] * C
    mask_t = (offs_t < T)[:, None]
    tl.store(out + offs_0, acc0.to(out_ptr.dtype.element_ty), mask=mask_t & (offs_0 < C))
    if P1 > 0:
        tl.store(out + offs_1, acc1.to(out_ptr.dtype.element_ty), mask=mask_t & (offs_1 < C))


@triton.jit(do_not_specialize=["N"])
def dw_ffn_sum_kernel(y_ptr, part_ptr, N, SPLIT: tl.constexpr, BLOCK: tl.constexpr):
    """y[i] = the sum of part[0 .. SPLIT-1][i], in that order; N values."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < N
    total = tl.zeros((BLOCK,), tl.float32)
    for split in range(SPLIT):
        total += tl.load(part_ptr + split * N + offs, mask=mask, other=0.0)
    tl.store(y_ptr + offs, total.to(y_ptr.dtype.element_ty), mask=mask)


class Packed(NamedTuple):
    """Row f of w1 makes hidden unit f, row f of w2 spends it: a block of hidden units is one stretch
    of memory in both. Zeros pad C to the parts' widths (14 % more products at C=224, 7 % at 240)
    and F to HIDDEN_STEP, so that no weight needs a mask.
    """

    dw: torch.Tensor  # [9, CP] float32
    dw_bias: torch.Tensor  # [CP] float32
    w1: torch.Tensor  # [FP, CP]
    b1: torch.Tensor  # [FP] float32
    w2: torch.Tensor  # [FP, CP]
    b2: torch.Tensor  # [CP] float32


def shape_class(
    s: Shape, dtype: torch.dtype, B: int, H: int, W: int, deterministic: bool
) -> tuple[int, int, str]:
    """The key of the row. deterministic: the same for every number of images."""
    width = next(width for width in WIDTHS if s.C <= width)
    few = not deterministic and B * H * W <= FEW
    return dtype.itemsize, width, "few" if few else "many"


def CANDIDATES(s: Shape, dtype: torch.dtype) -> list[Config]:
    """What `evit-fast tune` tries beside the row."""
    return []


def supports(s: Shape, dtype: torch.dtype, arch: int) -> str | None:
    """None, or why the op does not run so."""
    if why := refusal(dtype, arch):
        return why
    if s.C > MAX_C:
        return f"triton: dw_ffn keeps C channels in registers, at most {MAX_C}; C={s.C} is more"
    return None


def prepare(w: Weights, s: Shape, dtype: torch.dtype) -> Packed:
    """Weights in the kernel's layout, matrices in `dtype`, the rest float32."""
    more_c = sum(parts(s.C)) - s.C
    more_f = -s.F % HIDDEN_STEP
    return Packed(
        dw=F.pad(w.dw.reshape(s.C, 9).T.float(), (0, more_c)).contiguous(),
        dw_bias=F.pad(w.dw_bias.float(), (0, more_c)),
        w1=F.pad(w.w1.to(dtype), (0, more_c, 0, more_f)),
        b1=F.pad(w.b1.float(), (0, more_f)),
        w2=F.pad(w.w2.to(dtype).T, (0, more_c, 0, more_f)).contiguous(),
        b2=F.pad(w.b2.float(), (0, more_c)),
    )


def scratch(s: Shape, dtype: torch.dtype, B: int, H: int, W: int) -> int:
    """Bytes of partial sums: enough for any row and candidate."""
    tokens = B * H * W
    return 0 if tokens > FEW else cdiv(MAX_SPLIT * tokens * s.C * 4, 256) * 256


def plan(
    y: torch.Tensor,
    x: torch.Tensor,
    w: Packed,
    s: Shape,
    space: torch.Tensor | None,
    *,
    arch: int,
    deterministic: bool = False,
    config: Config | None = None,
) -> list[Launch]:
    """x, y [B, H, W, C] of any float dtype, contiguous; space: scratch() bytes."""
    B, H, W, C = x.shape
    T, dtype = B * H * W, w.w1.dtype
    if T == 0:
        return []
    row = config or CONFIGS.row(arch, shape_class(s, dtype, B, H, W, deterministic))
    split = row.tiles["SPLIT"]
    P0, P1 = parts(C)
    out = y if split == 1 else space[: split * T * C * 4].view(torch.float32)
    launches = [
        Launch(
            dw_ffn_kernel,
            (cdiv(T, row.tiles["BT"]), split),
            {"out_ptr": out, "x_ptr": x, **{f"{k}_ptr": v for k, v in w._asdict().items()}}
            | {"T": T, "H": H, "W": W},
            {"C": C, "F": s.F, "P0": P0, "P1": P1, "DTYPE": TYPES[dtype]}
            | {"WIDE": INTERPRETED and dtype == torch.bfloat16},
            row,
        )
    ]
    if split > 1:
        N = T * C
        launches.append(
            Launch(
                dw_ffn_sum_kernel,
                (cdiv(N, 512),),
                {"y_ptr": y, "part_ptr": out, "N": N},
                {"SPLIT": split, "BLOCK": 512},
                Config({}, 4),
            )
        )
    return launches


def launch(
    y: torch.Tensor,
    x: torch.Tensor,
    w: Packed,
    s: Shape,
    space: torch.Tensor | None = None,
    *,
    arch: int,
    deterministic: bool = False,
    config: Config | None = None,
) -> None:
    """Launches `plan` on the current stream."""
    run(plan(y, x, w, s, space, arch=arch, deterministic=deterministic, config=config))
