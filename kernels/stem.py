"""Triton stem: four 3x3 stride-2 convolutions, ReLU after the first three.

Meaning and shapes: evit_fast/ops/stem.py. Three launches, C1 = C/8 .. C4 = C:

    stem_pixels_kernel   x -> map 2 [B, H2, W2, C2]. One program = BT positions of map 2, BN of its
        channels. For each tap of conv2 the values of map 1 that it needs are computed from pixels,
        one product [BT, 9*IN] x [9*IN, C1]. Map 1, the largest map of the network, is computed
        2.25 times over and never stored: at 224 pixels and C=192 that is 57 MFLOP more an image,
        against 1.2 MB less to and from memory.
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
from evit_fast.kernels.launches import INTERPRETED, Config, Launch, Table, cdiv, refusal, run
from evit_fast.ops import stem as meaning
from evit_fast.ops.stem import Shape, Weights

FEW_TOKENS = (
    2048  # of the output; 10 images of 224 pixels. Beyond, "many" has a program for each SM
)

# Keys: (kernel, bytes of a value, C or "wide" above 192, images "few" or "many").
# pixels: BT positions, BK of the 9*IN taps at a time. "wide": C2 is cut into blocks of BN.
# conv: BT tokens, BN channels, BK of K. 192: BN=32 divides map 3's 96 channels.
CONFIGS = Table(
    {
        80: {
            ("pixels", 2, 64, "few"): Config({"BT": 32, "BN": 16, "BK": 32}, 4, 1),
            ("pixels", 2, 64, "many"): Config({"BT": 128, "BN": 16, "BK": 32}, 4, 1),
            ("pixels", 2, 128, "few"): Config({"BT": 32, "BN": 32, "BK": 32}, 4, 1),
            ("pixels", 2, 128, "many"): Config({"BT": 128, "BN": 32, "BK": 32}, 4, 1),
            ("pixels", 2, 192, "few"): Config({"BT": 32, "BN": 64, "BK": 32}, 4, 1),
            ("pixels", 2, 192, "many"): Config({"BT": 128, "BN": 64, "BK": 32}, 4, 1),
            ("pixels", 2, "wide", "few"): Config({"BT": 32, "BN": 64, "BK": 32}, 4, 1),
            ("pixels", 2, "wide", "many"): Config({"BT": 32, "BN": 64, "BK": 32}, 4, 1),
            ("pixels", 4, 64, "few"): Config({"BT": 32, "BN": 16, "BK": 32}, 4, 1),
            ("pixels", 4, 64, "many"): Config({"BT": 64, "BN": 16, "BK": 32}, 4, 1),
            ("pixels", 4, 128, "few"): Config({"BT": 32, "BN": 32, "BK": 32}, 4, 1),
            ("pixels", 4, 128, "many"): Config({"BT": 64, "BN": 32, "BK": 32}, 4, 1),
            ("pixels", 4, 192, "few"): Config({"BT": 32, "BN": 64, "BK": 32}, 4, 1),
            ("pixels", 4, 192, "many"): Config({"BT": 64, "BN": 64, "BK": 32}, 4, 1),
            ("pixels", 4, "wide", "few"): Config({"BT": 32, "BN": 32, "BK": 32}, 4, 1),
            ("pixels", 4, "wide", "many"): Config({"BT": 32, "BN": 32, "BK": 32}, 4, 1),
            ("conv", 2, 64, "few"): Config({"BT": 16, "BN": 16, "BK": 64}, 2, 4),
            ("conv", 2, 64, "many"): Config({"BT": 128, "BN": 32, "BK": 64}, 4, 3),
            ("conv", 2, 128, "few"): Config({"BT": 16, "BN": 32, "BK": 64}, 4, 4),
            ("conv", 2, 128, "many"): Config({"BT": 128, "BN": 64, "BK": 64}, 4, 3),
            ("conv", 2, 192, "few"): Config({"BT": 16, "BN": 32, "BK": 64}, 4, 4),
            ("conv", 2, 192, "many"): Config({"BT": 128, "BN": 32, "BK": 64}, 4, 3),
            ("conv", 2, "wide", "few"): Config({"BT": 16, "BN": 64, "BK": 64}, 4, 4),
            ("conv", 2, "wide", "many"): Config({"BT": 128, "BN": 64, "BK": 64}, 4, 3),
            ("conv", 4, 64, "few"): Config({"BT": 16, "BN": 16, "BK": 32}, 2, 3),
            ("conv", 4, 64, "many"): Config({"BT": 64, "BN": 32, "BK": 32}, 4, 3),
            ("conv", 4, 128, "few"): Config({"BT": 16, "BN": 32, "BK": 32}, 4, 3),
            ("conv", 4, 128, "many"): Config({"BT": 64, "BN": 64, "BK": 32}, 4, 3),
            ("conv", 4, 192, "few"): Config({"BT": 16, "BN": 32, "BK": 32}, 4, 3),
            ("conv", 4, 192, "many"): Config({"BT": 64, "BN": 32, "BK": 32}, 4, 3),
            ("conv", 4, "wide", "few"): Config({"BT": 16, "BN": 32, "BK": 32}, 4, 3),
            ("conv", 4, "wide", "many"): Config({"BT": 64, "BN": 64, "BK": 32}, 4, 3),
        },
    }
)


def CANDIDATES(s: Shape, dtype: torch.dtype) -> Mapping[str, list[Config]]:
    """Rows worth trying, by kernel."""
    narrow = dtype.itemsize == 2
    bn = min(64, triton.next_power_of_2(s.C // 4))
    return {
        "pixels": [
            Config({"BT": bt, "BN": bn, "BK": 32}, warps, 1)
            for bt in ((32, 64, 128) if narrow else (32, 64))
            for warps in (4, 8)
        ],
        "conv": [
            Config({"BT": bt, "BN": bn, "BK": 64 if narrow else 32}, 4, stages)
            for bt in ((16, 64, 128) if narrow else (16, 64))
            for bn in (32, 64)
            for stages in (2, 4)
        ],
    }


@triton.jit
def relu(x):
    """max(x, 0); NaN stays NaN."""
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def pixel_taps(x_ptr, pad_ptr, row, col, k, H, W, stride_c, stride_h, stride_w, IN: tl.constexpr):
    """Inputs k = (tap, channel) of conv1 of windows at pixel (row, col): [BT, BK] float32.

    Loaded as [BK, BT]: neighbours in x are neighbours in a warp, whichever stride is 1.
    """
    tap, ci = k // IN, k % IN
    rows = row[None, :] + (tap // 3)[:, None]  # [BK, BT]
    cols = col[None, :] + (tap % 3)[:, None]
    inside = (rows >= 0) & (rows < H) & (cols >= 0) & (cols < W) & (k < 9 * IN)[:, None]
    offs_t = row * stride_h + col * stride_w
    offs_k = (tap // 3) * stride_h + (tap % 3) * stride_w + ci * stride_c
    x = tl.load(x_ptr + (offs_t[None, :] + offs_k[:, None]), mask=inside, other=0)
    x = x.to(tl.float32)
    if x_ptr.dtype.element_ty == tl.uint8:
        pad = tl.load(pad_ptr + ci, mask=k < 9 * IN, other=0.0)
        x = tl.where(inside, x, pad[:, None])
    return tl.trans(x)


@triton.jit(do_not_specialize=["H", "W", "stride_b", "stride_c", "stride_h", "stride_w"])
def stem_pixels_kernel(
    y_ptr, x_ptr, w1_ptr, bias1_ptr, pad_ptr, w2_ptr, bias2_ptr,
    H, W, stride_b, stride_c, stride_h, stride_w,
    IN: tl.constexpr, C1: tl.constexpr, C2: tl.constexpr, C1P: tl.constexpr, WIDE: tl.constexpr,
    BT: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """relu(conv2(relu(conv1(x)))): x [B, IN, H, W] -> y [B, H2, W2, C2]. C1P: C1 as a power of 2.

    Grid (B * blocks of BT positions, blocks of BN channels).
    """
    dtype = w1_ptr.dtype.element_ty
    H1, W1 = (H + 1) // 2, (W + 1) // 2
    H2, W2 = (H1 + 1) // 2, (W1 + 1) // 2
    blocks = tl.cdiv(H2 * W2, BT)
    b = (tl.program_id(0) // blocks).to(tl.int64)
    offs_t = (tl.program_id(0) % blocks) * BT + tl.arange(0, BT)
    mask_t = offs_t < H2 * W2
    offs_n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask_n = offs_n < C2
    offs_c = tl.arange(0, C1P)
    mask_c = offs_c < C1
    x_ptr += b * stride_b
    bias1 = tl.load(bias1_ptr + offs_c, mask=mask_c, other=0.0)
    acc = tl.zeros([BT, BN], tl.float32)
    for tap in range(9):
        row = 2 * (offs_t // W2) + tap // 3 - 1  # of map 1
        col = 2 * (offs_t % W2) + tap % 3 - 1
        h = tl.zeros([BT, C1P], tl.float32)
        for k0 in range(0, 9 * IN, BK):
            k = k0 + tl.arange(0, BK)
            x = pixel_taps(
                x_ptr, pad_ptr, 2 * row - 1, 2 * col - 1, k, H, W, stride_c, stride_h, stride_w, IN
            )
            mask_w1 = (k < 9 * IN)[:, None] & mask_c[None, :]
            w1 = tl.load(w1_ptr + k[:, None] * C1 + offs_c[None, :], mask=mask_w1, other=0.0)
            h = dot(x.to(dtype), w1, h, WIDE)
        h = relu(h + bias1[None, :])
        inside = mask_t & (row >= 0) & (row < H1) & (col >= 0) & (col < W1)
        # Channels past C1 too: Inf * 0 would have made them NaN.
        h = tl.where(inside[:, None] & mask_c[None, :], h, 0.0)  # [BT, C1P]
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
    """(H, W, C) of x and of what each of the four convolutions gives."""
    found = [(H, W, s.in_)]
    for C in s.widths[1:]:
        H, W = (H + 1) // 2, (W + 1) // 2
        found.append((H, W, C))
    return found


def _map_bytes(dtype: torch.dtype, B: int, H: int, W: int, C: int) -> int:
    return cdiv(B * H * W * C * dtype.itemsize, 256) * 256


def scratch(s: Shape, dtype: torch.dtype, B: int, H: int, W: int) -> int:
    """Bytes: maps 2 and 3."""
    _, _, map2, map3, _ = maps(s, H, W)
    return _map_bytes(dtype, B, *map2) + _map_bytes(dtype, B, *map3)


def shape_class(
    s: Shape, dtype: torch.dtype, B: int, H: int, W: int, deterministic: bool
) -> tuple[int, int | str, str]:
    """Key of CONFIGS without the kernel's name."""
    h, w = meaning.out_hw(H, W)
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
    span = sum((n - 1) * stride for n, stride in zip(x.shape[1:], x.stride()[1:], strict=True))
    (_, _, _), (H1, W1, C1), (H2, W2, C2), (H3, W3, C3), (H4, W4, C4) = maps(s, H, W)
    if max(span, H1 * W1 * C1) >= 2**31:
        raise NotImplementedError(
            f"stem: x {list(x.shape)} with strides {list(x.stride())} needs offsets above 2^31 "
            "inside one image; use a smaller or a contiguous image"
        )
    dtype = w.conv2.dtype
    key = shape_class(s, dtype, B, H, W, deterministic)
    config = {name: CONFIGS.row(arch, (name, *key)) for name in ("pixels", "conv")} | dict(
        config or {}
    )
    end = _map_bytes(dtype, B, H2, W2, C2)
    map2 = space[:end].view(dtype)
    map3 = space[end : end + _map_bytes(dtype, B, H3, W3, C3)].view(dtype)
    pixels = x.dtype == torch.uint8
    wide = INTERPRETED and dtype == torch.bfloat16
    strides = dict(zip(("stride_b", "stride_c", "stride_h", "stride_w"), x.stride(), strict=True))
    tiles = config["pixels"].tiles
    launches = [
        Launch(
            stem_pixels_kernel,
            (B * cdiv(H2 * W2, tiles["BT"]), cdiv(C2, tiles["BN"])),
            {
                "y_ptr": map2,
                "x_ptr": x,
                "w1_ptr": w.conv1_u8 if pixels else w.conv1,
                "bias1_ptr": w.bias1_u8 if pixels else w.bias1,
                "pad_ptr": w.pad_u8,
                "w2_ptr": w.conv2,
                "bias2_ptr": w.bias2,
                "H": H,
                "W": W,
                **strides,
            },
            {
                "IN": IN,
                "C1": C1,
                "C2": C2,
                "C1P": max(16, triton.next_power_of_2(C1)),
                "WIDE": wide,
            },
            config["pixels"],
        )
    ]
    tiles = config["conv"].tiles
    for out, inp, conv, bias, (H, W, CIN), (HO, WO, COUT), relu_after in (
        (map3, map2, w.conv3, w.bias3, (H2, W2, C2), (H3, W3, C3), True),
        (y, map3, w.conv4, w.bias4, (H3, W3, C3), (H4, W4, C4), False),
    ):
        launches.append(
            Launch(
                stem_conv_kernel,
                (cdiv(B * HO * WO, tiles["BT"]), cdiv(COUT, tiles["BN"])),
                {
                    "y_ptr": out,
                    "x_ptr": inp,
                    "w_ptr": conv,
                    "bias_ptr": bias,
                    "B": B,
                    "H": H,
                    "W": W,
                },
                {"CIN": CIN, "COUT": COUT, "RELU": relu_after, "WIDE": wide},
                config["conv"],
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
    config: Mapping[str, Config] | None = None,
) -> None:
    """Launches plan(...) on the current stream."""
    run(plan(y, x, w, s, space, arch=arch, deterministic=deterministic, config=config))
