"""patch_merge in Triton: h = relu(w1 x + b1), g = relu(3x3 depthwise of stride 2 (h)), the gate of
squeeze-excite from the means of g, y = w3 (g * gate) + b3.

The tokens of a map fall in four phases, (row even | odd) x (column even | odd). An output reads its
own token of each phase, and of the odd ones the token before it, so three shifts inside a program
make the nine taps and h is computed once per token. A program has P slots for outputs, Q for each
of its P/Q images, and 4P rows of h.

Two forms, by shape class:

split   Four launches. h never leaves the SM; g is written once and read once, the channel sums are
        a by-product, so squeeze-excite reads no map.
          hidden    [P outputs, BF hidden channels] -> g, channel sums. Grid images * tiles * F/BF.
          dense     twice: sums -> squeezed -> gate, 16 images at a time. Grid images/16 * N/BN.
          project   [BT tokens, BCO channels]: w3 (g * gate) + b3. Grid tokens/BT * CO/BCO.
fused   One launch, maps of at most 64 outputs in 16-bit types: one program makes P/Q whole images,
        g [P, F] stays in registers, and only x and y are in memory. Grid images * Q/P. For
        batches with an image for every SM: one image alone would have one SM.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isqrt
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from evit_fast.kernels.dot import dot
from evit_fast.kernels.launches import INTERPRETED, Config, Launch, Table, cdiv, parts, refusal, run
from evit_fast.ops.patch_merge import Shape, Weights, out_hw

FEW = 512  # outputs: 8 programs of 64 slots for each block of hidden channels
FULL = 8192  # outputs: a fused program of 64 slots for each of some 130 SMs
SLOTS = 64  # outputs of the largest map that is one program


def _hidden(P: int, Q: int, BF: int, BK: int, warps: int, stages: int = 2) -> Config:
    return Config({"P": P, "Q": Q, "BF": BF, "BK": BK}, warps, stages)


def _dense(IB: int, BN: int, BK: int, warps: int, stages: int = 2) -> Config:
    return Config({"IB": IB, "BN": BN, "BK": BK}, warps, stages)


def _project(BT: int, BCO: int, BK: int, warps: int, stages: int = 3) -> Config:
    return Config({"BT": BT, "BCO": BCO, "BK": BK}, warps, stages)


# Key: kernel, bytes of a value, outputs of a map (at most 16, or more), outputs in all.
_ROWS = {
    ("hidden", 2, 16, "few"): _hidden(16, 16, 32, 32, 4),
    ("hidden", 2, 64, "few"): _hidden(32, 32, 32, 32, 4),
    ("hidden", 2, 16, "many"): _hidden(64, 16, 64, 32, 8),
    ("hidden", 2, 64, "many"): _hidden(64, 64, 64, 32, 8),
    ("hidden", 4, 16, "few"): _hidden(16, 16, 16, 16, 4),
    ("hidden", 4, 64, "few"): _hidden(32, 32, 16, 16, 4),
    ("hidden", 4, 16, "many"): _hidden(32, 16, 32, 16, 4),
    ("hidden", 4, 64, "many"): _hidden(64, 64, 32, 16, 8),
}
for _outputs in (16, 64):
    _ROWS |= {
        ("dense", 2, _outputs, "few"): _dense(1, 16, 128, 4),
        ("dense", 2, _outputs, "many"): _dense(16, 64, 64, 4),
        ("dense", 4, _outputs, "few"): _dense(1, 16, 64, 4),
        ("dense", 4, _outputs, "many"): _dense(16, 32, 32, 4),
        ("project", 2, _outputs, "few"): _project(16, 32, 64, 4),
        ("project", 2, _outputs, "many"): _project(64, 64, 64, 4),
        ("project", 4, _outputs, "few"): _project(16, 16, 32, 4),
        ("project", 4, _outputs, "many"): _project(32, 32, 16, 4),
    }
CONFIGS = Table(op="patch_merge", rows={80: _ROWS})


@triton.jit
def relu(x):
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def locate(slot, image, tile, B, H, W, TH, TW, Q: tl.constexpr):
    """Where a slot's output lies: image, row, column, and whether the program owns it.

    Slot q of an image is at (q // TW, q % TW) of a tile of TH x TW outputs. A tile smaller than the
    map has the row and the column before its own outputs too, for the taps that reach there.
    """
    OH, OW = (H + 1) // 2, (W + 1) // 2
    halo_y, halo_x = (TH < OH).to(tl.int32), (TW < OW).to(tl.int32)
    across = tl.cdiv(OW, TW - halo_x)
    q = slot % Q
    row = tile // across * (TH - halo_y) - halo_y + q // TW
    column = tile % across * (TW - halo_x) - halo_x + q % TW
    mask = (q < TH * TW) & (image + slot // Q < B)
    own = mask & (q // TW >= halo_y) & (q % TW >= halo_x) & (row < OH) & (column < OW)
    return row, column, mask, own


@triton.jit
def before(u, source, there):
    """u [P, N] of the slots `source` [P]; 0 where there is no such slot."""
    index = tl.broadcast_to(source[:, None], u.shape)
    return tl.where(there[:, None], tl.gather(u, index, 0), 0.0)


@triton.jit
def hidden_block(
    x_ptr,
    w1_ptr,
    b1_ptr,
    dw_ptr,
    dw_bias_ptr,
    f,
    image,
    tile,
    B,
    H,
    W,
    TH,
    TW,
    C: tl.constexpr,
    F: tl.constexpr,
    WIDE: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
):
    """g of the P slots and of hidden channels f .. f+BF: [P, BF] in float32."""
    dtype = w1_ptr.dtype.element_ty
    offs_m = tl.arange(0, 4 * P)  # rows of h: the slots of phase 0, of phase 1, ...
    row, column, mask, _ = locate(offs_m % P, image, tile, B, H, W, TH, TW, Q)
    row = 2 * row + offs_m // P // 2
    column = 2 * column + offs_m // P % 2
    mask_m = mask & (row >= 0) & (row < H) & (column >= 0) & (column < W)
    offs_x = ((offs_m % P // Q * H + row) * W + column) * C
    x_ptr += image.to(tl.int64) * H * W * C

    offs_f = f + tl.arange(0, BF)
    mask_f = offs_f < F
    h = tl.zeros((4 * P, BF), tl.float32)
    for k in range(0, C, BK):
        offs_k = k + tl.arange(0, BK)
        mask_k = offs_k < C
        x = tl.load(
            x_ptr + offs_x[:, None] + offs_k[None, :],
            mask=mask_m[:, None] & mask_k[None, :],
            other=0.0,
        )
        w = tl.load(
            w1_ptr + offs_k[:, None] * F + offs_f[None, :],
            mask=mask_k[:, None] & mask_f[None, :],
            other=0.0,
        )
        h = dot(x.to(dtype), w, h, WIDE)
    h = relu(h + tl.load(b1_ptr + offs_f, mask=mask_f, other=0.0)[None, :])
    h = tl.where(mask_m[:, None] & mask_f[None, :], h, 0.0).to(dtype)  # zeros around the map

    phases = tl.permute(tl.reshape(h, (2, 2, P, BF)), (2, 3, 1, 0))
    even, odd = tl.split(phases)  # rows, [P, BF, 2]
    h00, h01 = tl.split(even)
    h10, h11 = tl.split(odd)
    h00, h01 = h00.to(tl.float32), h01.to(tl.float32)
    h10, h11 = h10.to(tl.float32), h11.to(tl.float32)

    dw_ptr += offs_f
    w00, w01, w02, w10, w11, w12, w20, w21, w22 = (
        tl.load(dw_ptr + 0 * F, mask=mask_f, other=0.0)[None, :],
        tl.load(dw_ptr + 1 * F, mask=mask_f, other=0.0)[None, :],
        tl.load(dw_ptr + 2 * F, mask=mask_f, other=0.0)[None, :],
        tl.load(dw_ptr + 3 * F, mask=mask_f, other=0.0)[None, :],
        tl.load(dw_ptr + 4 * F, mask=mask_f, other=0.0)[None, :],
        tl.load(dw_ptr + 5 * F, mask=mask_f, other=0.0)[None, :],
        tl.load(dw_ptr + 6 * F, mask=mask_f, other=0.0)[None, :],
        tl.load(dw_ptr + 7 * F, mask=mask_f, other=0.0)[None, :],
        tl.load(dw_ptr + 8 * F, mask=mask_f, other=0.0)[None, :],
    )
    slot = tl.arange(0, P)
    has_up, has_left = slot % Q // TW > 0, slot % Q % TW > 0
    up, left = tl.where(has_up, slot - TW, slot), tl.where(has_left, slot - 1, slot)
    corner = tl.where(has_up, left - TW, left)
    g = tl.load(dw_bias_ptr + offs_f, mask=mask_f, other=0.0)[None, :]
    g = g + h00 * w11 + h01 * w12 + h10 * w21 + h11 * w22
    g += before(h01 * w10 + h11 * w20, left, has_left)
    g += before(h10 * w01 + h11 * w02, up, has_up)
    g += before(h11 * w00, corner, has_up & has_left)
    return relu(g)


@triton.jit
def image_sums(g, own, P: tl.constexpr, Q: tl.constexpr, BF: tl.constexpr):
    """The sum of every image's own slots: [P/Q, BF]."""
    return tl.sum(tl.reshape(tl.where(own[:, None], g, 0.0), (P // Q, Q, BF)), 1)


@triton.jit(do_not_specialize=["B", "H", "W", "TH", "TW"])
def hidden_kernel(
    g_ptr,  # [B, OH, OW, F]
    sums_ptr,  # [B, tiles, F] float32
    x_ptr,  # [B, H, W, C]
    w1_ptr,  # [C, F]
    b1_ptr,  # [F]
    dw_ptr,  # [9, F]
    dw_bias_ptr,  # [F]
    B,
    H,
    W,
    TH,
    TW,
    C: tl.constexpr,
    F: tl.constexpr,
    WIDE: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
):
    """One program: P slots, BF hidden channels. Neighbours share their x, in cache."""
    BLOCKS: tl.constexpr = (F + BF - 1) // BF
    OH, OW = (H + 1) // 2, (W + 1) // 2
    tiles = tl.cdiv(OH, TH - (TH < OH).to(tl.int32)) * tl.cdiv(OW, TW - (TW < OW).to(tl.int32))
    f = tl.program_id(0) % BLOCKS * BF
    tile = tl.program_id(0) // BLOCKS % tiles
    image = tl.program_id(0) // BLOCKS // tiles * (P // Q)
    g = hidden_block(
        x_ptr, w1_ptr, b1_ptr, dw_ptr, dw_bias_ptr, f, image, tile, B, H, W, TH, TW, C, F, WIDE,
        P, Q, BF, BK,
    )  # fmt: skip

    slot = tl.arange(0, P)
    row, column, _, own = locate(slot, image, tile, B, H, W, TH, TW, Q)
    offs_f = f + tl.arange(0, BF)
    mask_f = offs_f < F
    g_ptr += image.to(tl.int64) * OH * OW * F
    offs_g = ((slot // Q * OH + row) * OW + column) * F
    tl.store(
        g_ptr + offs_g[:, None] + offs_f[None, :],
        g.to(g_ptr.dtype.element_ty),
        mask=own[:, None] & mask_f[None, :],
    )
    offs_i = tl.arange(0, P // Q)
    sums_ptr += (image.to(tl.int64) * tiles + tile) * F
    tl.store(
        sums_ptr + offs_i[:, None] * tiles * F + offs_f[None, :],
        image_sums(g, own, P, Q, BF),
        mask=(image + offs_i < B)[:, None] & mask_f[None, :],
    )


@triton.jit
def rows16(a, N: tl.constexpr, BK: tl.constexpr):
    """a [N, BK] as the 16 rows that a product needs, each 16/N times."""
    return tl.reshape(tl.broadcast_to(a[:, None, :], (N, 16 // N, BK)), (16, BK))


@triton.jit(do_not_specialize=["B", "tiles", "count"])
def dense_kernel(
    out_ptr,  # [B, N]
    in_ptr,  # [B, tiles, K] float32
    w_ptr,  # [K, N]
    bias_ptr,  # [N]
    B,
    tiles,
    count,
    K: tl.constexpr,
    N: tl.constexpr,
    SIGMOID: tl.constexpr,
    WIDE: tl.constexpr,
    IB: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
):
    """act(w (sum over the tiles of in) / count + bias) of IB images and BN channels."""
    BLOCKS: tl.constexpr = (N + BN - 1) // BN
    image = (tl.program_id(0) // BLOCKS).to(tl.int64) * IB
    offs_n = tl.program_id(0) % BLOCKS * BN + tl.arange(0, BN)
    offs_i = tl.arange(0, IB)
    mask_n = offs_n < N
    in_ptr += image * tiles * K
    acc = tl.zeros((16, BN), tl.float32)
    for k in range(0, K, BK):
        offs_k = k + tl.arange(0, BK)
        mask_k = offs_k < K
        mask_a = (image + offs_i < B)[:, None] & mask_k[None, :]
        a = tl.zeros((IB, BK), tl.float32)
        for t in range(tiles):
            offs_a = (offs_i[:, None] * tiles + t) * K + offs_k[None, :]
            a += tl.load(in_ptr + offs_a, mask=mask_a, other=0.0)
        w = tl.load(
            w_ptr + offs_k[:, None] * N + offs_n[None, :],
            mask=mask_k[:, None] & mask_n[None, :],
            other=0.0,
        )
        acc = dot(rows16(a / count, IB, BK).to(w.dtype), w, acc, WIDE)
    acc += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    acc = tl.sigmoid(acc) if SIGMOID else relu(acc)
    offs_r = tl.arange(0, 16)
    first = offs_r % (16 // IB) == 0
    offs_r = offs_r // (16 // IB)
    tl.store(
        out_ptr + image * N + offs_r[:, None] * N + offs_n[None, :],
        acc.to(out_ptr.dtype.element_ty),
        mask=(first & (image + offs_r < B))[:, None] & mask_n[None, :],
    )


@triton.jit(do_not_specialize=["B", "n"])
def project_kernel(
    y_ptr,  # [B, n, CO]
    g_ptr,  # [B, n, F]
    gate_ptr,  # [B, F]
    w3_ptr,  # [F, CO]
    b3_ptr,  # [CO]
    B,
    n,
    F: tl.constexpr,
    CO: tl.constexpr,
    WIDE: tl.constexpr,
    BT: tl.constexpr,
    BCO: tl.constexpr,
    BK: tl.constexpr,
):
    """w3 (g * gate) + b3 of BT tokens, images in a row, and BCO channels."""
    BLOCKS: tl.constexpr = (CO + BCO - 1) // BCO
    t = (tl.program_id(0) // BLOCKS).to(tl.int64) * BT
    image = t // n
    offs_t = tl.arange(0, BT)
    offs_i = ((t - image * n).to(tl.int32) + offs_t) // n
    mask_t = t + offs_t < B.to(tl.int64) * n
    offs_co = tl.program_id(0) % BLOCKS * BCO + tl.arange(0, BCO)
    mask_co = offs_co < CO
    g_ptr += t * F
    gate_ptr += image * F
    acc = tl.zeros((BT, BCO), tl.float32)
    for k in range(0, F, BK):
        offs_k = k + tl.arange(0, BK)
        mask_k = offs_k < F
        mask = mask_t[:, None] & mask_k[None, :]
        g = tl.load(g_ptr + offs_t[:, None] * F + offs_k[None, :], mask=mask, other=0.0)
        gate = tl.load(gate_ptr + offs_i[:, None] * F + offs_k[None, :], mask=mask, other=0.0)
        w = tl.load(
            w3_ptr + offs_k[:, None] * CO + offs_co[None, :],
            mask=mask_k[:, None] & mask_co[None, :],
            other=0.0,
        )
        a = (g.to(tl.float32) * gate.to(tl.float32)).to(w.dtype)
        acc = dot(a, w, acc, WIDE)
    acc += tl.load(b3_ptr + offs_co, mask=mask_co, other=0.0)[None, :]
    tl.store(
        y_ptr + t * CO + offs_t[:, None] * CO + offs_co[None, :],
        acc.to(y_ptr.dtype.element_ty),
        mask=mask_t[:, None] & mask_co[None, :],
    )


@triton.jit(do_not_specialize=["B", "H", "W"])
def fused_kernel(
    y_ptr,  # [B, OH, OW, CO]
    x_ptr,  # [B, H, W, C]
    w1_ptr,  # [C, F]
    b1_ptr,  # [F]
    dw_ptr,  # [9, F]
    dw_bias_ptr,  # [F]
    se1_ptr,  # [F, R]
    se1_bias_ptr,  # [R]
    se2_ptr,  # [R, F]
    se2_bias_ptr,  # [F]
    w3_ptr,  # [F, CO]
    b3_ptr,  # [CO]
    B,
    H,
    W,
    C: tl.constexpr,
    F: tl.constexpr,
    R: tl.constexpr,
    CO: tl.constexpr,
    R0: tl.constexpr,
    R1: tl.constexpr,
    WIDE: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
    BCO: tl.constexpr,
):
    """One program: P/Q whole images. g is a tuple of [P, BF] blocks in registers."""
    BLOCKS: tl.constexpr = (F + BF - 1) // BF
    dtype = w1_ptr.dtype.element_ty
    OH, OW = (H + 1) // 2, (W + 1) // 2
    image = tl.program_id(0) * (P // Q)
    slot = tl.arange(0, P)
    row, column, _, own = locate(slot, image, 0, B, H, W, OH, OW, Q)
    offs_r0 = tl.arange(0, R0)  # R in two powers of two
    offs_r1 = R0 + tl.arange(0, R1 if R1 > 0 else 16)
    mask_r1 = offs_r1 < R

    g = ()
    squeezed0 = tl.zeros((16, R0), tl.float32)
    squeezed1 = tl.zeros((16, R1 if R1 > 0 else 16), tl.float32)
    for i in tl.static_range(BLOCKS):
        block = hidden_block(
            x_ptr, w1_ptr, b1_ptr, dw_ptr, dw_bias_ptr, i * BF, image, 0, B, H, W, OH, OW, C, F,
            WIDE, P, Q, BF, BK,
        )  # fmt: skip
        mean = rows16(image_sums(block, own, P, Q, BF) / (OH * OW), P // Q, BF).to(dtype)
        g = g + (block.to(dtype),)
        offs_f = i * BF + tl.arange(0, BF)
        mask_f = (offs_f < F)[:, None]
        at = se1_ptr + offs_f[:, None] * R
        w = tl.load(at + offs_r0[None, :], mask=mask_f, other=0.0)
        squeezed0 = dot(mean, w, squeezed0, WIDE)
        if R1 > 0:
            w = tl.load(at + offs_r1[None, :], mask=mask_f & mask_r1[None, :], other=0.0)
            squeezed1 = dot(mean, w, squeezed1, WIDE)
    squeezed0 = relu(squeezed0 + tl.load(se1_bias_ptr + offs_r0)[None, :]).to(dtype)
    if R1 > 0:
        squeezed1 += tl.load(se1_bias_ptr + offs_r1, mask=mask_r1, other=0.0)[None, :]
        squeezed1 = tl.where(mask_r1[None, :], relu(squeezed1), 0.0).to(dtype)

    gated = ()
    for i in tl.static_range(BLOCKS):
        offs_f = i * BF + tl.arange(0, BF)
        mask_f = offs_f < F
        gate = tl.zeros((16, BF), tl.float32)
        gate += tl.load(se2_bias_ptr + offs_f, mask=mask_f, other=0.0)[None, :]
        at = se2_ptr + offs_f[None, :]
        w = tl.load(at + offs_r0[:, None] * F, mask=mask_f[None, :], other=0.0)
        gate = dot(squeezed0, w, gate, WIDE)
        if R1 > 0:
            mask = mask_r1[:, None] & mask_f[None, :]
            w = tl.load(at + offs_r1[:, None] * F, mask=mask, other=0.0)
            gate = dot(squeezed1, w, gate, WIDE)
        # Row r of the gate is image r // (16 / (P/Q)), as are the slots r P/16 and after.
        block = tl.reshape(g[i].to(tl.float32), (16, P // 16, BF)) * tl.sigmoid(gate)[:, None, :]
        gated = gated + (tl.reshape(block, (P, BF)).to(dtype),)

    y_ptr += image.to(tl.int64) * OH * OW * CO
    offs_y = ((slot // Q * OH + row) * OW + column) * CO
    for co in range(0, CO, BCO):
        offs_co = co + tl.arange(0, BCO)
        mask_co = offs_co < CO
        acc = tl.zeros((P, BCO), tl.float32)
        for i in tl.static_range(BLOCKS):
            offs_f = i * BF + tl.arange(0, BF)
            mask = (offs_f < F)[:, None] & mask_co[None, :]
            w = tl.load(w3_ptr + offs_f[:, None] * CO + offs_co[None, :], mask=mask, other=0.0)
            acc = dot(gated[i], w, acc, WIDE)
        acc += tl.load(b3_ptr + offs_co, mask=mask_co, other=0.0)[None, :]
        tl.store(
            y_ptr + offs_y[:, None] + offs_co[None, :],
            acc.to(y_ptr.dtype.element_ty),
            mask=own[:, None] & mask_co[None, :],
        )


class Packed(NamedTuple):
    """The weights, input channels first: a block of output channels is contiguous."""

    w1: torch.Tensor  # [C, F]
    b1: torch.Tensor  # [F] float32
    dw: torch.Tensor  # [9, F] float32
    dw_bias: torch.Tensor  # [F] float32
    se1: torch.Tensor  # [F, R]
    se1_bias: torch.Tensor  # [R] float32
    se2: torch.Tensor  # [R, F]
    se2_bias: torch.Tensor  # [F] float32
    w3: torch.Tensor  # [F, CO]
    b3: torch.Tensor  # [CO] float32


class Parts(NamedTuple):
    """What the split form keeps in memory between its launches."""

    g: torch.Tensor  # [B, OH, OW, F]
    gate: torch.Tensor  # [B, F]
    sums: torch.Tensor  # [B, tiles, F] float32
    squeezed: torch.Tensor  # [B, R] float32


def shape_class(
    s: Shape, dtype: torch.dtype, B: int, H: int, W: int, deterministic: bool
) -> tuple[int, int, str]:
    """The key of the rows, without the kernel. deterministic: never by the number of images."""
    OH, OW = out_hw(H, W)
    outputs = 16 if OH * OW <= 16 else 64
    few = B * OH * OW <= FEW and not deterministic
    return dtype.itemsize, outputs, "few" if few else "many"


def tile(Q: int, H: int, W: int) -> tuple[int, int, int]:
    """Rows and columns of the outputs that one program sees of an image, and tiles in an image.

    The whole map where Q slots hold it; else whole rows where they hold two; else a square.
    """
    OH, OW = out_hw(H, W)
    TW = OW if 2 * OW <= Q else min(OW, Q // min(OH, isqrt(Q)))
    TH = min(OH, Q // TW)
    return TH, TW, cdiv(OH, TH - (TH < OH)) * cdiv(OW, TW - (TW < OW))


def supports(s: Shape, dtype: torch.dtype, arch: int) -> str | None:
    """None, or why the op does not run so."""
    return refusal(dtype, arch)


def prepare(w: Weights, s: Shape, dtype: torch.dtype) -> Packed:
    """Weights in the kernels' layout, matrices in `dtype`, the rest float32."""
    matrix = {k: getattr(w, k).to(dtype).T.contiguous() for k in ("w1", "se1", "se2", "w3")}
    bias = {k: getattr(w, k).float() for k in ("b1", "dw_bias", "se1_bias", "se2_bias", "b3")}
    return Packed(**matrix, **bias, dw=w.dw.float().reshape(s.F, 9).T.contiguous())


def _sizes(s: Shape, dtype: torch.dtype, B: int, H: int, W: int, tiles: int) -> Parts:
    """Bytes of each of the parts, multiples of 256."""
    OH, OW = out_hw(H, W)
    counts = (B * OH * OW * s.F, B * s.F, B * tiles * s.F, B * s.R)
    itemsizes = (dtype.itemsize, dtype.itemsize, 4, 4)
    return Parts(*(cdiv(n * size, 256) * 256 for n, size in zip(counts, itemsizes, strict=True)))


def scratch(s: Shape, dtype: torch.dtype, B: int, H: int, W: int) -> int:
    """Bytes of the split form, enough for any row and candidate of these sizes."""
    Q = min(c.tiles["Q"] for c in _hidden_configs(s, dtype, H, W))
    return sum(_sizes(s, dtype, B, H, W, tile(Q, H, W)[2]))


def _hidden_configs(s: Shape, dtype: torch.dtype, H: int, W: int) -> list[Config]:
    """Every row and candidate that a map of H x W can lead to."""
    outputs = 16 if (n := out_hw(H, W))[0] * n[1] <= 16 else 64
    rows = [
        table["hidden", dtype.itemsize, outputs, b]
        for table in CONFIGS.rows.values()
        for b in ("few", "many")
    ]
    return rows + CANDIDATES(s, dtype)["hidden"]


def CANDIDATES(s: Shape, dtype: torch.dtype) -> dict[str, list[Config]]:
    """What `evit-fast tune` tries beside the rows, per kernel."""
    return {"hidden": [], "dense": [], "project": [], "fused": []}


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
    """x [B, H, W, C], y [B, ceil(H/2), ceil(W/2), CO] of any float dtype, contiguous; space:
    scratch() bytes. config: rows to replace, by kernel; with `fused` the form is fused.
    """
    B, H, W, _ = x.shape
    if B * H * W == 0:
        return []
    dtype = w.w1.dtype
    key, config = shape_class(s, dtype, B, H, W, deterministic), config or {}
    if "fused" in config:
        return [_fused(y, x, w, s, config["fused"])]
    row = {k: config.get(k) or CONFIGS.row(arch, (k, *key)) for k in ("hidden", "dense", "project")}
    return _split(y, x, w, s, space, row)


def _wide(dtype: torch.dtype) -> dict[str, bool]:
    return {"WIDE": INTERPRETED and dtype == torch.bfloat16}


def _fused(y: torch.Tensor, x: torch.Tensor, w: Packed, s: Shape, row: Config) -> Launch:
    B, H, W, _ = x.shape
    R0, R1 = parts(s.R)
    weights = {f"{k}_ptr": v for k, v in w._asdict().items()}
    return Launch(
        fused_kernel,
        (cdiv(B * row.tiles["Q"], row.tiles["P"]),),
        {"y_ptr": y, "x_ptr": x} | weights | {"B": B, "H": H, "W": W},
        {"C": s.C, "F": s.F, "R": s.R, "CO": s.CO, "R0": R0, "R1": R1} | _wide(w.w1.dtype),
        row,
    )


def _split(
    y: torch.Tensor,
    x: torch.Tensor,
    w: Packed,
    s: Shape,
    space: torch.Tensor,
    row: Mapping[str, Config],
) -> list[Launch]:
    B, H, W, _ = x.shape
    dtype, wide = w.w1.dtype, _wide(w.w1.dtype)
    hidden, dense, project = (row[k].tiles for k in ("hidden", "dense", "project"))
    TH, TW, tiles = tile(hidden["Q"], H, W)
    n = y.shape[1] * y.shape[2]
    sizes = _sizes(s, dtype, B, H, W, tiles)
    ends = torch.tensor(sizes).cumsum(0).tolist()
    part = Parts(*(space[end - size : end] for size, end in zip(sizes, ends, strict=True)))
    g, gate = part.g.view(dtype), part.gate.view(dtype)
    sums, squeezed = part.sums.view(torch.float32), part.squeezed.view(torch.float32)
    groups = cdiv(B * hidden["Q"], hidden["P"])
    images = cdiv(B, dense["IB"])
    return [
        Launch(
            hidden_kernel,
            (groups * tiles * cdiv(s.F, hidden["BF"]),),
            {"g_ptr": g, "sums_ptr": sums, "x_ptr": x, "w1_ptr": w.w1, "b1_ptr": w.b1}
            | {"dw_ptr": w.dw, "dw_bias_ptr": w.dw_bias, "B": B, "H": H, "W": W}
            | {"TH": TH, "TW": TW},
            {"C": s.C, "F": s.F} | wide,
            row["hidden"],
        ),
        Launch(
            dense_kernel,
            (images * cdiv(s.R, dense["BN"]),),
            {"out_ptr": squeezed, "in_ptr": sums, "w_ptr": w.se1, "bias_ptr": w.se1_bias}
            | {"B": B, "tiles": tiles, "count": n},
            {"K": s.F, "N": s.R, "SIGMOID": False} | wide,
            row["dense"],
        ),
        Launch(
            dense_kernel,
            (images * cdiv(s.F, dense["BN"]),),
            {"out_ptr": gate, "in_ptr": squeezed, "w_ptr": w.se2, "bias_ptr": w.se2_bias}
            | {"B": B, "tiles": 1, "count": 1},
            {"K": s.R, "N": s.F, "SIGMOID": True} | wide,
            row["dense"],
        ),
        Launch(
            project_kernel,
            (cdiv(B * n, project["BT"]) * cdiv(s.CO, project["BCO"]),),
            {"y_ptr": y, "g_ptr": g, "gate_ptr": gate, "w3_ptr": w.w3, "b3_ptr": w.b3}
            | {"B": B, "n": n},
            {"F": s.F, "CO": s.CO} | wide,
            row["project"],
        ),
    ]


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
    """Launches `plan` on the current stream."""
    run(plan(y, x, w, s, space, arch=arch, deterministic=deterministic, config=config))
