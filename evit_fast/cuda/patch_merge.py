"""patch_merge in CUDA (csrc/cuda/patch_merge.cuh): weights as its kernels read them, its launches.

Two forms: `whole`, one launch in which a block makes whole images, and `split`, four launches over
tiles. By shape, architecture, map and number of images; see WHOLE and HIDDEN.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import torch

from evit_fast.cuda.kernels import KINDS, Kernel, Launch, family, refusal
from evit_fast.fragments import TILE, pack_tiles
from evit_fast.ops.patch_merge import Shape, Weights, out_hw

SHARED_KIB = {70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}  # of a block
SM_KIB = {70: 96, 75: 64, 80: 164, 86: 100, 89: 100, 90: 228, 100: 228, 120: 100}  # of all blocks
RESERVED = 1024  # bytes of a block's shared memory that CUDA keeps, from sm_80
DENSE_KIB = 48  # of a block of squeeze or excite
FEW_IMAGES = 64  # of the whole form: fewer blocks leave half of 108 to 148 SMs idle


class Packed(NamedTuple):
    w1: torch.Tensor  # [F / 16, C / 16, 256]
    b1: torch.Tensor  # [F] float32
    dw: torch.Tensor  # [9, F] float32
    dw_bias: torch.Tensor  # [F] float32
    se1: torch.Tensor  # [R, F]
    se1_bias: torch.Tensor  # [R] float32
    se2: torch.Tensor  # [F, R]
    se2_bias: torch.Tensor  # [F] float32
    w3: torch.Tensor  # [CO / 16, F / 16, 256]
    b3: torch.Tensor  # [CO] float32


class Whole(NamedTuple):
    """Rows of x at once, hidden channels of a step, warps, images of a block, outputs of a map at
    most, and blocks that the compiler keeps registers free for on an SM.
    """

    tokens: int
    hidden: int
    warps: int
    images: int
    outputs: int
    blocks_per_sm: int


class Hidden(NamedTuple):
    """As Whole; images: of a tile at most; steps of a block."""

    tokens: int
    hidden: int
    warps: int
    images: int
    steps: int
    blocks_per_sm: int


class Dense(NamedTuple):
    """Squeeze and excite: images of a block, rows of the matrix of a warp."""

    images: int
    lines: int


class Project(NamedTuple):
    """Outputs of a block, its warps, and blocks that share the output channels."""

    rows: int
    warps: int
    split: int


class Split(NamedTuple):
    hidden: Hidden
    squeeze: Dense
    excite: Dense
    project: Project


# The whole form, by outputs of a map (49: 14 x 14 tokens, 16: 7 x 7) and hidden channels: the first
# row whose block fits, `blocks_per_sm` times, in the shared memory of the architecture. From
# counts, registers and shared memory; no card was at hand. Which row a model's shape takes in 16
# bits, by KiB of a block:
#
#   outputs, F   64 (sm_75)  96, 99 (sm_70, 86, 89, 120)  163 (sm_80)   227 (sm_90, 100)
#   49, 256      80 rows     two images                   two blocks    two blocks
#   49, 512-576  split       split                        two images    two blocks
#   49, 768      split       split                        one image     two images
#   16, 256      two images  two images                   two blocks    two blocks
#   16, 512-576  one image   two images                   two images    two blocks
#   16, 768-960  split       one image                    two images    two images
#   16, 1024-    split       one image                    two images    two images
#
#   112 rows    half a map of 14 x 14, its halo included, or two of 7 x 7.
#   two blocks  on an SM: one multiplies while the other convolves or waits for the weights of
#               squeeze-excite.
#   two images  of a block: w3, se1 and se2 are read once for both; of 7 x 7 w1 too, and 98 of 112
#               rows have work where one map has 49 of 64. With 64 channels a step four of the
#               eight warps multiply (one a scheduler, seven sums each), all eight do the rest.
#   80 rows     a quarter of a map, for 64 KiB. Wider maps have no such row: F=512 would fit in 96
#               KiB so, but read w1 four times (1.0 MB from L2 an image, the split form 0.6 MB and
#               0.1 MB of g) and multiply 320 rows an image, the split form 224.
NARROW = 256  # hidden channels
WHOLE = {
    "49, narrow": (
        Whole(112, 64, 4, 1, 49, 2),
        Whole(112, 64, 8, 2, 49, 1),
        Whole(112, 128, 8, 1, 49, 1),
        Whole(80, 64, 4, 1, 49, 1),
    ),
    "49": (
        Whole(112, 64, 4, 1, 49, 2),
        Whole(112, 64, 8, 2, 49, 1),
        Whole(112, 128, 8, 1, 49, 1),
        Whole(112, 64, 8, 1, 49, 1),
    ),
    "16": (
        Whole(112, 64, 4, 2, 16, 2),
        Whole(112, 128, 8, 2, 16, 1),
        Whole(112, 64, 8, 2, 16, 1),
        Whole(64, 64, 8, 2, 16, 1),  # one map a tile
        Whole(64, 64, 4, 1, 16, 1),
    ),
}

# The hidden stage of the split form: the first row whose block fits. A map of 14 x 14 is two tiles
# of 112 rows, four of 80, seven of 48; one of 7 x 7 fits in 64. few: tiles and steps are spread
# over the SMs. many: a block keeps its x for several steps.
HIDDEN = {
    "few": (
        Hidden(80, 64, 4, 1, 1, 1),
        Hidden(48, 64, 4, 1, 1, 1),
        Hidden(16, 64, 4, 1, 1, 1),
    ),
    "few, small": (
        Hidden(64, 32, 4, 1, 1, 1),
        Hidden(32, 32, 4, 1, 1, 1),
        Hidden(16, 32, 4, 1, 1, 1),
    ),
    "many": (
        Hidden(112, 64, 4, 2, 4, 2),
        Hidden(112, 64, 4, 2, 4, 1),
        Hidden(48, 64, 4, 2, 4, 1),
        Hidden(16, 64, 4, 1, 4, 1),
    ),
}


def shared_kib(arch: int) -> int:
    """KiB of shared memory that a block may have; those of the nearest lower architecture."""
    return SHARED_KIB[max(a for a in SHARED_KIB if a <= arch)]


def fits(wanted: int, blocks: int, arch: int) -> bool:
    """Whether so many blocks of `wanted` bytes fit on an SM."""
    sm = SM_KIB[max(a for a in SM_KIB if a <= arch)]
    reserved = RESERVED if arch >= 80 else 0
    return wanted <= shared_kib(arch) * 1024 and blocks * (wanted + reserved) <= sm * 1024


def row_stride(family: int, n: int) -> int:
    """row_stride() of csrc/cuda/launch.cuh."""
    if family == 0:
        return n + (36 - n % 32) % 32
    return n + 8 if family == 70 else n if n % 32 == 16 else n + 16


def shared_bytes(s: Shape, c: Whole | Hidden, family: int) -> int:
    """Shared memory of a block of either: patch_merge_memory()."""
    number = 2 if family else 4
    g_row = row_stride(family, s.F) * number
    tile_images = 1 if isinstance(c, Whole) and c.outputs > 16 else c.images
    sums = tile_images * c.warps * 512
    tile = c.tokens * (row_stride(family, s.C) + row_stride(family, c.hidden)) * number + sums
    if isinstance(c, Hidden):
        return tile
    rows = c.images * c.outputs
    return max(rows * g_row + tile + c.images * (s.F + s.R) * 4, -(-rows // TILE) * TILE * g_row)


def fit(n: int, most: int) -> int:
    """patch_merge_fit(): outputs of a side of n tokens for which `most` tokens are enough."""
    outputs = (n + 1) // 2
    half = (outputs + 1) // 2
    if n <= most:
        return outputs
    if max(2 * half, n - 2 * half + 1) <= most:
        return half
    whole = (most - 1) // 2
    return 0 if whole < 1 else -(-outputs // -(-outputs // whole))


def tiles(tokens: int, H: int, W: int) -> int:
    """Tiles of a map: patch_merge_tiling()."""
    if H * W <= tokens:
        return 1
    OH, OW = out_hw(H, W)
    rows, columns = fit(H, tokens // W), OW
    if rows < 2:
        side = 3
        while (side + 2) ** 2 <= tokens:
            side += 2
        rows, columns = fit(H, side), fit(W, tokens // min(H, side))
    return -(-OH // rows) * -(-OW // columns)


@lru_cache(maxsize=1024)
def whole_config(s: Shape, family: int, arch: int, H: int, W: int) -> Whole | None:
    """The row of the whole form for a map; None where it does not fit on chip."""
    OH, OW = out_hw(H, W)
    key = "16" if OH * OW <= 16 else "49, narrow" if s.F <= NARROW else "49"
    for row in WHOLE[key]:
        if OH * OW <= row.outputs and fits(shared_bytes(s, row, family), row.blocks_per_sm, arch):
            return row
    return None


@lru_cache(maxsize=1024)
def split_config(s: Shape, family: int, arch: int, few: bool, outputs: int) -> Split | None:
    """The rows of the split form; None where no block of the hidden stage fits.

    outputs: of a map.
    """
    rows = HIDDEN["many" if not few else "few" if outputs > 16 else "few, small"]
    for hidden in rows:
        if fits(shared_bytes(s, hidden, family), hidden.blocks_per_sm, arch):
            break
    else:
        return None
    if few:  # a warp has one tile of columns, two rows of a matrix
        return Split(hidden, Dense(1, 2), Dense(1, 4), Project(16, 4, -(-s.CO // (4 * TILE))))
    # Weights are read once for eight images; for one where eight vectors need more than 48 KiB.
    squeeze, excite = (Dense(8 if 8 * K * 4 <= DENSE_KIB * 1024 else 1, 4) for K in (s.F, s.R))
    # At most 6 tiles of sums a warp on sm_70, and in float32: 32 outputs a block; 12 on the others.
    narrow = family in (0, 70)
    split = -(-s.CO // (4 * 6 * TILE))  # of the 4 columns of warps
    return Split(hidden, squeeze, excite, Project(32 if narrow else 64, 8, split))


def whole_form(
    s: Shape, family: int, arch: int, B: int, H: int, W: int, deterministic: bool
) -> Whole | None:
    """The row of the whole form where it is the one to take. deterministic: never by B."""
    row = whole_config(s, family, arch, H, W)
    enough = row is not None and (deterministic or B >= FEW_IMAGES * row.images)
    return row if enough else None


def split_form(
    s: Shape, family: int, arch: int, B: int, H: int, W: int, deterministic: bool
) -> Split:
    OH, OW = out_hw(H, W)
    few = not deterministic and B * tiles(112, H, W) <= 16  # blocks that share a step's weights
    return split_config(s, family, arch, few, OH * OW)


def supports(s: Shape, dtype: torch.dtype, arch: int) -> str | None:
    """None, or why the op does not run so."""
    if why := refusal(dtype, arch):
        return why
    tile_family = family(arch, dtype)
    for few, outputs in ((True, 16), (True, 49), (False, 49)):
        if split_config(s, tile_family, arch, few, outputs) is None:
            return (
                f"cuda: patch_merge keeps 16 tokens of C channels in shared memory; C={s.C} in "
                f"{str(dtype)[6:]} is more than the {shared_kib(arch)} KiB of sm_{arch}"
            )
    return None


def prepare(w: Weights, s: Shape, dtype: torch.dtype, family: int) -> Packed:
    """The natural weights in the kernels' layout, on w's device."""
    return Packed(
        w1=pack_tiles(w.w1.to(dtype), family, "b"),
        b1=w.b1.float().contiguous(),
        dw=w.dw.reshape(s.F, 9).T.float().contiguous(),
        dw_bias=w.dw_bias.float().contiguous(),
        se1=w.se1.to(dtype).contiguous(),
        se1_bias=w.se1_bias.float().contiguous(),
        se2=w.se2.to(dtype).contiguous(),
        se2_bias=w.se2_bias.float().contiguous(),
        w3=pack_tiles(w.w3.to(dtype), family, "b"),
        b3=w.b3.float().contiguous(),
    )


class Parts(NamedTuple):
    """Bytes, or the tensors, that the split form keeps in memory between its launches."""

    g: int | torch.Tensor  # [B, OH, OW, F]
    sums: int | torch.Tensor  # [B, tiles, F] float32
    squeezed: int | torch.Tensor  # [B, R] float32
    gate: int | torch.Tensor  # [B, F] float32


def _parts(s: Shape, dtype: torch.dtype, B: int, H: int, W: int, tokens: int) -> Parts:
    """Bytes of each, multiples of 256."""
    OH, OW = out_hw(H, W)
    counts = (OH * OW * s.F, tiles(tokens, H, W) * s.F, s.R, s.F)
    sizes = (dtype.itemsize, 4, 4, 4)
    return Parts(*(-(-B * n * size // 256) * 256 for n, size in zip(counts, sizes, strict=True)))


def split_bytes(s: Shape, dtype: torch.dtype, B: int, H: int, W: int, form: Split) -> int:
    """Bytes of the split form in these rows."""
    return sum(_parts(s, dtype, B, H, W, form.hidden.tokens))


def scratch(s: Shape, dtype: torch.dtype, B: int, H: int, W: int) -> int:
    """Bytes of the split form on any architecture, a multiple of 256; 0 where none takes it."""
    most = 0
    for arch in SHARED_KIB:
        if supports(s, dtype, arch) is not None:
            continue
        for deterministic in (False, True):
            where = (s, family(arch, dtype), arch, B, H, W, deterministic)
            if whole_form(*where) is None:
                most = max(most, split_bytes(s, dtype, B, H, W, split_form(*where)))
    return most


def sizes(
    s: Shape,
    x: int,
    y: int,
    *,
    tile: Whole | Hidden | None = None,
    dense: Dense | None = None,
    project: Project | None = None,
) -> tuple[int, ...]:
    """The fields of PatchMergeSizes. A kernel's hold no row but its own, so that two configs that
    share a stage compile it once. x, y: kinds of numbers.
    """
    shape = (s.C, s.F, s.R, s.CO)
    steps = tile.steps if isinstance(tile, Hidden) else 1
    outputs = tile.outputs if isinstance(tile, Whole) else 1
    tokens, hidden, warps, images = tile[:4] if tile else (16, 16, 4, 1)
    rows, warps, split = project or (16, warps, 1)
    blocks = tile.blocks_per_sm if tile else 1
    return (
        *shape, tokens, hidden, warps, images, outputs, steps, *(dense or (1, 1)), rows, split,
        blocks, x, y,
    )  # fmt: skip


def plan(
    y: torch.Tensor,
    x: torch.Tensor,
    w: Packed,
    s: Shape,
    space: torch.Tensor | None,
    *,
    arch: int,
    deterministic: bool = False,
    form: Whole | Split | None = None,
) -> list[Launch]:
    """x [B, H, W, C], y [B, ceil(H/2), ceil(W/2), CO] contiguous, float32, float16 or bfloat16;
    space: scratch() bytes. form: rows to take in place of the tables'.
    """
    B, H, W, _ = x.shape
    if x.numel() == 0:
        return []
    dtype = w.w1.dtype
    where = (s, family(arch, dtype), arch, B, H, W, deterministic)
    form = form or whole_form(*where) or split_form(*where)
    if isinstance(form, Whole):
        numbers = sizes(s, KINDS[x.dtype], KINDS[y.dtype], tile=form)
        whole = Kernel("patch_merge", "whole", numbers, dtype, where[1])
        return [Launch(whole, (y, x, *w, B, H, W), B, H, W)]
    return list(_split(y, x, w, s, space, form, where[1]))


def _split(
    y: torch.Tensor,
    x: torch.Tensor,
    w: Packed,
    s: Shape,
    space: torch.Tensor,
    form: Split,
    tile_family: int,
) -> Iterator[Launch]:
    B, H, W, _ = x.shape
    OH, OW = out_hw(H, W)
    dtype, own = w.w1.dtype, KINDS[w.w1.dtype]
    counts = _parts(s, dtype, B, H, W, form.hidden.tokens)
    part = Parts(*space[: sum(counts)].split(counts))
    n = tiles(form.hidden.tokens, H, W)

    def launch(stage: str, numbers: tuple[int, ...], *words: torch.Tensor | int) -> Launch:
        return Launch(Kernel("patch_merge", stage, numbers, dtype, tile_family), words, B, H, W)

    yield launch(
        "hidden", sizes(s, KINDS[x.dtype], own, tile=form.hidden), part.g, part.sums, x, w.w1, w.b1,
        w.dw, w.dw_bias, B, H, W,
    )  # fmt: skip
    yield launch(
        "squeeze", sizes(s, own, own, dense=form.squeeze), part.squeezed, part.sums, w.se1,
        w.se1_bias, B, n, OH * OW,
    )  # fmt: skip
    yield launch(
        "excite", sizes(s, own, own, dense=form.excite), part.gate, part.squeezed, w.se2,
        w.se2_bias, B, 1, 1,
    )  # fmt: skip
    yield launch(
        "project", sizes(s, own, KINDS[y.dtype], project=form.project), y, part.g, part.gate, w.w3,
        w.b3, B, OH * OW,
    )  # fmt: skip
