"""dw_ffn in Triton: y = x + dw(x), then y + w2 relu(w1 y).

One program computes BT consecutive tokens (rows of the map, images in a row), all C channels, over
its share of the hidden units. x is read once (the nine taps meet in L1), the sum is written once; y
and the hidden activations never leave the SM. Grid (tokens / BT, SPLIT).

Tokens are columns, weights the left operand. So BT may be 16 while w1 fills the 64 rows of a wgmma,
and y stays in shared memory: as the left operand Triton holds it in registers, where C >= 256
spilled.

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
    launcher,
    refusal,
)
from evit_fast.kernels.relu import relu
from evit_fast.ops.dw_ffn import Shape, Weights

PART = 128  # channels convolved at once; 256 would take another 40 registers at its worst moment
HIDDEN_STEP = 128  # packed hidden units are padded to a multiple of it: no mask for any BF
SUM_BLOCK = 512
WIDTHS = (64, 128, 192, 256, 320, 384)  # classes of C
FEW = 2048  # tokens: up to here BT=16 and shares give every SM of an H100 a program


def tiles(BT: int, BF: int, SPLIT: int, num_warps: int, num_stages: int = 2) -> Config:
    return Config({"BT": BT, "BF": BF, "SPLIT": SPLIT}, num_warps, num_stages)


# Key: bytes of a value, class of C, tokens. The second launch of SPLIT > 1 costs 2 us, as much as
# one SM needs for the float16 weights of C=192. BF >= 16 * num_warps gives every warp rows of w1 of
# its own. float32 is FMAs on registers: small tiles. These fit the 99 KiB of sm_86, 89 and 120.
# All rows are calculated (bytes, FLOPs, registers), none is measured yet.
FIT_99_KIB = {
    (2, 64, "few"): tiles(16, 64, 1, 4),
    (2, 128, "few"): tiles(16, 64, 1, 4),
    (2, 192, "few"): tiles(16, 64, 1, 4),
    (2, 256, "few"): tiles(16, 32, 8, 4),
    (2, 320, "few"): tiles(16, 32, 9, 4),
    (2, 384, "few"): tiles(16, 32, 12, 4),
    (2, 64, "many"): tiles(128, 64, 1, 8),
    (2, 128, "many"): tiles(64, 64, 1, 4),
    (2, 192, "many"): tiles(64, 64, 1, 4),
    (2, 256, "many"): tiles(64, 32, 1, 4),
    (2, 320, "many"): tiles(64, 32, 1, 8),
    (2, 384, "many"): tiles(32, 32, 1, 4),
    (4, 64, "few"): tiles(16, 16, 1, 4),
    (4, 128, "few"): tiles(16, 16, 4, 4),
    (4, 192, "few"): tiles(16, 16, 6, 4),
    (4, 256, "few"): tiles(16, 16, 8, 4),
    (4, 320, "few"): tiles(16, 16, 9, 4),
    (4, 384, "few"): tiles(16, 16, 12, 4),
    (4, 64, "many"): tiles(64, 32, 1, 8),
    (4, 128, "many"): tiles(64, 16, 1, 8),
    (4, 192, "many"): tiles(32, 16, 1, 8),
    (4, 256, "many"): tiles(32, 16, 1, 8),
    (4, 320, "many"): tiles(32, 16, 1, 8),
    (4, 384, "many"): tiles(32, 16, 1, 8),
}
# An H100 multiplies faster than L2 delivers weights: BT=128 halves what is read per token, as far
# as registers allow. BF >= 64 is what wgmma and tcgen05 need. No stages where two would not fit.
FIT_227_KIB = FIT_99_KIB | {
    (2, 64, "many"): tiles(128, 64, 1, 4),
    (2, 128, "many"): tiles(128, 128, 1, 8),
    (2, 192, "many"): tiles(128, 64, 1, 8),
    (2, 256, "many"): tiles(128, 64, 1, 8),
    (2, 320, "many"): tiles(128, 32, 1, 8),
    (2, 384, "many"): tiles(64, 64, 1, 8, 1),
}
CONFIGS = Table(
    op="dw_ffn",
    rows={
        80: FIT_99_KIB
        | {(2, 320, "many"): tiles(64, 64, 1, 8), (2, 384, "many"): tiles(64, 64, 1, 8)},
        86: FIT_99_KIB,
        90: FIT_227_KIB,
        100: FIT_227_KIB,
        120: FIT_99_KIB,
    },
)


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
    mask_t = (offs_t < T - first)[None, :]  # not first + offs_t < T: kept from above, it spills
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
    """The weights as they are, but no load of them needs a mask: zeros pad C to CP, the sum of its
    parts (14 % more products at C=224, 7 % at 240, none elsewhere), and F to FP, a multiple of
    HIDDEN_STEP (memory only).
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


def width_class(C: int) -> int:
    return next(width for width in WIDTHS if C <= width)


def shape_class(
    s: Shape, dtype: torch.dtype, B: int, H: int, W: int, deterministic: bool
) -> tuple[int, int, str]:
    """The key of the row. deterministic: the same for every number of images."""
    few = not deterministic and B * H * W <= FEW
    return dtype.itemsize, width_class(s.C), "few" if few else "many"


def CANDIDATES(s: Shape, dtype: torch.dtype) -> list[Config]:
    """What `evit-fast tune` tries: the rows of this width for every architecture and number of
    tokens, and fewer shares.
    """
    keys = [(dtype.itemsize, width_class(s.C), tokens) for tokens in ("few", "many")]
    rows = [table[key] for table in CONFIGS.rows.values() for key in keys]
    few, split = rows[0], rows[0].tiles["SPLIT"]
    rows += [few._replace(tiles={**few.tiles, "SPLIT": n}) for n in (1, split // 2) if n]
    return [row for i, row in enumerate(rows) if row not in rows[:i]]


def supports(s: Shape, dtype: torch.dtype, arch: int) -> str | None:
    """None, or why the op does not run so."""
    if why := refusal(dtype, arch):
        return why
    if s.C > WIDTHS[-1]:
        return f"triton: dw_ffn keeps a token's sums in registers, up to C={WIDTHS[-1]}; C is {s.C}"
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
    """Bytes of partial sums, enough for every row and candidate of this width."""
    split = max(config.tiles["SPLIT"] for config in CANDIDATES(s, dtype))
    if split == 1 or B * H * W > FEW:
        return 0
    return cdiv(split * B * H * W * s.C * 4, 256) * 256


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
    config = config or CONFIGS.row(arch, shape_class(s, dtype, B, H, W, deterministic))
    split = config.tiles["SPLIT"]
    if split > 1 and T > FEW:
        raise ValueError(f"dw_ffn: SPLIT={split} is for at most {FEW} tokens, not {T}; set SPLIT=1")
    out = y if split == 1 else space[: split * T * C * 4].view(torch.float32)
    args = {"out_ptr": out, "x_ptr": x, **{f"{name}_ptr": t for name, t in w._asdict().items()}}
    FP, CP = w.w1.shape
    constexprs = {
        "C": C,
        "F": s.F,
        "CP": CP,
        "FP": FP,
        "PARTS": parts(C),
        "DTYPE": TYPES[dtype],
        "WIDE": INTERPRETED and dtype == torch.bfloat16,
    }
    grid = (cdiv(T, config.tiles["BT"]), split)
    launches = [Launch(dw_ffn_kernel, grid, {**args, "T": T, "H": H, "W": W}, constexprs, config)]
    if split > 1:
        sum_args = {"y_ptr": y, "part_ptr": out, "N": T * C}
        sizes = {"SPLIT": split, "BLOCK": SUM_BLOCK}
        grid = (cdiv(T * C, SUM_BLOCK),)
        launches.append(Launch(dw_ffn_sum_kernel, grid, sum_args, sizes, Config({}, 4)))
    return launches


launch = launcher(plan)
