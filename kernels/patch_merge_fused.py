"""patch_merge in one launch: g never leaves the registers of the program that makes it.

One program makes P/Q whole images, whose maps have at most Q outputs, in a 16-bit type. First all
blocks of g and the squeezed means, then block by block the gate and y. Memory holds only x, the
weights and y. Grid images * Q/P.
"""

import triton
import triton.language as tl

from evit_fast.kernels.dot import dot
from evit_fast.kernels.patch_merge_hidden import hidden_block, image_sums, locate
from evit_fast.kernels.relu import relu


@triton.jit
def rows_times(a, w):
    """a [N, K] float32 times w [K, M], for a few rows: [N, M]."""
    return tl.sum(a[:, :, None] * w.to(tl.float32)[None, :, :], 1)


@triton.jit
def put(kept, block, i):
    """kept [N, P, BF/2] with its block i replaced by block [P, BF]: two 16-bit values a register.

    Registers have no index, so i is compared with the number of each block.
    """
    P: tl.constexpr = block.shape[0]
    BF: tl.constexpr = block.shape[1]
    low, high = tl.split(tl.reshape(block.to(tl.uint16, bitcast=True), (P, BF // 2, 2)))
    pairs = low.to(tl.uint32) | high.to(tl.uint32) << 16
    here = tl.arange(0, kept.shape[0])[:, None, None] == i
    return tl.where(here, pairs[None, :, :], kept)


@triton.jit
def take(kept, i, dtype: tl.constexpr):
    """Block i, as it was put: [P, BF]."""
    here = tl.arange(0, kept.shape[0])[:, None, None] == i
    pairs = tl.sum(tl.where(here, kept, 0), 0)
    block = tl.join((pairs & 0xFFFF).to(tl.uint16), (pairs >> 16).to(tl.uint16))
    return tl.reshape(block, (kept.shape[1], 2 * kept.shape[2])).to(dtype, bitcast=True)


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
    RP: tl.constexpr,
    COP: tl.constexpr,
    BLOCKS: tl.constexpr,
    WIDE: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    BF: tl.constexpr,
    BK: tl.constexpr,
):
    """One program: P/Q whole images. All blocks of g stay in registers."""
    dtype = w1_ptr.dtype.element_ty
    OH, OW = (H + 1) // 2, (W + 1) // 2
    image = tl.program_id(0) * (P // Q)
    slot = tl.arange(0, P)
    row, column, _, own = locate(slot, image, 0, B, H, W, OH, OW, Q)
    offs_r, offs_co = tl.arange(0, RP), tl.arange(0, COP)
    mask_r, mask_co = offs_r < R, offs_co < CO

    kept = tl.zeros((BLOCKS, P, BF // 2), tl.uint32)
    squeezed = tl.zeros((P // Q, RP), tl.float32)
    for f in range(0, F, BF):
        g = hidden_block(
            x_ptr, w1_ptr, b1_ptr, dw_ptr, dw_bias_ptr, f, image, 0, B, H, W, OH, OW, C, F,
            WIDE, P, Q, BF, BK,
        )  # fmt: skip
        kept = put(kept, g.to(dtype), f // BF)
        offs_f = f + tl.arange(0, BF)
        w = tl.load(
            se1_ptr + offs_f[:, None] * R + offs_r[None, :],
            mask=(offs_f < F)[:, None] & mask_r[None, :],
            other=0.0,
        )
        squeezed += rows_times(image_sums(g, own, P, Q, BF) / (OH * OW), w)
    squeezed = relu(squeezed + tl.load(se1_bias_ptr + offs_r, mask=mask_r, other=0.0)[None, :])
    squeezed = tl.where(mask_r[None, :], squeezed, 0.0)

    y = tl.zeros((P, COP), tl.float32)
    for f in range(0, F, BF):
        offs_f = f + tl.arange(0, BF)
        mask_f = offs_f < F
        w = tl.load(
            se2_ptr + offs_r[:, None] * F + offs_f[None, :],
            mask=mask_r[:, None] & mask_f[None, :],
            other=0.0,
        )
        gate = rows_times(squeezed, w)  # [P/Q, BF]
        gate += tl.load(se2_bias_ptr + offs_f, mask=mask_f, other=0.0)[None, :]
        gate = tl.where(mask_f[None, :], tl.sigmoid(gate), 0.0)  # 0 * Inf would be NaN
        g = tl.reshape(take(kept, f // BF, dtype).to(tl.float32), (P // Q, Q, BF))
        w = tl.load(
            w3_ptr + offs_f[:, None] * CO + offs_co[None, :],
            mask=mask_f[:, None] & mask_co[None, :],
            other=0.0,
        )
        y = dot(tl.reshape(g * gate[:, None, :], (P, BF)).to(dtype), w, y, WIDE)

    y += tl.load(b3_ptr + offs_co, mask=mask_co, other=0.0)[None, :]
    offs_y = ((slot // Q * OH + row) * OW + column) * CO
    tl.store(
        y_ptr + image.to(tl.int64) * OH * OW * CO + offs_y[:, None] + offs_co[None, :],
        y.to(y_ptr.dtype.element_ty),
        mask=own[:, None] & mask_co[None, :],
    )
