"""Blocks per SM against cases counted by hand from the architectures' limits."""

from __future__ import annotations

import pytest

from evit_fast.cuda.occupancy import CARDS, blocks_per_sm


@pytest.mark.parametrize(
    ("arch", "registers", "shared", "threads", "blocks"),
    [
        (70, 32, 0, 256, 8),  # 64 warps
        (70, 255, 0, 128, 2),  # 2 warps of 8192 registers in a quarter
        (70, 168, 0, 128, 3),  # 5376 a warp: 3 in a quarter
        (70, 168, 0, 256, 1),  # 12 warps
        (70, 129, 0, 128, 3),  # 4352 a warp, in units of 256: 3 in a quarter
        (70, 128, 0, 128, 4),
        (70, 144, 0, 64, 6),  # 4608 a warp: 3 in a quarter, though 14 in all would fit
        (70, 32, 48 << 10, 128, 2),
        (70, 32, (48 << 10) + 1, 128, 1),
        (70, 16, 0, 32, 32),  # the most blocks
        (75, 16, 0, 32, 16),
        (70, 32, 97 << 10, 128, 0),
        (80, 32, 81 << 10, 128, 2),  # 1 KiB each is the driver's
        (80, 32, 82 << 10, 128, 1),
        (86, 32, 0, 512, 3),  # 48 warps
        (89, 32, 49 << 10, 128, 2),
        (90, 32, 227 << 10, 128, 1),
        (120, 255, 0, 256, 1),
    ],
)
def test_by_hand(arch, registers, shared, threads, blocks):
    assert blocks_per_sm(arch, registers, shared, threads) == blocks


@pytest.mark.parametrize("arch", CARDS)
def test_more_of_anything_never_means_more_blocks(arch):
    before = 99
    for registers in range(16, 256, 8):
        now = blocks_per_sm(arch, registers, 0, 128)
        assert 0 < now <= before
        before = now
    counts = [blocks_per_sm(arch, 64, kib << 10, 128) for kib in range(230)]
    assert counts == sorted(counts, reverse=True)


def test_limits_are_those_of_the_programming_guide():
    limits = {arch: card.shared_limit >> 10 for arch, card in CARDS.items()}
    assert limits == {70: 96, 75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
