"""The inverted residual with squeeze-excite that halves the map, into the stage it is named by."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def modules(m: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    for number, stage in enumerate(m.stages, 1):
        if not isinstance(stage.downsample, nn.Identity):
            yield number, stage.downsample.patchmerge
