"""Tiles of every tensor-core family on the emulator, against float64; and under the sanitizers."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch
from torch import Tensor

from evit_fast.fragments import pack_tiles
from tests.emulator.building import ORDERS, library

TILES = [
    (0, torch.float32),
    (70, torch.float16),
    (75, torch.float16),
    (80, torch.float16),
    (80, torch.bfloat16),
]
PRODUCT_ERROR = 1e-5  # float32 sums of 16 products of numbers near 1


@pytest.fixture(scope="module")
def tiles(tmp_path_factory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("tiles")
    return library(folder / "libtiles.so", "tests/emulator/tiles.cpp")


def pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("family", "dtype"), TILES, ids=lambda v: str(v).removeprefix("torch."))
def test_a_tile_multiplies(tiles, family: int, dtype: torch.dtype, order: str):
    generator = torch.Generator().manual_seed(family)
    a, b = (torch.randn(16, 16, generator=generator).to(dtype) for _ in range(2))
    y = torch.full((3, 16, 16), float("nan"))
    packed = pack_tiles(a, family, "a"), pack_tiles(b, family, "b")
    is_bf16 = int(dtype == torch.bfloat16)
    assert 0 == tiles.run_tile(family, is_bf16, *map(pointer, (y, a, b, *packed)), ORDERS[order])
    product = a.double() @ b.double().T
    assert (y[0] - product).abs().max() < PRODUCT_ERROR, "operands from shared memory"
    assert (y[1] - product).abs().max() < PRODUCT_ERROR, "packed operands"
    if family >= 75:
        again = y[0].to(dtype).double() @ b.double().T
        assert (y[2] - again).abs().max() < 10 * PRODUCT_ERROR, "an accumulator as operand"
