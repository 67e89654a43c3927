"""The eager side of every fused op, and the shapes that tests run them at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn

from evit_fast.config import VARIANTS
from evit_fast.fold import fold
from evit_fast.model import EfficientVit
from evit_fast.ops.line import LineShape
from evit_fast.program import map_arrays
from tests.randomize import randomize

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Case(NamedTuple):
    """One op of one model. `eager` takes and gives NCHW (the classifier gives logits)."""

    name: str  # M5.2: the third op of its kind with a shape of its own
    eager: Callable[[Tensor], Tensor]
    weights: NamedTuple  # of float64 tensors
    shape: LineShape
    side: int  # of its input at 224 x 224 pixels


@lru_cache(maxsize=6)
def model(name: str) -> EfficientVit:
    """A random float64 model in eval; not to be changed."""
    return randomize(EfficientVit(VARIANTS[name]).double(), seed=int(name[-1])).eval()


def eager_ops(m: EfficientVit) -> Iterator[nn.Module]:
    """The eager modules that stand for the ops of fold(m), one by one."""
    yield m.patch_embed
    for stage in m.stages:
        if not isinstance(stage.downsample, nn.Identity):
            yield stage.downsample.res1
            yield stage.downsample.patchmerge
            yield stage.downsample.res2
        for block in stage.blocks:
            yield nn.Sequential(block.dw0, block.ffn0)
            yield block.mixer
            yield nn.Sequential(block.dw1, block.ffn1)
    yield nn.Sequential(m.global_pool, m.head)


def tensors(weights: NamedTuple, dtype: torch.dtype = torch.float64) -> NamedTuple:
    """Folded weights as torch tensors."""
    return map_arrays(weights, lambda array: torch.from_numpy(array.copy()).to(dtype))


@lru_cache(maxsize=5)
def cases(op: str) -> tuple[Case, ...]:
    """Every different shape that an op has in M0 .. M5."""
    found: dict[LineShape, Case] = {}
    for name in VARIANTS:
        m, side, count = model(name), 224, 0
        for eager, (shape, weights) in zip(eager_ops(m), fold(m, MEAN, STD), strict=True):
            if shape.op == op and shape not in found:
                label = f"{name[-2:].upper()}.{count}"
                found[shape] = Case(label, eager, tensors(weights), shape, side)
                count += 1
            side = {"stem": side // 16, "patch_merge": (side + 1) // 2}.get(shape.op, side)
    return tuple(found.values())
