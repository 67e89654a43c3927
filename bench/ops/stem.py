"""The four strided convolutions with their BN and ReLU; input NCHW float32, 224 x 224."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def modules(m: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    yield 0, m.patch_embed
