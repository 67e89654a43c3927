"""One op of the CUDA column as launches on poisoned buffers, next to its float64 reference."""

from __future__ import annotations

from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from evit_fast.cuda.kernels import Launch, family
from evit_fast.ops import OPS
from evit_fast.ops.line import LineShape
from evit_fast.program import map_arrays
from tests.close import assert_close, budget, relative_error
from tests.emulator.building import emulate

CANARY = 77
EDGE = 64  # elements on either side of a buffer

TARGETS = {
    "sm_70-f16": (70, torch.float16),
    "sm_80-f16": (80, torch.float16),
    "sm_75-f16": (75, torch.float16),
    "sm_80-bf16": (80, torch.bfloat16),
    "f32": (70, torch.float32),
}
USUAL = ("sm_70-f16", "sm_80-f16")  # of `make test`; the others are marked full


class Planned(NamedTuple):
    """y, space: the buffers of `launches`; *_whole: the same with canaries on both sides."""

    launches: list[Launch]
    y: Tensor
    space: Tensor
    y_whole: Tensor
    space_whole: Tensor


class Run(NamedTuple):
    y: Tensor
    want: Tensor
    s: LineShape
    w: NamedTuple
    x: Tensor
    dtype: torch.dtype


def targets(usual: tuple[str, ...] = USUAL) -> list:
    return [
        pytest.param(*target, id=name, marks=() if name in usual else pytest.mark.full)
        for name, target in TARGETS.items()
    ]


def module(s: LineShape) -> ModuleType:
    """The op's file of the CUDA column."""
    return import_module(f"evit_fast.cuda.{s.op}")


def output_shape(s: LineShape, x: Tensor) -> tuple[int, ...]:
    H, W = x.shape[2:] if s.op == "stem" else x.shape[1:3]
    return (x.shape[0], *OPS[s.op].out_hw(H, W), s.channels_out)


def guarded(count: int, dtype: torch.dtype, fill: float, edge: int = EDGE) -> tuple[Tensor, Tensor]:
    """(`count` elements full of `fill`, the same with canaries on both sides)."""
    whole = torch.full((count + 2 * edge,), CANARY, dtype=dtype)
    inside = whole[edge : edge + count]
    inside.fill_(fill)
    return inside, whole


def plan(
    s: LineShape,
    w: NamedTuple,
    x: Tensor,
    arch: int,
    dtype: torch.dtype,
    *,
    deterministic: bool = False,
    y_dtype: torch.dtype | None = None,
    edge: int = EDGE,
) -> Planned:
    """Launches of one op: x in its own dtype; y and scratch poisoned with NaN.

    edge: canaries on either side; 0 where a sanitizer is to see the end.
    """
    cuda, shape = module(s), output_shape(s, x)
    assert cuda.supports(s, dtype, arch) is None
    packed = cuda.prepare(map_arrays(w, lambda a: a.float()), s, dtype, family(arch, dtype))
    if y_dtype is None:
        y_dtype = x.dtype if x.is_floating_point() else dtype
    y, y_whole = guarded(torch.Size(shape).numel(), y_dtype, float("nan"), edge)
    H, W = x.shape[2:] if s.op == "stem" else x.shape[1:3]
    scratch = cuda.scratch(s, dtype, x.shape[0], H, W)
    space, space_whole = guarded(scratch, torch.uint8, 255, edge)
    y = y.view(shape)
    launches = cuda.plan(y, x, packed, s, space, arch=arch, deterministic=deterministic)
    return Planned(launches, y, space, y_whole, space_whole)


def run(
    s: LineShape,
    w: NamedTuple,
    x: Tensor,
    arch: int,
    dtype: torch.dtype,
    *,
    order: str = "ascending",
    **options,
) -> Run:
    """One op on the emulator; nothing is written outside its buffers. options: of plan()."""
    p = plan(s, w, x, arch, dtype, **options)
    emulate(p.launches, order, seed=1)
    for whole in (p.y_whole, p.space_whole):
        assert (whole[:EDGE] == CANARY).all() and (whole[-EDGE:] == CANARY).all(), "out of bounds"
    return Run(p.y, reference(s, w, x), s, w, x, dtype)


def reference(s: LineShape, w: NamedTuple, x: Tensor) -> Tensor:
    return OPS[s.op].reference(x.double() if x.is_floating_point() else x, w, s)


def check(r: Run) -> None:
    """Within the budget of the dtype; eager's own error in it counts where it is the larger."""
    floor, eager = budget(r.dtype), 0.0
    if not relative_error(r.y, r.want) <= floor:
        weights = map_arrays(r.w, lambda a: a.to(r.dtype))
        x = r.x.to(r.dtype) if r.x.is_floating_point() else r.x
        eager = relative_error(OPS[r.s.op].reference(x, weights, r.s), r.want)
    assert_close(r.y, r.want, budget(r.dtype, eager), f"{r.s.op} {tuple(r.x.shape)}")
