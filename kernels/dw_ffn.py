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
    refusal,
    run,
)
from evit_fast.ops.dw_ffn import Shape, Weights

MAX_C = 384
PART = 128  # channels, a multiple of which C is padded to where the rest is no power of two
FEW = 1024  # tokens: 16 blocks of 64, on cards of 40 to 148 SMs
MAX_SPLIT = 12  # of any row or candidate: scratch() does not know the architecture
HIDDEN_STEP = 128  # packed hidden units are padded to a multiple of it: no mask for any BF


def _tiles(BT: int, BF: int, SPLIT: int, warps: int, stages: int = 2) -> Config:
    return Config({"BT": BT, "BF": BF, "SPLIT": SPLIT}, warps, stages)


# Key: bytes of a value, C rounded up to one of WIDTHS, tokens.
WIDTHS = (64, 128, 192, 256, 384)
CONFIGS = Table(
    op="dw_ffn",
    rows={
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
    },
)


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def depthwise(
    x_ptr, dw_ptr, bias_ptr, offs_c, first, offs_t, H, W, T, C: tl.constexpr, CP: tl.constexpr
):
    """The 3x3 convolution, the residual in its centre tap: [channels, tokens] in float32.

    A tap outside the image adds nothing: its neighbours there are other images' tokens.
    """
    t = first + offs_t
    row, column = t // W % H, t % W
    mask_c = (offs_c < C)[:, None]  # channels beyond C have no weights: they stay 0
    x_ptr += first.to(tl.int64) * C
    y = tl.zeros((offs_c.shape[0], offs_t.shape[0]), tl.float32)
    y += tl.load(bias_ptr + offs_c)[:, None]
    for tap in range(9):
        dh, dw = tap // 3 - 1, tap % 3 - 1
        inside = (row + dh >= 0) & (row + dh < H) & (column + dw >= 0) & (column + dw < W)
        inside = (inside & (t < T))[None, :]
        x = tl.load(
            x_ptr + (dh * W + dw) * C + offs_t[None, :] * C + offs_c[:, None],
            mask=mask_c & inside,
            other=0.0,
        )
        w = tl.load(dw_ptr + tap * CP + offs_c)[:, None]
        y = tl.where(inside, y + x.to(tl.float32) * w, y)
    return y


@triton.jit(do_not_specialize=["T", "H", "W"])
def dw_ffn_kernel(
    out_ptr,  # [SPLIT, T, C]: the op's output, or partial sums in float32
    x_ptr,  # [T, C]
    dw_ptr,  # [9, CP]
    dw_bias_ptr,  # [CP]
    w1_ptr,  # [FP, CP]
    b1_ptr,  # [FP]
    w2_ptr,  # [CP, FP]
    b2_ptr,  # [CP]
    T,
    H,
    W,
    C: tl.constexpr,
    F: tl.constexpr,
    CP: tl.constexpr,
    FP: tl.constexpr,
    PARTS: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
    BT: tl.constexpr,
    BF: tl.constexpr,
    SPLIT: tl.constexpr,
):
    SHARE: tl.constexpr = (F + BF * SPLIT - 1) // (BF * SPLIT) * BF  # hidden units of a program
    split = 0 if SPLIT == 1 else tl.program_id(1)
    first = tl.program_id(0) * BT
    offs_t = tl.arange(0, BT)
    y = ()  # per part [P, BT]: what w1 multiplies
    acc = ()  # per part [P, BT]: the sums, which begin as the residual y in float32
    for i in tl.static_range(len(PARTS)):
        offs_c = i * PARTS[0] + tl.arange(0, PARTS[i])
        part = depthwise(x_ptr, dw_ptr, dw_bias_ptr, offs_c, first, offs_t, H, W, T, C, CP)
        y += (part.to(DTYPE),)
        part += tl.load(b2_ptr + offs_c)[:, None]
        acc += (part if SPLIT == 1 else tl.where(split == 0, part, 0.0),)

    offs_f = tl.arange(0, BF)
    for f in range(split * SHARE, min(F, split * SHARE + SHARE), BF):
        h = tl.zeros((BF, BT), tl.float32) + tl.load(b1_ptr + f + offs_f)[:, None]
        for i in tl.static_range(len(PARTS)):
            offs_c = i * PARTS[0] + tl.arange(0, PARTS[i])
            w1 = tl.load(w1_ptr + f * CP + offs_f[:, None] * CP + offs_c)  # [BF, P]
            h = dot(w1, y[i], h, WIDE)
        h = relu(h)
        if F % BF != 0:  # padded hidden units: 0 * Inf would be NaN
            h = tl.where((f + offs_f < F)[:, None], h, 0.0)
        h = h.to(DTYPE)
        sums = ()
        for i in tl.static_range(len(PARTS)):
            offs_c = i * PARTS[0] + tl.arange(0, PARTS[i])
            w2 = tl.load(w2_ptr + f + offs_c[:, None] * FP + offs_f)  # [P, BF]
            sums += (dot(w2, h, acc[i], WIDE),)
        acc = sums

    out = out_ptr + split * T * C + first.to(tl.int64) * C + offs_t[None, :] * C
    mask_t = (offs_t < T - first)[None, :]
    for i in tl.static_range(len(PARTS)):
        offs_c = (i * PARTS[0] + tl.arange(0, PARTS[i]))[:, None]
        tl.store(out + offs_c, acc[i].to(out_ptr.dtype.element_ty), mask=mask_t & (offs_c < C))


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
    w2: torch.Tensor  # [CP, FP]
    b2: torch.Tensor  # [CP] float32


def parts(C: int) -> tuple[int, ...]:
    """C in blocks of PART, the last a smaller power of two if that is enough: 288 = 128 + 128 + 32,
    224 = 128 + 96 of 128. A part is what one program convolves at once: 256 would cost registers.
    """
    full, rest = divmod(C, PART)
    return (PART,) * full + ((max(16, triton.next_power_of_2(rest)),) if rest else ())


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
        w2=F.pad(w.w2.to(dtype), (0, more_f, 0, more_c)),
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
    out = y if split == 1 else space[: split * T * C * 4].view(torch.float32)
    launches = [
        Launch(
            dw_ffn_kernel,
            (cdiv(T, row.tiles["BT"]), split),
            {"out_ptr": out, "x_ptr": x, **{f"{k}_ptr": v for k, v in w._asdict().items()}}
            | {"T": T, "H": H, "W": W},
            {"C": C, "F": s.F, "CP": w.w1.shape[1], "FP": w.w1.shape[0], "PARTS": parts(C)}
            | {"DTYPE": TYPES[dtype], "WIDE": INTERPRETED and dtype == torch.bfloat16},
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
