"""Every op that M0 .. M5 have, with its shape and map, and its tensors without memory: what the
compile tests and the models of cards go through.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from evit_fast import _native, program
from evit_fast.config import VARIANTS, Config
from evit_fast.ops import OPS, cga, classifier, dw_ffn, patch_merge, stem
from evit_fast.ops.line import LineShape

IMAGE, CLASSES = 224, 1000


def model_ops(config: Config, image: int = IMAGE) -> Iterator[tuple[LineShape, int]]:
    """(shape, side of its input map) of every op of a model, in order."""
    yield stem.Shape(3, config.embed_dim[0]), image
    side, _ = stem.out_hw(image, image)
    stages = zip(config.embed_dim, config.depth, config.num_heads, strict=True)
    before = None
    for C, depth, heads in stages:
        if before:
            yield dw_ffn.Shape(before, 2 * before), side
            yield patch_merge.Shape(before, 4 * before, before, C), side
            side, _ = patch_merge.out_hw(side, side)
            yield dw_ffn.Shape(C, 2 * C), side
        for _ in range(depth):
            yield dw_ffn.Shape(C, 2 * C), side
            ks = config.kernels[:heads]
            yield cga.Shape(C, heads, config.key_dim, min(config.window, side), ks), side
            yield dw_ffn.Shape(C, 2 * C), side
        before = C
    yield classifier.Shape(before, CLASSES), side


def shapes(op: str) -> list[tuple[LineShape, int]]:
    """Every different (shape, side of its input map) that an op has in M0 .. M5."""
    found = (o for config in VARIANTS.values() for o in model_ops(config) if o[0].op == op)
    return list(dict.fromkeys(found))


def meta_weights(s: LineShape, dtype: torch.dtype) -> NamedTuple:
    """The op's Weights on the meta device, in the dtypes of a file."""
    line = s.line(0, dtype)
    blob = torch.empty(_native.op_bytes(line), dtype=torch.uint8, device="meta")
    return program.unpack(program.parse(line)[0], blob)


def meta_maps(
    s: LineShape, dtype: torch.dtype, B: int, H: int, W: int, x_dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, x) on the meta device. x_dtype: of the input, dtype unless given; the output has it too
    (uint8: dtype).
    """
    x_dtype = x_dtype or dtype
    y_dtype = dtype if x_dtype == torch.uint8 else x_dtype
    x_shape = (B, s.channels_in, H, W) if s.op == "stem" else (B, H, W, s.channels_in)
    y_shape = (B, *OPS[s.op].out_hw(H, W), s.channels_out)
    x = torch.empty(x_shape, dtype=x_dtype, device="meta")
    return torch.empty(y_shape, dtype=y_dtype, device="meta"), x


def meta_space(nbytes: int) -> torch.Tensor | None:
    return torch.empty(nbytes, dtype=torch.uint8, device="meta") if nbytes else None
