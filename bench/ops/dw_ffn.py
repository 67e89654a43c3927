"""A depthwise residual and the feed-forward residual behind it: three convolutions with BN, two
additions. Those around a patch_merge have the shape of the stage on their side."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def modules(m: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    for number, stage in enumerate(m.stages, 1):
        if not isinstance(stage.downsample, nn.Identity):
            yield number - 1, stage.downsample.res1
            yield number, stage.downsample.res2
        for block in stage.blocks:
            yield number, nn.Sequential(block.dw0, block.ffn0)
            yield number, nn.Sequential(block.dw1, block.ffn1)
