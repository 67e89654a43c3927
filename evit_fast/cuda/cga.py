"""cga in CUDA (csrc/cuda/cga.cuh): weights as its kernels read them, and its launches."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from evit_fast.cuda.kernels import KINDS, MIN_ARCH_BFLOAT16, Kernel, Launch, family, refusal
from evit_fast.fragments import TILE, pack_tiles
from evit_fast.ops.cga import Shape, Weights

DK = 16  # kCgaKeyDim
MAX_HEADS = 16  # kCgaHeads
MAX_DV = 128  # q, k, v and the heads' outputs of a warp stay in registers
MAX_TOKENS = 196  # of a window: the scores of 16 queries stay in registers
FEW_WINDOWS = 128  # as many blocks as a V100, A100 or H100 has SMs, or fewer
FEW_TOKENS = 1024  # 16 blocks of 64
MANY_CHANNELS = 384  # 64 rows of more do not fit in the 64 KiB of sm_75
SHARED_KIB = {70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # of a block


class Packed(NamedTuple):
    """Per-head arrays lie one behind the other; KS2: the largest ks, squared; SP: S up to 16."""

    qkv: torch.Tensor  # [heads, (2 DK + DV) / 16, DV / 16, 256]
    qkv_bias: torch.Tensor  # [heads, 2 DK + DV] float32
    dw: torch.Tensor  # [heads, KS2, DK] float32
    dw_bias: torch.Tensor  # [heads, DK] float32
    bias: torch.Tensor  # [heads, SP / 16, SP / 16, 2, 32, 4] float32, in accumulator order
    proj: torch.Tensor  # [C / 16, C / 16, 256]
    proj_bias: torch.Tensor  # [C] float32


class Attention(NamedTuple):
    """Windows and warps of a block, whether the projection is inside, and how many blocks the
    compiler keeps registers free for on an SM."""

    windows: int
    warps: int
    fused: int
    blocks_per_sm: int


class Projection(NamedTuple):
    """Tokens and warps of a block, and blocks that share the columns."""

    tokens: int
    warps: int
    split: int


def _always(*row: int) -> tuple[Attention, Attention]:
    return Attention(*row), Attention(*row)


# By (tile family, rows of a window, channels): the row for few windows and the one for many. From a
# model of a V100, registers and shared memory; no card was at hand. Reasons by shape class:
#   64, narrow  C <= 96: two blocks fit on an SM with the projection inside (on the model 15.7 k
#               cycles a window of M0's first stage).
#   64, wide    the projection apart: 24.3 + 14.4 k cycles a window of M5's second stage, against
#               54.5 k inside. Two blocks of 4 warps; 8 warps run alone (35.4 + 14.4 k) and take
#               only 6 % less for one window.
#   16          few: four warps share the 16 queries of a window, else SMs stay idle. many: four
#               windows read a weight once.
#   more        a warp goes from query tile to query tile.
ATTENTION = {
    (70, "64", "narrow"): _always(1, 4, 1, 3),  # 31 KiB and 168 registers: three blocks
    (70, "64", "wide"): _always(1, 4, 0, 2),
    (70, "16", "narrow"): (Attention(1, 4, 0, 2), Attention(4, 4, 0, 2)),
    (70, "16", "wide"): (Attention(1, 4, 0, 2), Attention(4, 4, 0, 2)),
    (70, "more", "narrow"): _always(1, 8, 0, 1),
    (70, "more", "wide"): _always(1, 8, 0, 1),
    (75, "64", "narrow"): _always(1, 4, 1, 2),
    (75, "64", "wide"): _always(1, 4, 0, 2),
    (75, "16", "narrow"): (Attention(1, 4, 0, 2), Attention(4, 4, 0, 2)),
    (75, "16", "wide"): (Attention(1, 4, 0, 2), Attention(4, 4, 0, 2)),
    (75, "more", "narrow"): _always(1, 8, 0, 1),
    (75, "more", "wide"): _always(1, 8, 0, 1),
    (80, "64", "narrow"): _always(1, 4, 1, 4),  # 24 KiB and 128 registers: four blocks
    (80, "64", "wide"): _always(1, 4, 0, 2),
    (80, "16", "narrow"): (Attention(1, 4, 0, 2), Attention(4, 4, 0, 2)),
    (80, "16", "wide"): (Attention(1, 4, 0, 2), Attention(4, 4, 0, 2)),
    (80, "more", "narrow"): _always(1, 8, 0, 1),
    (80, "more", "wide"): _always(1, 8, 0, 1),
    (0, "64", "narrow"): _always(1, 4, 1, 2),
    (0, "64", "wide"): _always(1, 4, 0, 1),
    (0, "16", "narrow"): (Attention(1, 4, 0, 2), Attention(2, 4, 0, 2)),  # two: 4 KiB a row
    (0, "16", "wide"): (Attention(1, 4, 0, 2), Attention(2, 4, 0, 2)),
    (0, "more", "narrow"): _always(1, 8, 0, 1),
    (0, "more", "wide"): _always(1, 8, 0, 1),
}


def attention_config(s: Shape, tiles: int, windows: int, deterministic: bool) -> Attention:
    """tiles: family; deterministic: the same for every number of windows."""
    rows = "16" if s.tokens <= 16 else "64" if s.tokens <= 64 else "more"
    few, many = ATTENTION[tiles, rows, "narrow" if s.C <= 96 else "wide"]
    return few if windows <= FEW_WINDOWS and not deterministic else many


def projection_config(s: Shape, tiles: int, tokens: int, deterministic: bool) -> Projection:
    if tokens <= FEW_TOKENS and not deterministic:
        return Projection(16, 4, -(-s.C // (4 * TILE)))  # a column tile a warp: more SMs have work
    if s.C > MANY_CHANNELS:
        return Projection(16, 4, 1)
    return Projection(32 if tiles == 0 else 64, 4, 1)


def sizes(s: Shape, a: Attention, p: Projection, x: int, y: int) -> tuple[int, ...]:
    """The fields of CgaSizes. x, y: kinds of numbers."""
    return (s.C, s.heads, s.window, *a, *p, x, y, *s.ks)


def shared_bytes(s: Shape, c: Attention, family: int) -> int:
    """Shared memory of an attention block: cga_memory() of csrc/cuda/cga.cuh."""

    def stride(n: int) -> int:
        if family == 0:
            return n + 4
        return n + 8 if family == 70 else n if n % 32 == 16 else n + 16

    number = 2 if family else 4
    key_tiles = -(-s.tokens // TILE)
    rows, ks = c.windows * key_tiles * TILE, max(s.ks)
    numbers = rows * stride(s.dv) + s.dv * stride(rows) + 2 * rows * stride(DK)
    raw_q, p = 4 * c.windows * s.tokens * DK, 0
    if family == 70 or (family == 0 and c.warps * TILE >= 2 * rows):
        chunk = key_tiles if family == 70 and key_tiles <= 4 else 1
        p = number * c.warps * TILE * stride(chunk * TILE)
    taps = 4 * ks * ks * DK if family else 0
    return number * (numbers + (rows * stride(s.C) if c.fused else 0)) + max(raw_q, p) + taps


def projection_bytes(s: Shape, p: Projection, family: int) -> int:
    """Shared memory of a projection block: cga_projection_launch()."""
    if family == 0:
        stride = s.C + (36 - s.C % 32) % 32
    else:
        stride = s.C + 8 if family == 70 else s.C if s.C % 32 == 16 else s.C + 16
    return p.tokens * stride * (2 if family else 4)


def supports(s: Shape, dtype: torch.dtype, arch: int) -> str | None:
    """None, or why the op does not run so."""
    if why := refusal(dtype, arch):
        return why
    if s.dk != DK or s.heads > MAX_HEADS:
        return (
            f"cuda: cga has key_dim {DK} and at most {MAX_HEADS} heads, "
            f"this one key_dim {s.dk} and {s.heads} heads"
        )
    if s.dv > MAX_DV:
        return (
            f"cuda: cga keeps a head's outputs in registers, at most {MAX_DV} channels a head; "
            f"C={s.C} with heads={s.heads} has {s.dv}"
        )
    if s.tokens > MAX_TOKENS:
        return (
            "cuda: cga keeps the scores of 16 queries in registers, windows of at most 14x14; "
            f"this one is {s.window}x{s.window}"
        )
    limit = SHARED_KIB[max(a for a in SHARED_KIB if a <= arch)] * 1024
    tiles = family(arch, dtype)
    wanted = max(
        shared_bytes(s, attention_config(s, tiles, windows, False), tiles)
        for windows in (1, FEW_WINDOWS + 1)
    )
    wanted = max(wanted, projection_bytes(s, projection_config(s, tiles, 0, True), tiles))
    if wanted > limit:
        return (
            f"cuda: cga with C={s.C}, heads={s.heads} and window={s.window} needs {wanted} "
            f"bytes of shared memory in {str(dtype)[6:]}, sm_{arch} has {limit}"
        )
    return None


def prepare(w: Weights, s: Shape, dtype: torch.dtype, family: int) -> Packed:
    """The natural weights in the kernels' layout, on w's device."""
    most = max(s.ks) ** 2
    taps = [F.pad(d.float().flatten(1).T, (0, 0, 0, most - d[0].numel())) for d in w.dw]
    return Packed(
        qkv=torch.stack([pack_tiles(m.to(dtype), family, "a") for m in w.qkv]),
        qkv_bias=torch.stack([b.float() for b in w.qkv_bias]),
        dw=torch.stack(taps).contiguous(),
        dw_bias=torch.stack([b.float() for b in w.dw_bias]),
        bias=torch.stack([_accumulators(b.float(), family) for b in w.bias]),
        proj=pack_tiles(w.proj.to(dtype), family, "b"),
        proj_bias=w.proj_bias.float().contiguous(),
    )


def scratch(s: Shape, dtype: torch.dtype, B: int, H: int, W: int) -> int:
    """Bytes of relu(concat), a multiple of 256. Whether the projection is inside depends on s."""
    if attention_config(s, family(MIN_ARCH_BFLOAT16, dtype), 1, True).fused:
        return 0
    return -(-B * H * W * s.C * dtype.itemsize // 256) * 256


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
    dtype = w.qkv.dtype
    tiles = family(arch, dtype)
    windows = B * -(-H // s.window) * -(-W // s.window)
    a = attention_config(s, tiles, windows, deterministic)
    p = projection_config(s, tiles, B * H * W, deterministic)
    x_kind, y_kind = KINDS[x.dtype], KINDS[y.dtype]
    # A kernel's sizes hold no config but its own, so that both halves are compiled once each.
    nothing, one = Projection(16, 1, 1), Attention(1, 4, 0, 1)
    if a.fused:
        whole = Kernel("cga", "attention", sizes(s, a, nothing, x_kind, y_kind), dtype, tiles)
        return [Launch(whole, (y, x, *w, B, H, W), B, H, W)]
    numbers = sizes(s, a, nothing, x_kind, KINDS[dtype])
    attention = Kernel("cga", "attention", numbers, dtype, tiles)
    projection = Kernel("cga", "projection", sizes(s, one, p, x_kind, y_kind), dtype, tiles)
    return [
        Launch(attention, (space, x, *w, B, H, W), B, H, W),
        Launch(projection, (y, space, x, w.proj, w.proj_bias, B * H * W), B, H, W),
    ]


def _accumulators(bias: torch.Tensor, family: int) -> torch.Tensor:
    """[S, S] -> [SP / 16, SP / 16, 2, 32, 4]: what each lane of a score tile starts from.

    Columns past S are -inf: their probability is 0. Rows past S are never stored.
    """
    more = -bias.shape[0] % TILE
    padded = F.pad(F.pad(bias, (0, more), value=float("-inf")), (0, 0, 0, more))
    tiles = len(padded) // TILE
    padded = padded.reshape(tiles, TILE, tiles, TILE).transpose(1, 2)
    rows, columns = _places(family)
    return padded[:, :, rows, columns].contiguous()


def _places(family: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row and column of the numbers of an accumulator, by (element / 4, lane, element % 4).

    row(), column() and at() of csrc/cuda/tile_*.cuh.
    """
    part, lane, i = torch.meshgrid(
        torch.arange(2), torch.arange(32), torch.arange(4), indexing="ij"
    )
    if family == 0:
        half, j = part, i
    else:
        half, j = i >> 1, (i & 1) + part * 2
    if family == 70:
        row = (lane & 1) + half * 2 + (lane >> 2 & 1) * 4 + (lane >> 4) * 8
        column = (lane >> 1 & 1) * 4 + (lane >> 3 & 1) * 8
    else:
        row = (lane >> 2) + half * 8
        column = (lane & 3) * 4
    return row, column + j
