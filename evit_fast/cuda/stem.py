"""stem in CUDA (csrc/cuda/stem.cuh): weights as its kernels read them, and its launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from evit_fast.cuda.kernels import KINDS, Kernel, Launch, family, refusal
from evit_fast.fragments import TILE, pack_tiles
from evit_fast.ops.stem import Shape, Weights

FEW_POSITIONS = 8192  # of map 2: 128 blocks of 64, as many as big cards have SMs, or fewer
FEW_TOKENS = 1024  # of a convolution's output: 16 blocks of 64
SHARED_BYTES = 48 * 1024  # of a block: two on an SM of every architecture but sm_75
WARPS = 4
MAX_COLUMN_TILES = 12  # of a block of conv: the sums stay in registers


class Packed(NamedTuple):
    """conv*: tiles of B operands; rows are output channels, the order of k is stem.cuh's."""

    conv1: torch.Tensor  # [C/8 up to 16 / 16, 3 * K1 / 16, 256], K1: 16 for every 4 channels
    bias1: torch.Tensor  # [C/8 up to 16] float32
    conv1_u8: torch.Tensor
    bias1_u8: torch.Tensor
    pad_u8: torch.Tensor  # [IN up to 4] float32
    conv2: torch.Tensor  # [C/4 / 16, 3 * K2 / 16, 256], K2: 3 * C/8 up to 16
    bias2: torch.Tensor  # [C/4] float32
    conv3: torch.Tensor  # [C/2 / 16, 9 * C/4 / 16, 256]
    bias3: torch.Tensor
    conv4: torch.Tensor  # [C / 16, 9 * C/2 / 16, 256]
    bias4: torch.Tensor


class Pixels(NamedTuple):
    """Positions of map 2 of a block: rows x columns."""

    rows: int
    columns: int


class Conv(NamedTuple):
    """Tokens of a block, k of a chunk, blocks that share the channels, warps."""

    tokens: int
    chunk: int
    split: int
    warps: int


# Blocks of `pixels`, the largest that fits in SHARED_BYTES: a larger one computes less of map 1
# twice (8x8: 13 %, 4x8: 20 %, 4x4: 27 %). By tile family, where there are many.
#   80: 41 KiB at C=192. 70 and 75: 8x8 leaves room for one block on an SM (sm_75: 64 KiB).
#   0: 27 KiB at C=192 with 4x4; 51 with 4x8.
TILES = [Pixels(8, 8), Pixels(4, 8), Pixels(4, 4), Pixels(2, 4), Pixels(1, 4), Pixels(1, 1)]
LARGEST = {80: Pixels(8, 8), 75: Pixels(4, 8), 70: Pixels(4, 8), 0: Pixels(4, 4)}
LARGEST_FEW = Pixels(4, 4)  # 196 blocks for an image of 224 pixels


def pixels_config(s: Shape, tiles: int, positions: int, deterministic: bool) -> Pixels:
    """tiles: family; deterministic: the same for every number of positions."""
    few = positions <= FEW_POSITIONS and not deterministic
    fitting = TILES[TILES.index(LARGEST_FEW if few else LARGEST[tiles]) :]
    return next((t for t in fitting if pixels_bytes(s, t, tiles) <= SHARED_BYTES), TILES[-1])


def conv_config(cin: int, cout: int, tiles: int, tokens: int, deterministic: bool) -> Conv:
    """few tokens: a column tile a warp, and a row of taps a chunk, so that few barriers are met."""
    column_tiles = cout // TILE
    if tokens <= FEW_TOKENS and not deterministic:
        warps = 4 if column_tiles % 4 == 0 else 2
        return Conv(TILE, _chunk(cin, 288), column_tiles // warps, warps)
    split = -(-column_tiles // MAX_COLUMN_TILES)
    warps = 8 if column_tiles // split > 6 else 4
    return Conv(64 if tiles else 32, _chunk(cin, 144), split, warps)


def _chunk(cin: int, most: int) -> int:
    """The largest multiple of 16 up to `most` that divides 9 * cin."""
    return max(k for k in range(TILE, most + 1, TILE) if 9 * cin % k == 0)


def supports(s: Shape, dtype: torch.dtype, arch: int) -> str | None:
    """None: every stem runs, in every dtype that the kernels have; else why not."""
    return refusal(dtype, arch)


def pixels_bytes(s: Shape, t: Pixels, family: int) -> int:
    """Shared memory of a block of `pixels`: stem_pixels_memory() of csrc/cuda/stem_sizes.cuh."""

    def positions(rows: int, columns: int) -> int:
        return (rows + 1) * columns + -(-rows * columns // TILE) * TILE

    pixels = positions(2 * t.rows + 1, 2 * t.columns + 1) * _stride(family, _k1(s))
    map1 = positions(t.rows, t.columns) * _stride(family, _k2(s))
    return (pixels + map1) * (2 if family else 4)


def _stride(family: int, n: int) -> int:
    if family == 0:
        return n + 4
    return n + 8 if family == 70 else n if n % 32 == 16 else n + 16


def _k1(s: Shape) -> int:
    """k of a tap row of conv1."""
    return -(-s.in_ // 4) * 16


def _k2(s: Shape) -> int:
    """k of a tap row of conv2."""
    return -(-3 * s.C // 8 // TILE) * TILE


def prepare(w: Weights, s: Shape, dtype: torch.dtype, family: int) -> Packed:
    """The natural weights in the kernels' layout, on w's device."""
    more = -s.C // 8 % TILE  # channels of zeros that conv1 computes and nobody reads
    channels = -s.in_ % 4

    def conv1(m: torch.Tensor) -> torch.Tensor:  # k: tap row, four channels, tap column, channel
        m = F.pad(m.to(dtype), (0, 1, 0, 0, 0, channels, 0, more))  # a fourth tap column
        m = m.unflatten(1, (-1, 4)).permute(0, 3, 1, 4, 2)
        return pack_tiles(m.flatten(1), family, "b")

    def conv2(m: torch.Tensor) -> torch.Tensor:  # k: tap row; tap column, channel, zeros
        rows = m.to(dtype).permute(0, 2, 3, 1).flatten(2)
        return pack_tiles(F.pad(rows, (0, _k2(s) - rows.shape[2])).flatten(1), family, "b")

    def conv(m: torch.Tensor) -> torch.Tensor:
        return pack_tiles(m.to(dtype).permute(0, 2, 3, 1).flatten(1), family, "b")

    return Packed(
        conv1=conv1(w.conv1),
        bias1=F.pad(w.bias1.float(), (0, more)),
        conv1_u8=conv1(w.conv1_u8),
        bias1_u8=F.pad(w.bias1_u8.float(), (0, more)),
        pad_u8=F.pad(w.pad_u8.float(), (0, channels)),
        conv2=conv2(w.conv2),
        bias2=w.bias2.float().contiguous(),
        conv3=conv(w.conv3),
        bias3=w.bias3.float().contiguous(),
        conv4=conv(w.conv4),
        bias4=w.bias4.float().contiguous(),
    )


def maps(s: Shape, H: int, W: int) -> list[tuple[int, int, int]]:
    """(H, W, C) of what each of the four convolutions gives for an image of H x W pixels."""
    found = []
    for C in s.widths[1:]:
        H, W = (H + 1) // 2, (W + 1) // 2
        found.append((H, W, C))
    return found


def _map_bytes(dtype: torch.dtype, B: int, H: int, W: int, C: int) -> int:
    return -(-B * H * W * C * dtype.itemsize // 256) * 256


def scratch(s: Shape, dtype: torch.dtype, B: int, H: int, W: int) -> int:
    """Bytes of maps 2 and 3, each a multiple of 256."""
    return sum(_map_bytes(dtype, B, *of) for of in maps(s, H, W)[1:3])


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
    """x [B, IN, H, W] float32, float16, bfloat16 or uint8, any strides; y [B, H', W', C] float32,
    float16 or bfloat16, contiguous; space: scratch() bytes.
    """
    B, _, H, W = x.shape
    if x.numel() == 0:
        return []
    dtype = w.conv2.dtype
    tiles = family(arch, dtype)
    _, (H2, W2, C2), (H3, W3, C3), (H4, W4, C4) = maps(s, H, W)
    end = _map_bytes(dtype, B, H2, W2, C2)
    map2, map3 = space, space[end:]
    block = pixels_config(s, tiles, B * H2 * W2, deterministic)
    is_u8 = x.dtype == torch.uint8
    first = (w.conv1_u8, w.bias1_u8) if is_u8 else (w.conv1, w.bias1)
    # A kernel's sizes hold no config but its own, so that each is compiled once.
    sizes = (s.in_, s.C, *block, 0, 0, 0, 0, 0, 0, WARPS, KINDS[x.dtype], KINDS[dtype])
    pixels = Launch(
        Kernel("stem", "pixels", sizes, dtype, tiles),
        (map2, x, *first, w.pad_u8, w.conv2, w.bias2, B, H, W, *x.stride()),
        B, H, W,
    )  # fmt: skip

    def conv(y: torch.Tensor, x: torch.Tensor, w: tuple, h: tuple, out: tuple, relu: int) -> Launch:
        H, W, cin = h
        c = conv_config(cin, out[2], tiles, B * out[0] * out[1], deterministic)
        y_kind = KINDS[dtype if relu else y.dtype]
        sizes = (0, 0, 0, 0, cin, out[2], relu, *c, KINDS[dtype], y_kind)
        kernel = Kernel("stem", "conv", sizes, dtype, tiles)
        return Launch(kernel, (y, x, *w, B, H, W), B, H, W)

    return [
        pixels,
        conv(map3, map2, (w.conv3, w.bias3), (H2, W2, C2), (H3, W3, C3), 1),
        conv(y, map3, (w.conv4, w.bias4), (H3, W3, C3), (H4, W4, C4), 0),
    ]
