"""Cascaded group attention with its residual: windows, heads, projection."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def modules(m: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    for number, stage in enumerate(m.stages, 1):
        for block in stage.blocks:
            yield number, block.mixer
