"""Buffers that show what a kernel wrote: NaN inside, canaries on both sides."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

CANARY, POISON = 0x5A, 0xFF  # bytes; every float of bytes 0xFF is NaN
EDGE = 512  # bytes on either side


class Guarded:
    """`tensor` [shape] of NaN."""

    def __init__(self, shape: Sequence[int], dtype: torch.dtype) -> None:
        nbytes = math.prod(shape) * dtype.itemsize
        self.whole = torch.full((nbytes + 2 * EDGE,), CANARY, dtype=torch.uint8)
        inside = self.whole[EDGE : EDGE + nbytes]
        inside.fill_(POISON)
        self.tensor = inside.view(dtype).view(tuple(shape))

    def check(self, what: str) -> None:
        for edge in (self.whole[:EDGE], self.whole[-EDGE:]):
            assert (edge == CANARY).all(), f"{what}: written outside {tuple(self.tensor.shape)}"
