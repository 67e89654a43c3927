"""Average pool, BN and linear layer."""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


def modules(m: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    yield 0, nn.Sequential(m.global_pool, m.head)
