"""Weights in the order in which a tensor core takes them: what a GPU's upload repacks to.

A matrix becomes tiles of 16 x 16 numbers. In a tile the numbers of one lane lie next to each other,
so that a warp loads a tile as 512 bytes in a row (csrc/cuda/tile_*.cuh, load_packed_a and _b).
"""

from __future__ import annotations

import torch

FAMILIES = (70, 75, 80)  # of tensor cores; 0 is float32, without
TILE = 16

# Column c of a tile holds row COLUMNS[c] of the matrix: a lane then owns four neighbouring ones.
COLUMNS = [c & 1 | (c >> 1 & 1) << 2 | (c >> 2 & 1) << 3 | (c >> 3 & 1) << 1 for c in range(TILE)]


_newest = FAMILIES[-1]


def use_tiles(newest: int) -> None:
    """From now on float16 takes no tiles newer than these: a later card runs them too, slowly, and
    verifies them. For a process that has not used the CUDA column yet.
    """
    global _newest
    _newest = newest


def family(arch: int, dtype: torch.dtype) -> int:
    """The tile family: 70 for sm_70, 75 for sm_75, 80 from sm_80; 0 for float32 anywhere."""
    if dtype == torch.float32:
        return 0
    latest = _newest if dtype == torch.float16 else FAMILIES[-1]
    return max(f for f in FAMILIES if f <= min(arch, latest))


def pack_tiles(matrix: torch.Tensor, family: int, operand: str) -> torch.Tensor:
    """[R, K], R and K multiples of 16 -> [R/16, K/16, 256].

    operand: "a" or "b", the side of the product that the matrix takes (b: R are its columns).
    """
    R, K = matrix.shape
    tiles = matrix.reshape(R // TILE, TILE, K // TILE, TILE).transpose(1, 2)  # [.., row, k]
    if operand == "b" and family:
        tiles = tiles[:, :, COLUMNS]
    packed = torch.empty(
        R // TILE, K // TILE, TILE * TILE, dtype=matrix.dtype, device=matrix.device
    )
    packed[:, :, _places(family).to(matrix.device)] = tiles.flatten(2)
    return packed


def _places(family: int) -> torch.Tensor:
    """Where the numbers (row, k) of a tile lie in a packed one.   [256]"""
    row, k = torch.meshgrid(torch.arange(TILE), torch.arange(TILE), indexing="ij")
    if family == 0:
        places = row * TILE + k
    elif family == 70:  # a lane's row, in two halves of eight k
        places = k // 8 * 128 + row * 8 + k % 8
    else:  # a lane's four k of rows r and r + 8
        places = (row % 8 * 4 + k // 4) * 8 + row // 8 * 4 + k % 4
    return places.flatten()
