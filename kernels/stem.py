"""Triton stem: four 3x3 stride-2 convolutions, ReLU after the first three.

Meaning and shapes: evit_fast/ops/stem.py. Three launches, C1 = C/8 .. C4 = C:

    stem_pixels_kernel   x -> map 2 [B, H2, W2, C2]. One program = BT positions of map 2, BN of its
        channels. The values of map 1 that a tap of conv2 needs, or a row of three, are computed
        from pixels by one product and go into the next. Map 1, the largest map of the network, is
        computed 2.25 times over and never stored: at 224 pixels and C=192 that is 20 MFLOP more an
        image, against 1.2 MB less to and from memory, and one launch.
    stem_conv_kernel     map 2 -> map 3, map 3 -> y. One program = BT tokens of the whole batch, BN
        channels; an implicit matrix product over K = 9*CIN, k = (tap, channel), so that 24 or 48
        channels fill its blocks as well as 32 do.

Weights lie as [9*CIN, COUT]. Maps 2 and 3 are NHWC in the op's dtype, in scratch.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from evit_fast.kernels.dot import dot
from evit_fast.kernels.launches import INTERPRETED, Config, Launch, Table, cdiv, launcher, refusal
from evit_fast.kernels.relu import relu
from evit_fast.ops.stem import Shape, Weights, out_hw

FEW_TOKENS = 2048  # of the output: 10 images of 224 pixels; more give each SM a "many" program


def _pixels(BT: int, BN: int, TAPS: int, warps: int = 4) -> Config:
    return Config({"BT": BT, "BN": BN, "BK": 64 if TAPS == 3 else 32, "TAPS": TAPS}, warps, 1)


def _conv(BT: int, BN: int, BK: int, warps: int = 4, stages: int = 3) -> Config:
    return Config({"BT": BT, "BN": BN, "BK": BK}, warps, stages)


# Keys: kernel, bytes of a value, C ("wide": above 192), tokens.
# pixels: a row of 3 taps runs 3 steps of long latency in the place of 9, and M0 with 0.7 of the
# instructions; with more channels, map 1's 3*C1 columns leave too few warps on an SM, or spill.
# conv, C=192: BN=32 divides map 3's 96 channels.
_SM80 = {
    ("pixels", 2, 64, "few"): _pixels(32, 16, 3, 2),
    ("pixels", 2, 128, "few"): _pixels(32, 32, 3),
    ("pixels", 2, 192, "few"): _pixels(32, 64, 3),
    ("pixels", 2, "wide", "few"): _pixels(32, 64, 1),
    ("pixels", 2, 64, "many"): _pixels(64, 16, 3),
    ("pixels", 2, 128, "many"): _pixels(128, 32, 1),
    ("pixels", 2, 192, "many"): _pixels(128, 64, 1),
    ("pixels", 2, "wide", "many"): _pixels(32, 64, 1),
    ("pixels", 4, 64, "few"): _pixels(32, 16, 1, 2),
    ("pixels", 4, 128, "few"): _pixels(32, 32, 1),
    ("pixels", 4, 192, "few"): _pixels(32, 64, 1),
    ("pixels", 4, "wide", "few"): _pixels(32, 32, 1),
    ("pixels", 4, 64, "many"): _pixels(64, 16, 1),
    ("pixels", 4, 128, "many"): _pixels(64, 32, 1),
    ("pixels", 4, 192, "many"): _pixels(64, 64, 1),
    ("pixels", 4, "wide", "many"): _pixels(32, 32, 1),
    ("conv", 2, 64, "few"): _conv(16, 16, 64, 2, 4),
    ("conv", 2, 128, "few"): _conv(16, 32, 64, 4, 4),
    ("conv", 2, 192, "few"): _conv(16, 32, 64, 4, 4),
    ("conv", 2, "wide", "few"): _conv(16, 64, 64, 4, 4),
    ("conv", 2, 64, "many"): _conv(128, 32, 64),
    ("conv", 2, 128, "many"): _conv(128, 64, 64),
    ("conv", 2, 192, "many"): _conv(128, 32, 64),
    ("conv", 2, "wide", "many"): _conv(128, 64, 64),
    ("conv", 4, 64, "few"): _conv(16, 16, 32, 2),
    ("conv", 4, 128, "few"): _conv(16, 32, 32),
    ("conv", 4, 192, "few"): _conv(16, 32, 32),
    ("conv", 4, "wide", "few"): _conv(16, 32, 32),
    ("conv", 4, 64, "many"): _conv(64, 32, 32),
    ("conv", 4, 128, "many"): _conv(64, 64, 32),
    ("conv", 4, 192, "many"): _conv(64, 32, 32),
    ("conv", 4, "wide", "many"): _conv(64, 64, 32),
}
# A float32 product of 64 rows becomes one in TF32 (Triton 3.7.1, tcgen05): fewer rows.
_SM100 = _SM80 | {
    ("pixels", 4, 64, "many"): _pixels(32, 16, 1, 2),
    ("pixels", 4, 128, "many"): _pixels(32, 32, 1),
    ("pixels", 4, 192, "many"): _pixels(32, 64, 1),
}
# sm_120 has no tcgen05.
CONFIGS = Table(op="stem", rows={80: _SM80, 100: _SM100, 120: _SM80})


def CANDIDATES(s: Shape, dtype: torch.dtype) -> dict[str, list[Config]]:
    """What `evit-fast tune` tries beside the rows, by kernel."""
    BN = min(64, triton.next_power_of_2(s.C // 4))
    if dtype.itemsize == 4:
        sizes = [(BT, BN) for BT in (16, 32, 64) for BN in (32, 64)]
        return {
            "pixels": [_pixels(BT, BN, 1, warps) for BT in (32, 64) for warps in (4, 8)],
            "conv": [_conv(*size, 32, 4, stages) for size in sizes for stages in (2, 4)],
        }
    sizes = [(16, 32), (32, 32), (64, 32), (64, 64), (128, 64), (128, 128)]
    return {
        "pixels": [_pixels(BT, BN, 1, warps) for BT in (64, 128) for warps in (4, 8)]
        + [_pixels(BT, BN, 3, warps) for BT in (16, 32, 64, 128) for warps in (4, 8)],
        "conv": [_conv(*size, 64, 4, stages) for size in sizes for stages in (2, 3, 5)],
    }


@triton.jit
def pixels(
    x_ptr, pad_ptr, row, col, k, H, W, stride_c, stride_h, stride_w,
    IN: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """Pixels k = (row, column, channel) of patches 3 x COLS with top left corner (row, col).

    [BT, BK] float32. Loaded as [BK, BT]: neighbours in the map are neighbours in a warp.
    """
    ky, kx, ci = k // (COLS * IN), k // IN % COLS, k % IN
    rows, cols = row[None, :] + ky[:, None], col[None, :] + kx[:, None]  # [BK, BT]
    wanted = k < 3 * COLS * IN
    inside = (rows >= 0) & (rows < H) & (cols >= 0) & (cols < W) & wanted[:, None]
    offs_t = row * stride_h + col * stride_w
    offs_k = ky * stride_h + kx * stride_w + ci * stride_c
    x = tl.load(x_ptr + (offs_t[None, :] + offs_k[:, None]), mask=inside, other=0)
    x = x.to(tl.float32)
    if x_ptr.dtype.element_ty == tl.uint8:
        pad = tl.load(pad_ptr + ci, mask=wanted, other=0.0)
        x = tl.where(inside, x, pad[:, None])
    return tl.trans(x)


@triton.jit(do_not_specialize=["H", "W", "stride_b", "stride_c", "stride_h", "stride_w"])
def stem_pixels_kernel(
    y_ptr, x_ptr, w1_ptr, bias1_ptr, pad_ptr, w2_ptr, bias2_ptr,
    H, W, stride_b, stride_c, stride_h, stride_w,
    IN: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, WIDE: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, TAPS: tl.constexpr, TC: tl.constexpr,
):  # fmt: skip
    """relu(conv2(relu(conv1(x)))): x [B, IN, H, W] -> y [B, H2, W2, C2].

    TAPS of conv2 at a time, 1 or a row of 3: their TAPS*C1 inputs, at most TC, come from patches of
    3 x COLS pixels. Grid (B * blocks of BT positions, blocks of BN channels).
    With 3, taps meet their neighbours' pixels with weight 0. NaN spreads as it should; an infinite
    pixel makes its positions of map 2 NaN, even those few that conv2 would leave at infinity or 0.
    """
    COLS: tl.constexpr = 2 * TAPS + 1
    dtype = w1_ptr.dtype.element_ty
    H1, W1 = (H + 1) // 2, (W + 1) // 2
    H2, W2 = (H1 + 1) // 2, (W1 + 1) // 2
    blocks = tl.cdiv(H2 * W2, BT)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    offs_t = (tl.program_id(0) % blocks) * BT + tl.arange(0, BT)
    mask_t = offs_t < H2 * W2
    offs_n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask_n = offs_n < C2
    offs_c = tl.arange(0, TC)  # (tap, channel of map 1)
    mask_c = offs_c < TAPS * C1
    dx, c1 = offs_c // C1, offs_c % C1
    x_ptr += b * stride_b
    bias1 = tl.load(bias1_ptr + c1, mask=mask_c, other=0.0)
    acc = tl.zeros([BT, BN], tl.float32)
    for tap in range(0, 9, TAPS):
        row = 2 * (offs_t // W2) + tap // 3 - 1  # in map 1, of the first tap
        col = 2 * (offs_t % W2) + tap % 3 - 1
        h = tl.zeros([BT, TC], tl.float32)
        for k0 in range(0, 3 * COLS * IN, BK):
            k = k0 + tl.arange(0, BK)
            x = pixels(
                x_ptr, pad_ptr, 2 * row - 1, 2 * col - 1, k, H, W, stride_c, stride_h, stride_w,
                IN, COLS,
            )  # fmt: skip
            kx = (k // IN % COLS)[:, None] - 2 * dx[None, :]  # column of conv1 that meets the pixel
            k1 = (k // (COLS * IN) * 3 * IN + k % IN)[:, None] + kx * IN
            mask_w1 = (kx >= 0) & (kx < 3) & (k < 3 * COLS * IN)[:, None] & mask_c[None, :]
            w1 = tl.load(w1_ptr + k1 * C1 + c1[None, :], mask=mask_w1, other=0.0)
            h = dot(x.to(dtype), w1, h, WIDE)
        cols = col[:, None] + dx[None, :]
        inside = (mask_t & (row >= 0) & (row < H1))[:, None] & (cols >= 0) & (cols < W1)
        # Columns past TAPS*C1 too: Inf * 0 has made them NaN.
        h = tl.where(inside & mask_c[None, :], relu(h + bias1[None, :]), 0.0)  # [BT, TC]
        offs_w2 = (tap * C1 + offs_c)[:, None] * C2 + offs_n[None, :]
        w2 = tl.load(w2_ptr + offs_w2, mask=mask_c[:, None] & mask_n[None, :], other=0.0)
        acc = dot(h.to(dtype), w2, acc, WIDE)
    acc = relu(acc + tl.load(bias2_ptr + offs_n, mask=mask_n, other=0.0)[None, :])
    y_ptr += b * (H2 * W2) * C2
    mask = mask_t[:, None] & mask_n[None, :]
    tl.store(y_ptr + offs_t[:, None] * C2 + offs_n[None, :], acc.to(dtype), mask=mask)


@triton.jit(do_not_specialize=["B", "H", "W"])
def stem_conv_kernel(
    y_ptr, x_ptr, w_ptr, bias_ptr, B, H, W,
    CIN: tl.constexpr, COUT: tl.constexpr, RELU: tl.constexpr, WIDE: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """conv, then ReLU if RELU: x [B, H, W, CIN] -> y [B, (H+1)//2, (W+1)//2, COUT].

    Grid (blocks of BT tokens of the batch, blocks of BN channels).
    """
    HO, WO = (H + 1) // 2, (W + 1) // 2
    first = tl.program_id(0).to(tl.int64) * BT  # token
    b0 = first // (HO * WO)
    # Tokens are counted from the start of image b0, so that 32 bits are enough.
    offs_t = (first - b0 * (HO * WO)).to(tl.int32) + tl.arange(0, BT)
    mask_t = offs_t < (B - b0) * (HO * WO)
    b, t = offs_t // (HO * WO), offs_t % (HO * WO)
    row, col = 2 * (t // WO) - 1, 2 * (t % WO) - 1
    x_ptr += b0 * (H * W) * CIN
    y_ptr += b0 * (HO * WO) * COUT
    offs_x = ((b * H + row) * W + col) * CIN
    offs_n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask_n = offs_n < COUT
    acc = tl.zeros([BT, BN], tl.float32)
    for k0 in range(0, 9 * CIN, BK):
        k = k0 + tl.arange(0, BK)
        tap = k // CIN
        rows = row[:, None] + (tap // 3)[None, :]  # [BT, BK]
        cols = col[:, None] + (tap % 3)[None, :]
        inside = (rows >= 0) & (rows < H) & (cols >= 0) & (cols < W)
        mask = inside & mask_t[:, None] & (k < 9 * CIN)[None, :]
        offs_k = ((tap // 3) * W + tap % 3) * CIN + k % CIN
        x = tl.load(x_ptr + (offs_x[:, None] + offs_k[None, :]), mask=mask, other=0.0)
        mask_w = (k < 9 * CIN)[:, None] & mask_n[None, :]
        w = tl.load(w_ptr + k[:, None] * COUT + offs_n[None, :], mask=mask_w, other=0.0)
        acc = dot(x, w, acc, WIDE)
    acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if RELU:
        acc = relu(acc)
    mask = mask_t[:, None] & mask_n[None, :]
    y_ptrs = y_ptr + (offs_t[:, None] * COUT + offs_n[None, :])
    tl.store(y_ptrs, acc.to(y_ptr.dtype.element_ty), mask=mask)


class Packed(NamedTuple):
    """Convolutions [9*CIN, COUT], row (ky, kx, channel), in the op's dtype; the rest float32."""

    conv1: torch.Tensor
    bias1: torch.Tensor
    conv1_u8: torch.Tensor
    bias1_u8: torch.Tensor
    pad_u8: torch.Tensor
    conv2: torch.Tensor
    bias2: torch.Tensor
    conv3: torch.Tensor
    bias3: torch.Tensor
    conv4: torch.Tensor
    bias4: torch.Tensor


def supports(s: Shape, dtype: torch.dtype, arch: int) -> str | None:
    """None: every stem runs, in every dtype that the kernels have; else why not."""
    return refusal(dtype, arch)


def prepare(w: Weights, s: Shape, dtype: torch.dtype) -> Packed:
    """The op's weights as the kernels read them, on their device."""

    def rows(name: str, value: torch.Tensor) -> torch.Tensor:
        if not name.startswith("conv"):
            return value.float().contiguous()
        return value.to(dtype).permute(2, 3, 1, 0).reshape(-1, value.shape[0]).contiguous()

    return Packed(**{name: rows(name, value) for name, value in w._asdict().items()})


def maps(s: Shape, H: int, W: int) -> list[tuple[int, int, int]]:
    """(H, W, C) of what each of the four convolutions gives for an image of H x W pixels."""
    found = []
    for C in s.widths[1:]:
        H, W = (H + 1) // 2, (W + 1) // 2
        found.append((H, W, C))
    return found


def _map_bytes(dtype: torch.dtype, B: int, H: int, W: int, C: int) -> int:
    return cdiv(B * H * W * C * dtype.itemsize, 256) * 256


def scratch(s: Shape, dtype: torch.dtype, B: int, H: int, W: int) -> int:
    """Bytes: maps 2 and 3."""
    return sum(_map_bytes(dtype, B, *of) for of in maps(s, H, W)[1:3])


def shape_class(
    s: Shape, dtype: torch.dtype, B: int, H: int, W: int, deterministic: bool
) -> tuple[int, int | str, str]:
    """Key of CONFIGS without the kernel's name."""
    h, w = out_hw(H, W)
    few = not deterministic and B * h * w <= FEW_TOKENS
    return dtype.itemsize, s.C if s.C <= 192 else "wide", "few" if few else "many"


def plan(
    y: torch.Tensor,
    x: torch.Tensor,
    w: Packed,
    s: Shape,
    space: torch.Tensor | None,
    *,
    arch: int,
    deterministic: bool = False,
    config: Mapping[str, Config] | None = None,
) -> list[Launch]:
    """The three launches. x [B, IN, H, W] float or uint8, any strides; y [B, H', W', C] float.

    config: rows by kernel ("pixels", "conv"), in the place of the table's.
    NotImplementedError: one image's pixels lie too far apart for 32-bit offsets.
    """
    B, IN, H, W = x.shape
    if B == 0:
        return []
    (H1, W1, C1), (H2, W2, C2), (H3, W3, C3), (H4, W4, C4) = maps(s, H, W)
    reach = sum((n - 1) * stride for n, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    if max(reach, H1 * W1 * C1) >= 2**31:
        raise NotImplementedError(
            f"stem: x {list(x.shape)} with strides {list(x.stride())} needs offsets of 2^31 and "
            "more inside one image; use smaller images or a contiguous x"
        )
    dtype, config = w.conv2.dtype, config or {}
    key = shape_class(s, dtype, B, H, W, deterministic)
    row = {k: config.get(k) or CONFIGS.row(arch, (k, *key)) for k in ("pixels", "conv")}
    end = _map_bytes(dtype, B, H2, W2, C2)
    map2 = space[:end].view(dtype)
    map3 = space[end : end + _map_bytes(dtype, B, H3, W3, C3)].view(dtype)
    is_u8 = x.dtype == torch.uint8
    conv1, bias1 = (w.conv1_u8, w.bias1_u8) if is_u8 else (w.conv1, w.bias1)
    names = ("stride_b", "stride_c", "stride_h", "stride_w")
    wide = {"WIDE": INTERPRETED and dtype == torch.bfloat16}
    tiles = row["pixels"].tiles
    TC = max(16, triton.next_power_of_2(tiles["TAPS"] * C1))
    pixels = Launch(
        stem_pixels_kernel,
        (B * cdiv(H2 * W2, tiles["BT"]), cdiv(C2, tiles["BN"])),
        {"y_ptr": map2, "x_ptr": x, "w1_ptr": conv1, "bias1_ptr": bias1, "pad_ptr": w.pad_u8}
        | {"w2_ptr": w.conv2, "bias2_ptr": w.bias2, "H": H, "W": W}
        | dict(zip(names, x.stride(), strict=True)),
        {"IN": IN, "C1": C1, "C2": C2, "TC": TC} | wide,
        row["pixels"],
    )
    tiles = row["conv"].tiles
    third = Launch(
        stem_conv_kernel,
        (cdiv(B * H3 * W3, tiles["BT"]), cdiv(C3, tiles["BN"])),
        {"y_ptr": map3, "x_ptr": map2, "w_ptr": w.conv3, "bias_ptr": w.bias3}
        | {"B": B, "H": H2, "W": W2},
        {"CIN": C2, "COUT": C3, "RELU": True} | wide,
        row["conv"],
    )
    fourth = Launch(
        stem_conv_kernel,
        (cdiv(B * H4 * W4, tiles["BT"]), cdiv(C4, tiles["BN"])),
        {"y_ptr": y, "x_ptr": map3, "w_ptr": w.conv4, "bias_ptr": w.bias4}
        | {"B": B, "H": H3, "W": W3},
        {"CIN": C3, "COUT": C4, "RELU": False} | wide,
        row["conv"],
    )
    return [pixels, third, fourth]


launch = launcher(plan)
