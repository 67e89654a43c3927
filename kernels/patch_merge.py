"""patch_merge in Triton: h = relu(w1 x + b1), g = relu(3x3 depthwise of stride 2 (h)), the gate of
squeeze-excite from the means of g, y = w3 (g * gate) + b3.

Two forms, by shape class:

split   Four launches. h never leaves the SM; g is written once and read once, the channel sums are
        a by-product, so squeeze-excite makes no pass over a map.
          hidden    [P outputs, BF hidden channels] -> g, channel sums. Grid images * tiles * F/BF.
          dense     twice: sums -> squeezed -> gate, IB images at a time. Grid images/IB * N/BN.
          project   [BT tokens, BCO channels]: w3 (g * gate) + b3. Grid tokens/BT * CO/BCO.
fused   One launch, g stays in registers (patch_merge_fused.py). Small maps and widths, in batches
        that have an image for every SM: one program makes a whole image.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from math import isqrt
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from evit_fast.kernels.dot import dot
from evit_fast.kernels.launches import INTERPRETED, Config, Launch, Table, cdiv, launcher, refusal
from evit_fast.kernels.patch_merge_fused import fused_kernel
from evit_fast.kernels.patch_merge_hidden import hidden_block, image_sums, locate
from evit_fast.kernels.relu import relu
from evit_fast.ops.patch_merge import Shape, Weights, out_hw

FEW = 512  # outputs: 8 programs of 64 slots for each block of hidden channels
FULL = 8192  # outputs: a fused program of 64 slots for each of some 130 SMs
SLOTS = 64  # outputs of the largest map that is one program
MIN_Q = 16  # of any row or candidate: scratch() does not know the architecture
KERNELS = ("hidden", "dense", "project")
FUSED_F, FUSED_CO = 256, 128  # hidden and output channels that the fused row is for


def _hidden(P: int, Q: int, BF: int, BK: int, warps: int, stages: int) -> Config:
    return Config({"P": P, "Q": Q, "BF": BF, "BK": BK}, warps, stages)


def _dense(IB: int, BN: int, BK: int, warps: int, stages: int) -> Config:
    return Config({"IB": IB, "BN": BN, "BK": BK}, warps, stages)


def _project(BT: int, BCO: int, BK: int, warps: int, stages: int) -> Config:
    return Config({"BT": BT, "BCO": BCO, "BK": BK}, warps, stages)


# Key: kernel, bytes of a value, outputs of a map (at most 16, or more), outputs of the batch.
# hidden, many: every block of BF channels reads all of x again, so BF=64; with 8 warps instead of
#   16 it takes 186 registers (sm_80), and 8 warps are all that an SM then holds.
# fused: F=256 only. Every program reads every weight, and x once per block, so its reads from L2
#   grow with C F. By count, not by a clock, an image of M0's first merge reads 0.36 MB from L2
#   against 0.23 MB of the split form, which moves 87 KB through memory instead of 37; of M5's first
#   merge 3.1 MB against 1.8 MB, 104 KB instead of 253. And registers end there: 254 a thread at
#   F=256, some bytes of stack at F=512, hundreds at F=768 (sm_80).
_ROWS = {
    ("hidden", 2, 16, "few"): _hidden(16, 16, 32, 32, 4, 4),
    ("hidden", 2, 64, "few"): _hidden(32, 32, 32, 32, 4, 4),
    ("hidden", 2, 16, "many"): _hidden(64, 16, 64, 32, 16, 3),
    ("hidden", 2, 64, "many"): _hidden(64, 64, 64, 32, 16, 3),
    ("hidden", 4, 16, "few"): _hidden(16, 16, 16, 16, 4, 3),
    ("hidden", 4, 64, "few"): _hidden(32, 32, 16, 16, 4, 3),
    ("hidden", 4, 16, "many"): _hidden(32, 16, 32, 16, 4, 3),
    ("hidden", 4, 64, "many"): _hidden(64, 64, 32, 16, 8, 3),
    ("fused", 2, 16, "full"): _hidden(64, 16, 32, 32, 8, 2),
    ("fused", 2, 64, "full"): _hidden(64, 64, 32, 32, 8, 2),
}
for _outputs in (16, 64):
    _ROWS |= {
        ("dense", 2, _outputs, "few"): _dense(1, 16, 128, 4, 3),
        ("dense", 2, _outputs, "many"): _dense(16, 64, 64, 4, 3),
        ("dense", 4, _outputs, "few"): _dense(1, 16, 64, 4, 3),
        ("dense", 4, _outputs, "many"): _dense(16, 32, 32, 4, 3),
        ("project", 2, _outputs, "few"): _project(16, 32, 64, 4, 3),
        ("project", 2, _outputs, "many"): _project(128, 64, 32, 8, 3),
        ("project", 4, _outputs, "few"): _project(16, 16, 32, 4, 3),
        ("project", 4, _outputs, "many"): _project(32, 32, 16, 4, 3),
    }
# sm_100: 16 warps get no tcgen05 instruction, and 8 with BF=64 take 173 registers; ptxas keeps the
#   float32 dense to 48 registers there and spills two with longer blocks.
_ROWS_100 = _ROWS | {
    ("hidden", 2, 16, "many"): _hidden(64, 16, 32, 32, 8, 3),
    ("hidden", 2, 64, "many"): _hidden(64, 64, 32, 32, 8, 3),
}
for _outputs in (16, 64):
    _ROWS_100 |= {
        ("dense", 4, _outputs, "few"): _dense(1, 16, 32, 4, 3),
        ("dense", 4, _outputs, "many"): _dense(16, 32, 16, 4, 3),
    }
CONFIGS = Table(op="patch_merge", rows={80: _ROWS, 100: _ROWS_100})


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
    acc, scale = tl.zeros((16, BN), tl.float32), 1.0 / count
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
        acc = dot(rows16(a * scale, IB, BK).to(w.dtype), w, acc, WIDE)
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
    """The key of the rows, without the kernel; "full" is the fused form. deterministic: never by
    the number of images.
    """
    OH, OW = out_hw(H, W)
    n = OH * OW
    number = "many"
    if not deterministic and B * n <= FEW:
        number = "few"
    fits = dtype.itemsize == 2 and n <= SLOTS and s.F <= FUSED_F and s.CO <= FUSED_CO
    if not deterministic and B * n >= FULL and fits:
        number = "full"
    return dtype.itemsize, 16 if n <= 16 else 64, number


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
    """Bytes of the split form, enough for any row and candidate."""
    return sum(_sizes(s, dtype, B, H, W, tile(MIN_Q, H, W)[2]))


def CANDIDATES(s: Shape, dtype: torch.dtype) -> dict[str, list[Config]]:
    """What `evit-fast tune` tries, per kernel. The fused ones need a map of at most Q outputs."""
    rows = {k: v for k, v in _ROWS.items() if k[1] == dtype.itemsize}
    found = {k: [row for key, row in rows.items() if key[0] == k] for k in KERNELS}
    found["fused"] = []
    if dtype.itemsize == 2:
        found["hidden"] += [_hidden(64, 64, 32, 32, 8, 3), _hidden(32, 16, 64, 32, 4, 4)]
        found["project"] += [_project(64, 64, 32, 4, 3)]
        if s.F <= 2 * FUSED_F and s.CO <= 2 * FUSED_CO:
            found["fused"] = [_hidden(64, Q, BF, 32, 8, 2) for Q in (16, 64) for BF in (16, 32)]
    return {k: [c for i, c in enumerate(v) if c not in v[:i]] for k, v in found.items()}


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
    if "fused" in config or key[-1] == "full":
        row = config.get("fused") or CONFIGS.row(arch, ("fused", *key))
        if y.shape[1] * y.shape[2] > row.tiles["Q"]:
            raise ValueError(
                f"patch_merge: a fused program has Q={row.tiles['Q']} slots for an image, a map of "
                f"{H}x{W} has more outputs; use the split form"
            )
        return [_fused(y, x, w, s, row)]
    row = {k: config.get(k) or CONFIGS.row(arch, (k, *key)) for k in KERNELS}
    return _split(y, x, w, s, space, row)


def _wide(dtype: torch.dtype) -> dict[str, bool]:
    return {"WIDE": INTERPRETED and dtype == torch.bfloat16}


def _fused(y: torch.Tensor, x: torch.Tensor, w: Packed, s: Shape, row: Config) -> Launch:
    B, H, W, _ = x.shape
    weights = {f"{k}_ptr": v for k, v in w._asdict().items()}
    power = triton.next_power_of_2
    return Launch(
        fused_kernel,
        (cdiv(B * row.tiles["Q"], row.tiles["P"]),),
        {"y_ptr": y, "x_ptr": x} | weights | {"B": B, "H": H, "W": W},
        {"C": s.C, "F": s.F, "R": s.R, "CO": s.CO, "RP": power(s.R), "COP": power(s.CO)}
        | {"BLOCKS": power(cdiv(s.F, row.tiles["BF"]))}
        | _wide(w.w1.dtype),
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
    hidden, dense, project = (row[k].tiles for k in KERNELS)
    TH, TW, tiles = tile(hidden["Q"], H, W)
    n = y.shape[1] * y.shape[2]
    sizes = _sizes(s, dtype, B, H, W, tiles)
    ends = list(itertools.accumulate(sizes))
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


launch = launcher(plan)
