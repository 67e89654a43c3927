"""Cascaded group attention: y = x + proj(relu(cat(head_0 .. head_{HEADS-1}))).   Paper section 3.1.

`cga_window_kernel`: one program = PACK windows, all heads one after the other. Window partition,
zero padding and crop are index arithmetic on the loads and stores of [B, H, W, C] maps. On chip
from x to the heads' outputs: a head's input (its slice of x plus the previous head's output), q, k,
v, the S x S scores. Grid: (windows / PACK).
  PROJECT=1  multiplies relu(head) by its rows of the projection at once and adds it up in registers
             [PACK * SP, C]: nothing is written but y.
  PROJECT=0  writes relu(head) to scratch [T, C]; `cga_projection_kernel`, one program = BT tokens
             x BN channels, then needs no windows and spreads over the card.

A window's S tokens are padded to SP = 16, 32, 64 or 128 rows. Widths are two powers of two
(launches.parts): DV = D0 + D1, C = C0 + C1; `prepare` pads the matrices with zeros to D0 + D1 rows
and columns, so loads of weights need no mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from evit_fast.kernels.dot import dot
from evit_fast.kernels.launches import (
    INTERPRETED,
    Config,
    Launch,
    Table,
    cdiv,
    launcher,
    parts,
    refusal,
)
from evit_fast.kernels.relu import relu
from evit_fast.ops.cga import Shape, Weights

# float32 products take K in steps of STEP: FMAs want all of both operands in registers, and spill.
STEP: tl.constexpr = tl.constexpr(16)

FEW = 128  # windows: as many programs as an A100 or H100 has SMs, or fewer


def window(PACK: int, PROJECT: int, num_warps: int, maxnreg: int | None = None) -> Config:
    """One stage: Triton pipelines no loop that holds another one, and the float32 loops would
    spill. maxnreg: 255 where ptxas spills one register to fit one more block.
    """
    tiles = {"PACK": PACK, "PROJECT": PROJECT, "maxnreg": maxnreg}
    return Config(tiles, num_warps, 1)


def projection(BT: int, BN: int, BK: int, num_stages: int) -> Config:
    return Config({"BT": BT, "BN": BN, "BK": BK}, 4, num_stages)


# By what the compiler reports (compiled.csv), not by a card. PROJECT=1 where y's sums leave
# registers to spare: at C=192, 240 and 288 they spill on sm_80, with 4 warps and with 8. float32
# has no tensor cores and keeps more operands in registers: 8 warps, PACK=1. Few wide windows: twice
# the warps for each, a projection cut finer. Many 4x4 windows: four of them read a weight once.
_SM80 = {
    ("window", 2, "16 rows, C <= 192", "few"): window(1, 0, 4, maxnreg=255),
    ("window", 2, "16 rows, C <= 192", "many"): window(4, 0, 8),
    ("window", 2, "16 rows", "few"): window(1, 0, 4, maxnreg=255),
    ("window", 2, "16 rows", "many"): window(4, 0, 8),
    ("window", 2, "64 rows, C <= 128", "few"): window(1, 1, 4),
    ("window", 2, "64 rows, C <= 128", "many"): window(1, 1, 4),
    ("window", 2, "64 rows", "few"): window(1, 0, 8),
    ("window", 2, "64 rows", "many"): window(1, 0, 4),
    ("window", 2, "128 rows", "few"): window(1, 0, 8),
    ("window", 2, "128 rows", "many"): window(1, 0, 8),
    ("window", 4, "16 rows, C <= 192", "few"): window(1, 0, 8),
    ("window", 4, "16 rows, C <= 192", "many"): window(1, 0, 8),
    ("window", 4, "16 rows", "few"): window(1, 0, 8),
    ("window", 4, "16 rows", "many"): window(1, 0, 8),
    ("window", 4, "64 rows, C <= 128", "few"): window(1, 0, 8),
    ("window", 4, "64 rows, C <= 128", "many"): window(1, 0, 8),
    ("window", 4, "64 rows", "few"): window(1, 0, 8),
    ("window", 4, "64 rows", "many"): window(1, 0, 8),
    ("window", 4, "128 rows", "few"): window(1, 0, 16),
    ("window", 4, "128 rows", "many"): window(1, 0, 16),
    ("projection", 2, "few"): projection(16, 32, 64, 3),
    ("projection", 2, "many"): projection(64, 64, 32, 3),
    ("projection", 4, "few"): projection(16, 32, 16, 3),
    ("projection", 4, "many"): projection(64, 64, 16, 3),
}
# Where the rows before would spill.
_SM100 = _SM80 | {
    ("window", 2, "16 rows, C <= 192", "many"): window(4, 0, 4),
    ("window", 2, "16 rows", "many"): window(4, 0, 4),
    ("window", 2, "64 rows, C <= 128", "few"): window(1, 1, 4, maxnreg=255),
    ("window", 2, "64 rows, C <= 128", "many"): window(1, 1, 4, maxnreg=255),
    ("projection", 2, "many"): projection(64, 64, 32, 2),
}
_SM120 = _SM100 | {
    ("window", 2, "64 rows", "few"): window(1, 0, 4),
    ("window", 2, "64 rows, C <= 128", "few"): window(1, 0, 4),
    ("window", 2, "64 rows, C <= 128", "many"): window(1, 0, 4),
    ("window", 4, "16 rows, C <= 192", "few"): window(1, 1, 8),
    ("window", 4, "16 rows, C <= 192", "many"): window(1, 1, 8),
}
CONFIGS = Table(op="cga", rows={80: _SM80, 100: _SM100, 120: _SM120})


@triton.jit
def part(a, j, AXIS: tl.constexpr):
    """Rows (AXIS=0) or columns (AXIS=1) [j * STEP, (j + 1) * STEP) of a, for a j of run time."""
    N: tl.constexpr = a.shape[AXIS] // STEP
    if AXIS == 0:
        a = tl.where((tl.arange(0, N) == j)[:, None, None], a.reshape(N, STEP, a.shape[1]), 0.0)
    else:
        a = tl.where((tl.arange(0, N) == j)[None, :, None], a.reshape(a.shape[0], N, STEP), 0.0)
    return tl.sum(a, AXIS)


@triton.jit
def product(a, w_ptr, stride, acc, WIDE: tl.constexpr):
    """acc + a @ w.   a [R, K], acc [R, N]; w [K, N] in memory, `stride` elements a row."""
    K: tl.constexpr = a.shape[1]
    offs_n = tl.arange(0, acc.shape[1])
    if a.dtype == tl.float32:
        offs_k = tl.arange(0, STEP)
        for j in range(K // STEP):
            w = tl.load(w_ptr + (offs_k + j * STEP)[:, None] * stride + offs_n[None, :])
            acc = dot(part(a, j, 1), w, acc, WIDE)
    else:
        offs_k = tl.arange(0, K)
        w = tl.load(w_ptr + offs_k[:, None] * stride + offs_n[None, :])
        acc = dot(a, w, acc, WIDE)
    return acc


@triton.jit
def linear(a0, a1, w_ptr, stride, acc, WIDE: tl.constexpr):
    """acc + (a0 | a1) @ w.   a0 [R, K0], a1 [R, K1] or None, acc [R, N], w [K0 + K1, N] in memory
    with `stride` elements a row.
    """
    acc = product(a0, w_ptr, stride, acc, WIDE)
    if a1 is not None:
        acc = product(a1, w_ptr + a0.shape[1] * stride, stride, acc, WIDE)
    return acc


@triton.jit
def bias_rows(bias_ptr, R: tl.constexpr, N: tl.constexpr):
    """N float32 values as R equal rows: what an accumulator starts from.   [R, N]"""
    return tl.zeros((R, N), tl.float32) + tl.load(bias_ptr + tl.arange(0, N))[None, :]


@triton.jit
def pack_pairs(q):
    """Channels 2c and 2c+1 as one integer: half the shuffles between threads in `depthwise`.

    q [R, N] -> [R, N / 2]; 16-bit floats become int32, float32 int64.
    """
    BITS: tl.constexpr = q.dtype.primitive_bitwidth
    half: tl.constexpr = tl.core.get_int_dtype(BITS, signed=False)
    word: tl.constexpr = tl.core.get_int_dtype(2 * BITS, signed=False)
    even, odd = tl.split(tl.reshape(q, (q.shape[0], q.shape[1] // 2, 2)))
    even, odd = even.to(half, bitcast=True).to(word), odd.to(half, bitcast=True).to(word)
    return even | (odd << BITS)


@triton.jit
def unpack_pairs(words, kind: tl.constexpr):
    """What `pack_pairs` packed from `kind`: even and odd channels, [R, N / 2] float32 each."""
    BITS: tl.constexpr = kind.primitive_bitwidth
    half: tl.constexpr = tl.core.get_int_dtype(BITS, signed=False)
    even = words.to(half).to(kind, bitcast=True).to(tl.float32)
    odd = (words >> BITS).to(half).to(kind, bitcast=True).to(tl.float32)
    return even, odd


@triton.jit
def depthwise(q, taps_ptr, bias_ptr, ks, offs_s, WIN: tl.constexpr):
    """The ks x ks convolution of q over its window, zero-padded at the border.

    q [R, DK]; taps [ks * ks, DK], bias [DK] float32; offs_s [R] the token of a row in its window;
    rows of one window follow each other. Returns [R, DK] float32.
    """
    R: tl.constexpr = q.shape[0]
    PAIRS: tl.constexpr = q.shape[1] // 2
    pairs = pack_pairs(q)  # [R, PAIRS]
    offs_r, offs_p = tl.arange(0, R), 2 * tl.arange(0, PAIRS)
    row, column = offs_s // WIN, offs_s % WIN
    acc_even = tl.zeros((R, PAIRS), tl.float32) + tl.load(bias_ptr + offs_p)[None, :]
    acc_odd = tl.zeros((R, PAIRS), tl.float32) + tl.load(bias_ptr + offs_p + 1)[None, :]
    half = ks // 2
    for dy in range(-half, half + 1):
        inside_y = (row < WIN) & (row + dy >= 0) & (row + dy < WIN)
        for dx in range(-half, half + 1):
            inside = (inside_y & (column + dx >= 0) & (column + dx < WIN))[:, None]
            source = tl.where(inside, offs_r[:, None] + dy * WIN + dx, offs_r[:, None])
            shifted = tl.gather(pairs, tl.broadcast_to(source, (R, PAIRS)), 0)
            even, odd = unpack_pairs(shifted, q.dtype)
            even = acc_even + even * tl.load(taps_ptr + offs_p)[None, :]
            odd = acc_odd + odd * tl.load(taps_ptr + offs_p + 1)[None, :]
            acc_even, acc_odd = tl.where(inside, even, acc_even), tl.where(inside, odd, acc_odd)
            taps_ptr += q.shape[1]
    return tl.reshape(tl.join(acc_even, acc_odd), (R, 2 * PAIRS))


@triton.jit
def attention(q, k, bias_ptr, PACK: tl.constexpr, SP: tl.constexpr, WIDE: tl.constexpr):
    """Softmax rows [PACK * SP, SP] float32 of 2**(q k^T + bias), window by window.

    q, k [PACK * SP, DK]; bias [SP, SP] float32, -inf in the columns of rows that are no token.
    """
    offs_s = tl.arange(0, SP)
    bias = tl.load(bias_ptr + offs_s[:, None] * SP + offs_s[None, :])  # [SP, SP]
    if PACK == 1 and q.dtype != tl.float32:
        score = dot(q, tl.trans(k), bias, WIDE)
    else:
        # float32 of one window too: on sm_100 Triton 3.7 multiplies float32 matrices as TF32,
        # whatever it is asked for, where the right one is transposed; a batch of them it does not.
        DK: tl.constexpr = q.shape[1]
        q = tl.reshape(q, (PACK, SP, DK))
        k = tl.reshape(k, (PACK, SP, DK))
        bias = tl.broadcast_to(bias[None, :, :], (PACK, SP, SP))
        score = tl.reshape(dot(q, tl.permute(k, (0, 2, 1)), bias, WIDE), (PACK * SP, SP))
    p = tl.exp2(score - tl.max(score, 1)[:, None])
    return p * (1.0 / tl.sum(p, 1))[:, None]


@triton.jit
def apply(p, v, PACK: tl.constexpr, WIDE: tl.constexpr):
    """p @ v, window by window.   p [PACK * SP, SP], v [PACK * SP, N] -> [PACK * SP, N] float32"""
    R: tl.constexpr = v.shape[0]
    SP: tl.constexpr = p.shape[1]
    N: tl.constexpr = v.shape[1]
    if PACK == 1 and p.dtype == tl.float32:
        out = tl.zeros((R, N), tl.float32)
        for j in range(SP // STEP):
            out = dot(part(p, j, 1), part(v, j, 0), out, WIDE)
    elif PACK == 1:
        out = dot(p, v, tl.zeros((R, N), tl.float32), WIDE)
    else:
        p = tl.reshape(p, (PACK, SP, SP))
        v = tl.reshape(v, (PACK, SP, N))
        out = tl.reshape(dot(p, v, tl.zeros((PACK, SP, N), tl.float32), WIDE), (R, N))
    return out


@triton.jit(do_not_specialize=["B", "H", "W"])
def cga_window_kernel(
    y_ptr,  # [B, H, W, C]; PROJECT=0: relu(heads)
    x_ptr,  # [B, H, W, C]
    ks_ptr,  # [HEADS] int32
    qkv_ptr,  # [HEADS, D0 + D1, 2 * DK + D0 + D1]
    qkv_bias_ptr,  # [HEADS, 2 * DK + D0 + D1]
    dw_ptr,  # [HEADS, TAPS, DK], the first ks * ks rows are used
    dw_bias_ptr,  # [HEADS, DK]
    bias_ptr,  # [HEADS, SP, SP]
    proj_ptr,  # [C + D0 + D1 - DV, C0 + C1]
    proj_bias_ptr,  # [C0 + C1]
    B,
    H,
    W,
    C: tl.constexpr,
    HEADS: tl.constexpr,
    DK: tl.constexpr,
    WIN: tl.constexpr,
    TAPS: tl.constexpr,
    SP: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    C0: tl.constexpr,
    C1: tl.constexpr,
    WIDE: tl.constexpr,
    PACK: tl.constexpr,
    PROJECT: tl.constexpr,
):
    DV: tl.constexpr = C // HEADS
    NQ: tl.constexpr = 2 * DK + D0 + D1  # columns of a head's qkv
    CP: tl.constexpr = C0 + C1
    R: tl.constexpr = PACK * SP
    kind = qkv_ptr.dtype.element_ty

    # Which token each row is, counted from the first image that the program sees.
    offs_r = tl.arange(0, R)
    offs_s = offs_r % SP
    NH, NW = tl.cdiv(H, WIN), tl.cdiv(W, WIN)
    first = tl.program_id(0) * PACK // (NH * NW)
    window = tl.program_id(0) * PACK - first * NH * NW + offs_r // SP
    image = window // (NH * NW)
    row = window // NW % NH * WIN + offs_s // WIN
    column = window % NW * WIN + offs_s % WIN
    is_token = offs_s < WIN * WIN
    mask_r = is_token & (first + image < B) & (row < H) & (column < W)  # else zero padding
    offs_t = ((image * H + row) * W + column) * C  # int32: PACK images have < 2**31 elements
    x_ptr += first.to(tl.int64) * H * W * C
    y_ptr += first.to(tl.int64) * H * W * C

    d0 = tl.arange(0, D0)
    mask_0 = mask_r[:, None] & (d0 < DV)[None, :]
    head0 = tl.zeros((R, D0), tl.float32)
    head1 = None
    if D1 > 0:
        d1 = D0 + tl.arange(0, D1)
        mask_1 = mask_r[:, None] & (d1 < DV)[None, :]
        head1 = tl.zeros((R, D1), tl.float32)
    if PROJECT:
        y0 = bias_rows(proj_bias_ptr, R, C0)
        if C1 > 0:
            y1 = bias_rows(proj_bias_ptr + C0, R, C1)

    for i in range(HEADS):
        # The head's input: its slice of x plus the output of the head before.
        x_i = x_ptr + offs_t[:, None] + i * DV
        x0 = (tl.load(x_i + d0[None, :], mask=mask_0, other=0.0).to(tl.float32) + head0).to(kind)
        x1 = None
        if D1 > 0:
            x1 = tl.load(x_i + d1[None, :], mask=mask_1, other=0.0).to(tl.float32)
            x1 = (x1 + head1).to(kind)

        w, b = qkv_ptr + i * (D0 + D1) * NQ, qkv_bias_ptr + i * NQ
        q = linear(x0, x1, w, NQ, bias_rows(b, R, DK), WIDE).to(kind)  # [R, DK]
        k = linear(x0, x1, w + DK, NQ, bias_rows(b + DK, R, DK), WIDE).to(kind)  # [R, DK]
        q = depthwise(
            q, dw_ptr + i * TAPS * DK, dw_bias_ptr + i * DK, tl.load(ks_ptr + i), offs_s, WIN
        )
        p = attention(q.to(kind), k, bias_ptr + i * SP * SP, PACK, SP, WIDE).to(kind)  # [R, SP]

        # p is 0 for rows that are no token, but 0 * NaN is not: their v is 0.
        w, b = w + 2 * DK, b + 2 * DK
        v = linear(x0, x1, w, NQ, bias_rows(b, R, D0), WIDE)
        head0 = apply(p, tl.where(is_token[:, None], v, 0.0).to(kind), PACK, WIDE)  # [R, D0]
        if D1 > 0:
            v = linear(x0, x1, w + D0, NQ, bias_rows(b + D0, R, D1), WIDE)
            head1 = apply(p, tl.where(is_token[:, None], v, 0.0).to(kind), PACK, WIDE)  # [R, D1]

        out0 = relu(head0).to(kind)
        out1 = None
        if D1 > 0:
            out1 = relu(head1).to(kind)
        if PROJECT:
            w = proj_ptr + i * DV * CP
            y0 = linear(out0, out1, w, CP, y0, WIDE)
            if C1 > 0:
                y1 = linear(out0, out1, w + C0, CP, y1, WIDE)
        else:
            y_i = y_ptr + offs_t[:, None] + i * DV
            tl.store(y_i + d0[None, :], out0, mask=mask_0)
            if D1 > 0:
                tl.store(y_i + d1[None, :], out1, mask=mask_1)

    if PROJECT:
        store_sum(y_ptr, x_ptr, y0, offs_t, mask_r, tl.arange(0, C0), C)
        if C1 > 0:
            store_sum(y_ptr, x_ptr, y1, offs_t, mask_r, C0 + tl.arange(0, C1), C)


@triton.jit
def store_sum(y_ptr, x_ptr, y, offs_t, mask_t, offs_c, C: tl.constexpr):
    """Stores x + y.   y [R, N] float32; offs_t [R] where a token begins, offs_c [N] channels."""
    offs = offs_t[:, None] + offs_c[None, :]
    mask = mask_t[:, None] & (offs_c < C)[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, (x + y).to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["T"])
def cga_projection_kernel(
    y_ptr,  # [T, C]
    x_ptr,  # [T, C]
    heads_ptr,  # [T, C]
    proj_ptr,  # [C + DP - DV, CP]
    proj_bias_ptr,  # [CP]
    T,
    C: tl.constexpr,
    CP: tl.constexpr,
    WIDE: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """y = x + heads @ proj + bias. One program: BT tokens x BN channels. Grid: (T / BT, C / BN)."""
    offs_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    offs_n = tl.program_id(1) * BN + tl.arange(0, BN)
    mask_t, mask_n = (offs_t < T)[:, None], (offs_n < C)[None, :]
    acc = tl.zeros((BT, BN), tl.float32)
    acc += tl.load(proj_bias_ptr + offs_n, mask=offs_n < C, other=0.0)[None, :]
    for k in range(0, C, BK):
        offs_k = k + tl.arange(0, BK)
        mask_k = offs_k < C
        heads = tl.load(
            heads_ptr + offs_t[:, None] * C + offs_k[None, :],
            mask=mask_t & mask_k[None, :],
            other=0.0,
        )  # [BT, BK]
        proj = tl.load(
            proj_ptr + offs_k[:, None] * CP + offs_n[None, :],
            mask=mask_k[:, None] & mask_n,
            other=0.0,
        )  # [BK, BN]
        acc = dot(heads, proj, acc, WIDE)
    store_sum(y_ptr, x_ptr, acc, offs_t * C, offs_t < T, offs_n, C)


class Packed(NamedTuple):
    """Matrices in the compute dtype, the rest float32; padded as the kernel's head line says."""

    ks: torch.Tensor  # [HEADS] int32
    qkv: torch.Tensor  # [HEADS, D0 + D1, 2 * DK + D0 + D1]: K-major, columns q | k | v
    qkv_bias: torch.Tensor  # [HEADS, 2 * DK + D0 + D1]
    dw: torch.Tensor  # [HEADS, TAPS, DK]
    dw_bias: torch.Tensor  # [HEADS, DK]
    bias: torch.Tensor  # [HEADS, SP, SP], -inf where a column is no token
    # K-major. A head narrower than D0 + D1 reads on into the rows of the next: its columns there
    # are 0. Zeros follow the last head.
    proj: torch.Tensor  # [C + D0 + D1 - DV, C0 + C1]
    proj_bias: torch.Tensor  # [C0 + C1]


def rows(s: Shape) -> int:
    """SP: a window's tokens padded to what a matrix product takes."""
    return max(16, triton.next_power_of_2(s.tokens))


def supports(s: Shape, dtype: torch.dtype, arch: int) -> str | None:
    """None, or one sentence: why this kernel does not run this shape there."""
    if why := refusal(dtype, arch):
        return why
    if s.tokens > 128:
        return f"triton: cga takes windows up to 11x11 tokens, this one has {s.window}x{s.window}"
    if s.dv > 128:
        return f"triton: cga takes heads up to 128 channels wide, these have {s.dv}"
    return None


def prepare(w: Weights, s: Shape, dtype: torch.dtype) -> Packed:
    """The natural weights as the kernels read them, on w's device."""
    DP, CP, SP, TAPS = sum(parts(s.dv)), sum(parts(s.C)), rows(s), max(s.ks) ** 2
    device = w.proj.device

    def padded(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    p = Packed(
        torch.tensor(s.ks, dtype=torch.int32, device=device),
        padded(s.heads, DP, 2 * s.dk + DP, dtype=dtype),
        padded(s.heads, 2 * s.dk + DP),
        padded(s.heads, TAPS, s.dk),
        padded(s.heads, s.dk),
        padded(s.heads, SP, SP),
        padded(s.C + DP - s.dv, CP, dtype=dtype),
        padded(CP),
    )
    for i, ks in enumerate(s.ks):
        NQ = 2 * s.dk + s.dv
        p.qkv[i, : s.dv, :NQ] = w.qkv[i].T
        p.qkv_bias[i, :NQ] = w.qkv_bias[i]
        p.dw[i, : ks**2] = w.dw[i].reshape(s.dk, ks**2).T
        p.dw_bias[i] = w.dw_bias[i]
        p.bias[i, :, s.tokens :] = float("-inf")
        p.bias[i, : s.tokens, : s.tokens] = w.bias[i]
    p.proj[: s.C, : s.C] = w.proj.T
    p.proj_bias[: s.C] = w.proj_bias
    return p


def scratch(s: Shape, dtype: torch.dtype, B: int, H: int, W: int) -> int:
    """Bytes: relu(heads) of every token, for PROJECT=0."""
    return cdiv(B * H * W * s.C * dtype.itemsize, 256) * 256


def CANDIDATES(s: Shape, dtype: torch.dtype) -> dict[str, list[Config]]:
    """What `evit-fast tune` tries beside the rows, per kernel."""
    packs = (1, 2, 4) if rows(s) == 16 else (1,)
    steps = (32, 64) if dtype.itemsize == 2 else (16,)
    return {
        "window": [
            window(PACK, PROJECT, warps)
            for PACK in packs
            for PROJECT in (0, 1)
            for warps in (4, 8)
            if PROJECT == 0 or s.C <= 512
        ],
        "projection": [
            projection(BT, BN, BK, 3)
            for BT, BN in ((16, 32), (32, 64), (64, 64), (128, 64))
            for BK in steps
        ],
    }


def shape_class(
    s: Shape, dtype: torch.dtype, B: int, H: int, W: int, deterministic: bool
) -> tuple[int, str, str]:
    """Key of the window kernel's rows, without its name. deterministic: never by the number of
    images.
    """
    few = B * cdiv(H, s.window) * cdiv(W, s.window) <= FEW and not deterministic
    size = next(n for n in (16, 64, 128) if rows(s) <= n)
    narrow = {16: 192, 64: 128, 128: 0}[size]
    name = f"{size} rows, C <= {narrow}" if s.C <= narrow else f"{size} rows"
    return dtype.itemsize, name, "few" if few else "many"


def plan(
    y: torch.Tensor,
    x: torch.Tensor,
    w: Packed,
    s: Shape,
    space: torch.Tensor | None = None,
    *,
    arch: int,
    deterministic: bool = False,
    config: Mapping[str, Config] | None = None,
) -> list[Launch]:
    """The launches of y = cga(x).   x, y [B, H, W, C] contiguous, any float dtype, not aliased;
    space: `scratch()` bytes.
    """
    B, H, W, C = x.shape
    if B == 0:
        return []
    dtype, config = w.qkv.dtype, config or {}
    key = shape_class(s, dtype, B, H, W, deterministic)
    row = config.get("window") or CONFIGS.row(arch, ("window", *key))
    fused = row.tiles["PROJECT"] == 1
    heads = y if fused else space[: x.numel() * dtype.itemsize].view(dtype).view(x.shape)
    D0, D1 = parts(s.dv)
    C0, C1 = parts(C)
    WIDE = INTERPRETED and dtype == torch.bfloat16
    windows = B * cdiv(H, s.window) * cdiv(W, s.window)
    launches = [
        Launch(
            cga_window_kernel,
            (cdiv(windows, row.tiles["PACK"]),),
            {
                "y_ptr": heads, "x_ptr": x,
                **{f"{name}_ptr": value for name, value in w._asdict().items()},
                "B": B, "H": H, "W": W,
            },
            {
                "C": C, "HEADS": s.heads, "DK": s.dk, "WIN": s.window, "TAPS": w.dw.shape[1],
                "SP": rows(s), "D0": D0, "D1": D1, "C0": C0, "C1": C1, "WIDE": WIDE,
            },
            row,
        )
    ]  # fmt: skip
    if not fused:
        key = ("projection", dtype.itemsize, key[-1])
        row = config.get("projection") or CONFIGS.row(arch, key)
        BT, BN = row.tiles["BT"], row.tiles["BN"]
        launches.append(
            Launch(
                cga_projection_kernel,
                (cdiv(B * H * W, BT), cdiv(C, BN)),
                {
                    "y_ptr": y, "x_ptr": x, "heads_ptr": heads, "proj_ptr": w.proj,
                    "proj_bias_ptr": w.proj_bias, "T": B * H * W,
                },
                {"C": C, "CP": C0 + C1, "WIDE": WIDE},
                row,
            )
        )  # fmt: skip
    return launches


launch = launcher(plan)
