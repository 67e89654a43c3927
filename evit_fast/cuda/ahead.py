"""Every kernel that forwards of a model take on an architecture; needs no weights and no card."""

from __future__ import annotations

import dataclasses
from functools import lru_cache

import torch

from evit_fast.config import Config
from evit_fast.cuda import column
from evit_fast.cuda.kernels import Kernel
from evit_fast.model_ops import meta_weights, model_ops
from evit_fast.ops.line import LineShape


def kernels_of_model(
    config: Config, dtype: torch.dtype, arch: int, num_classes: int = 1000
) -> tuple[list[Kernel], list[str]]:
    """(kernels, why an op has none) for any batch and size, deterministic or not; images are
    uint8, float32 or of `dtype`, the result float32 or of `dtype`.
    """
    kernels: dict[Kernel, None] = {}
    refused: dict[str, None] = {}
    for s, _ in model_ops(config):
        if s.op == "classifier":
            s = dataclasses.replace(s, N=num_classes)
        found, why = _kernels(s, dtype, arch)
        kernels.update(dict.fromkeys(found))
        if why:
            refused[why] = None
    return list(kernels), list(refused)


@lru_cache(maxsize=1024)
def _kernels(s: LineShape, dtype: torch.dtype, arch: int) -> tuple[list[Kernel], str]:
    try:
        op = column.kernels(s.op, arch)
    except ModuleNotFoundError:
        return [], f"cuda: this version has no kernel for {s.op}"
    if why := op.supports(s, dtype, arch):
        return [], why
    weights = op.prepare(meta_weights(s, dtype), s, dtype)
    xs = (torch.uint8, torch.float32, dtype) if s.op == "stem" else (dtype,)
    ys = (torch.float32, dtype) if s.op == "classifier" else (dtype,)
    found = (
        kernel
        for x in xs
        for y in ys
        for deterministic in (False, True)
        for kernel in op.possible(weights, s, dtype, x, y, deterministic)
    )
    return list(dict.fromkeys(found)), ""
