"""The CUDA column as the walker sees it: one op's kernels, and runs of ops as one native call.

An op's module evit_fast/cuda/<op>.py says what to launch; here its launches get their functions
and become `_native.CudaLaunches`, in which a tensor is a distance from the run's y, x or workspace.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import torch

from evit_fast import _native
from evit_fast.cuda import modules
from evit_fast.cuda.kernels import Kernel, Launch, family
from evit_fast.ops import OPS
from evit_fast.ops.line import LineShape

CONSTANT, Y, X, SPACE = range(4)  # bases of _native.CudaLaunches

# Maps of 1 to 3.2 million tokens, at which an op is asked for its launches: its config goes by
# their number, and whatever it can be is compiled at the first call. No later size compiles more.
BATCHES = (1, 4, 16, 64, 256, 1024)
SIDES = (1, 4, 14, 56)
STEM_STRIDE = 16


@lru_cache(maxsize=64)
def kernels(op: str, arch: int) -> Kernels:
    """ImportError: this version has no CUDA kernel of the op."""
    return Kernels(op, arch)


class Kernels:
    """The kernels of one op on one architecture."""

    def __init__(self, op: str, arch: int) -> None:
        self.op, self.arch = op, arch
        self.module = importlib.import_module(f"evit_fast.cuda.{op}")

    def supports(self, s: LineShape, dtype: torch.dtype, arch: int) -> str | None:
        """None, or why the op does not run so."""
        return self.module.supports(s, dtype, arch)

    def prepare(self, w: NamedTuple, s: LineShape, dtype: torch.dtype) -> Any:
        """The natural weights in the kernels' layout, on w's device."""
        return self.module.prepare(w, s, dtype, family(self.arch, dtype))

    def scratch(self, s: LineShape, dtype: torch.dtype, B: int, H: int, W: int) -> int:
        """Bytes of the workspace, a multiple of 256."""
        return self.module.scratch(s, dtype, B, H, W)

    def plan(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        w: Any,
        s: LineShape,
        space: torch.Tensor | None = None,
        *,
        arch: int,
        deterministic: bool = False,
    ) -> list[Launch]:
        return self.module.plan(y, x, w, s, space, arch=arch, deterministic=deterministic)

    def possible(
        self,
        w: Any,
        s: LineShape,
        dtype: torch.dtype,
        x_dtype: torch.dtype,
        y_dtype: torch.dtype,
        deterministic: bool,
    ) -> list[Kernel]:
        """Every kernel that some batch and size takes. w: prepared, on any device (meta too)."""
        found = {}
        for B, side in ((B, side) for B in BATCHES for side in SIDES):
            side *= STEM_STRIDE if self.op == "stem" else 1
            C, hw = s.channels_in, OPS[self.op].out_hw(side, side)
            shape = (B, C, side, side) if self.op == "stem" else (B, side, side, C)
            x = torch.empty(shape, dtype=x_dtype, device="meta")
            y = torch.empty((B, *hw, s.channels_out), dtype=y_dtype, device="meta")
            nbytes = self.scratch(s, dtype, B, side, side)
            space = torch.empty(nbytes, dtype=torch.uint8, device="meta") if nbytes else None
            plan = self.plan(y, x, w, s, space, arch=self.arch, deterministic=deterministic)
            found.update((launch.kernel, None) for launch in plan)
        return list(found)


def assemble(
    launches: Sequence[Launch],
    y: torch.Tensor,
    x: torch.Tensor,
    space: torch.Tensor,
    arch: int,
    load: bool = True,
) -> _native.CudaLaunches:
    """Launches in a row as one native object, for run(stream, y, x, space) at any addresses of
    tensors laid out as these. load=False: RuntimeError where a kernel is not on the device.
    """
    device = x.device.index or 0
    made = _native.CudaLaunches(modules.context(device))
    # What lies in the workspace is counted from there, be it this run's y or x.
    starts = {_storage(t): (base, t.data_ptr()) for base, t in ((X, x), (Y, y), (SPACE, space))}
    for launch in launches:
        kernel = launch.kernel
        words, bases = zip(*_words(launch.words, starts), strict=True)
        made.add(
            modules.function(kernel, arch, device, load),
            kernel.name,
            kernel.sizes,
            kernel.family,
            words,
            bases,
            launch.B,
            launch.H,
            launch.W,
        )
    return made


def _storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _words(
    words: Iterable[torch.Tensor | int | None], starts: dict[int, tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    for word in words:
        if isinstance(word, torch.Tensor):
            base, start = starts.get(_storage(word), (CONSTANT, 0))
            yield word.data_ptr() - start, base
        else:
            yield word or 0, CONSTANT


def standalone(launches: Sequence[Launch], arch: int, device: torch.device) -> _native.CudaLaunches:
    """Launches on the tensors that they name, for run(stream, 0, 0, 0): to measure them."""
    nothing = torch.empty(0, device=device)
    return assemble(launches, nothing, nothing, nothing, arch)
