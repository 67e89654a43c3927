"""What both forms of patch_merge do first: g = relu(3x3 depthwise of stride 2 (relu(w1 x + b1))).

The tokens of a map fall in four phases, (row even | odd) x (column even | odd). An output reads its
own token of each phase, and of the odd ones the token before it too, so h is computed once per
token and three shifts inside a program make the nine taps.

A program has P slots for outputs, Q of them for each of its P/Q images, and 4P rows of h.
"""

import triton
import triton.language as tl

from evit_fast.kernels.dot import dot
from evit_fast.kernels.relu import relu


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
def tap(h, dw_ptr, row, column, offs_f, F: tl.constexpr):
    """h [P, BF] times one of the nine weights of its channels, in float32."""
    w = tl.load(dw_ptr + (3 * row + column) * F + offs_f, mask=offs_f < F, other=0.0)
    return h.to(tl.float32) * w[None, :]


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
    slot = tl.arange(0, P)
    has_up, has_left = slot % Q // TW > 0, slot % Q % TW > 0
    up, left = tl.where(has_up, slot - TW, slot), tl.where(has_left, slot - 1, slot)
    corner = tl.where(has_up, left - TW, left)
    # Of the kernel, row and column 1 meet the even tokens, 0 the odd ones before, 2 the odd after.
    g = tap(h11, dw_ptr, 0, 0, offs_f, F)
    g = before(g, corner, has_up & has_left)
    g += before(
        tap(h01, dw_ptr, 1, 0, offs_f, F) + tap(h11, dw_ptr, 2, 0, offs_f, F), left, has_left
    )
    g += before(tap(h10, dw_ptr, 0, 1, offs_f, F) + tap(h11, dw_ptr, 0, 2, offs_f, F), up, has_up)
    g += tap(h00, dw_ptr, 1, 1, offs_f, F) + tap(h01, dw_ptr, 1, 2, offs_f, F)
    g += tap(h10, dw_ptr, 2, 1, offs_f, F) + tap(h11, dw_ptr, 2, 2, offs_f, F)
    g += tl.load(dw_bias_ptr + offs_f, mask=mask_f, other=0.0)[None, :]
    return relu(g)


@triton.jit
def image_sums(g, own, P: tl.constexpr, Q: tl.constexpr, BF: tl.constexpr):
    """The sum of every image's own slots: [P/Q, BF]."""
    return tl.sum(tl.reshape(tl.where(own[:, None], g, 0.0), (P // Q, Q, BF)), 1)
