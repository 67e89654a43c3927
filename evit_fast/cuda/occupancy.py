"""What an SM holds, by architecture, and how many blocks of a kernel fit on one.

Limits: CUDA C++ Programming Guide, "Technical Specifications per Compute Capability". Registers are
handed out per warp in units of 256, and a warp's lie in one of the four quarters of the SM; from
sm_80 the driver keeps 1 KiB of shared memory per block.
"""

from __future__ import annotations

from typing import NamedTuple

QUARTERS, REGISTERS_OF_QUARTER, REGISTER_UNIT = 4, 16384, 256


class Card(NamedTuple):
    """shared: bytes of an SM; shared_limit: bytes that one block may ask for."""

    warps: int
    blocks: int
    shared: int
    shared_limit: int
    shared_unit: int
    shared_kept: int  # by the driver, per block


def _card(warps: int, blocks: int, shared: int, limit: int, unit: int, kept: int) -> Card:
    return Card(warps, blocks, shared << 10, limit << 10, unit, kept << 10)


CARDS = {
    70: _card(64, 32, 96, 96, 256, 0),
    75: _card(32, 16, 64, 64, 256, 0),
    80: _card(64, 32, 164, 163, 128, 1),
    86: _card(48, 16, 100, 99, 128, 1),
    89: _card(48, 24, 100, 99, 128, 1),
    90: _card(64, 32, 228, 227, 128, 1),
    100: _card(64, 32, 228, 227, 128, 1),
    120: _card(48, 24, 100, 99, 128, 1),
}


def blocks_per_sm(arch: int, registers: int, shared_bytes: int, threads: int) -> int:
    """Blocks that an SM runs at once; 0 where not even one fits. registers: per thread."""
    card = CARDS[arch]
    if shared_bytes > card.shared_limit:
        return 0
    warps = -(-threads // 32)
    of_warp = _round_up(registers * 32, REGISTER_UNIT)
    by_registers = REGISTERS_OF_QUARTER // of_warp * QUARTERS // warps if of_warp else card.blocks
    taken = _round_up(shared_bytes, card.shared_unit) + card.shared_kept
    by_shared = card.shared // taken if taken else card.blocks
    return min(card.blocks, card.warps // warps, by_registers, by_shared)


def _round_up(n: int, unit: int) -> int:
    return -(-n // unit) * unit
