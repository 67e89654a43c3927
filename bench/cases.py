"""The shapes of each op in M0..M5, with random weights, from the specs in `bench/ops/`."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from evit_fast import _native
from evit_fast.bench.weights import randomize
from evit_fast.config import VARIANTS
from evit_fast.fold import fold
from evit_fast.model import create_model
from evit_fast.ops import OPS
from evit_fast.ops.line import LineShape, pack

IMAGE = 224


class Case(NamedTuple):
    """One op at one shape; `name` is the model and stage where it is met first: M5.2, or M5."""

    op: str
    name: str
    shape: LineShape
    weights: NamedTuple  # float64 arrays
    eager: nn.Module  # float32, eval; takes NCHW
    side: int  # of the input map (stem: image)


@lru_cache(maxsize=6)
def _model(name: str) -> nn.Module:
    return randomize(create_model(name), seed=int(name[-1])).eval()


def cases(op: str, models: Sequence[str] = tuple(VARIANTS)) -> list[Case]:
    """Every different shape (with its map size) of `op` in `models`, in their order."""
    spec = importlib.import_module(f"evit_fast.bench.ops.{op}")
    found: dict[tuple[LineShape, int], Case] = {}
    for name in models:
        m, side, of_op = _model(name), IMAGE, []
        for shape, weights in fold(m, (0.0,), (1.0,)):
            if shape.op == op:
                of_op.append((shape, weights, side))
            if hw := OPS[shape.op].out_hw(side, side):
                side = hw[0]
        for (stage, eager), (shape, weights, at) in zip(spec.modules(m), of_op, strict=True):
            label = f"{name[-2:].upper()}" + (f".{stage}" if stage else "")
            found.setdefault((shape, at), Case(op, label, shape, weights, eager, at))
    return list(found.values())


def cost(case: Case, batch: int) -> tuple[int, int]:
    """(floating-point operations, fewest bytes) of one call."""
    return OPS[case.op].cost(case.shape, batch, case.side, case.side, torch.float32)


def images(case: Case, batch: int) -> torch.Tensor:
    """Random input, NCHW."""
    g = torch.Generator().manual_seed(0)
    return torch.randn(batch, case.shape.channels_in, case.side, case.side, generator=g)


class Native:
    """One op in the native library, buffers and all: a call runs it once."""

    def __init__(self, case: Case, x: torch.Tensor, threads: int = 1) -> None:
        line = case.shape.line()
        self.blob = torch.zeros(_native.op_bytes(line), dtype=torch.uint8)
        pack(line, case.weights, self.blob)
        self.model = _native.Model(line, self.blob.data_ptr(), self.blob.numel())
        self.x = x if case.op == "stem" else x.permute(0, 2, 3, 1).contiguous()
        B, side = x.shape[0], case.side
        self.y = torch.empty(self.model.output_shape(B, side, side))
        nbytes = self.model.workspace_bytes(B, side, side, threads)
        self.workspace = torch.empty(nbytes + 64, dtype=torch.uint8)
        start = -(-self.workspace.data_ptr() // 64) * 64
        self.arguments = (
            self.x.data_ptr(), "float32", list(self.x.shape), list(self.x.stride()),
            self.y.data_ptr(), start, nbytes, threads,
        )  # fmt: skip

    def __call__(self) -> None:
        self.model.run(*self.arguments)

    def output(self) -> np.ndarray:
        """NCHW, or logits: what eager gives."""
        y = self.y.permute(0, 3, 1, 2) if self.y.dim() == 4 else self.y
        return y.numpy()


def in_double(case: Case, x: torch.Tensor) -> Any:
    """Eager's output in float64."""
    import copy

    with torch.inference_mode():
        return copy.deepcopy(case.eager).double()(x.double()).numpy()
