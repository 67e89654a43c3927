"""One program whose weights are on a GPU: where its maps lie in the workspace, and its launches.

Triton's ops are launched one by one. CUDA's in a row are one native call, prepared at the first
input of its shape, strides and dtype, which is also when their kernels are compiled and loaded.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from evit_fast import _native, gpu
from evit_fast import program as programs
from evit_fast.cuda import column as cuda
from evit_fast.cuda import modules

LAYOUTS_KEPT = 256  # per program
ALIGNMENT = 256  # in the workspace; torch gives memory on a device at least as aligned


class Step(NamedTuple):
    """One op with its weights as its column reads them."""

    op: programs.Op
    module: Any
    weights: Any


class Stretch(NamedTuple):
    """Steps start..stop of a program in one go: one of any column, or CUDA's in a row."""

    start: int
    stop: int
    native: bool


def _stretches(steps: tuple[Step, ...]) -> tuple[Stretch, ...]:
    found: list[Stretch] = []
    for i, step in enumerate(steps):
        native = isinstance(step.module, cuda.Kernels)
        start = found.pop().start if native and found and found[-1].native else i
        found.append(Stretch(start, i + 1, native))
    return tuple(found)


class Map(NamedTuple):
    """Where one op writes: shape, and bytes of the workspace for the map (None: it writes the
    result, which lies elsewhere) and for scratch (None: it needs none).
    """

    shape: tuple[int, ...]
    at: slice | None
    scratch: slice | None


class Layout(NamedTuple):
    """Bytes of a workspace, and one Map per op."""

    nbytes: int
    maps: tuple[Map, ...]


class Walk:
    """A program whose weights are on the device."""

    def __init__(self, program: str, steps: tuple[Step, ...], arch: int) -> None:
        self.program = program
        self.steps = steps
        self.arch = arch
        self._stretches = _stretches(steps)
        self._layouts: dict[tuple[int, ...], Layout] = {}
        self._prepared: dict[tuple, _native.CudaLaunches] = {}

    def layout(self, x_shape: tuple[int, ...]) -> Layout:
        found = self._layouts.get(x_shape)
        if found is None:
            if len(self._layouts) >= LAYOUTS_KEPT:
                self._layouts.clear()
            found = self._layouts[x_shape] = self._lay_out(x_shape)
        return found

    def _lay_out(self, x_shape: tuple[int, ...]) -> Layout:
        shapes, nbytes, scratch = [], [], []
        for step, (op, shape, out) in zip(
            self.steps, programs.walk(self.program, x_shape), strict=True
        ):
            H, W = shape[2:] if op.name == "stem" else shape[1:3]
            shapes.append(tuple(out))
            nbytes.append(torch.Size(out).numel() * op.dtype.itemsize)
            scratch.append(step.module.scratch(op.shape, op.dtype, shape[0], H, W))
        nbytes.pop()  # the result
        odd = _aligned(max(nbytes[::2], default=0))  # begin of the maps with odd numbers
        end = odd + _aligned(max(nbytes[1::2], default=0))
        places = [slice(odd * (i % 2), odd * (i % 2) + n) for i, n in enumerate(nbytes)]
        spaces = [slice(end, end + n) if n else None for n in scratch]
        maps = map(Map, shapes, [*places, None], spaces)
        return Layout(end + _aligned(max(scratch)), tuple(maps))

    def buffers(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A result for x in x's dtype (uint8: float32), and a workspace; nothing is in them."""
        nbytes, maps = self.layout(tuple(x.shape))
        dtype = x.dtype if x.is_floating_point() else torch.float32
        y = torch.empty(maps[-1].shape, dtype=dtype, device=x.device)
        return y, torch.empty(nbytes, dtype=torch.uint8, device=x.device)

    def launch(
        self, y: torch.Tensor, x: torch.Tensor, space: torch.Tensor, deterministic: bool
    ) -> None:
        """Every op, on the current stream of the current device. y never shares memory with x."""
        maps = self.layout(tuple(x.shape)).maps
        first = x
        for stretch in self._stretches:
            out = self._map(stretch.stop - 1, maps, y, space)
            if stretch.native:
                key = (stretch.start, first.shape, x.stride(), x.dtype, out.dtype, deterministic)
                known = self._prepared.get(key)
                if known is None:
                    known = self._prepare(stretch, maps, out, x, space, deterministic)
                    if len(self._prepared) >= LAYOUTS_KEPT:
                        self._prepared.clear()
                    self._prepared[key] = known
                runtime = gpu.runtime(x.device)
                stream = runtime.handle(runtime.stream(x.device))
                known.run(stream, out.data_ptr(), x.data_ptr(), space.data_ptr())
            else:
                step = self.steps[stretch.start]
                step.module.launch(
                    out,
                    x,
                    step.weights,
                    step.op.shape,
                    self._scratch(stretch.start, maps, space),
                    arch=self.arch,
                    deterministic=deterministic,
                )
            x = out

    def _map(
        self, i: int, maps: tuple[Map, ...], y: torch.Tensor, space: torch.Tensor
    ) -> torch.Tensor:
        """Where step i writes."""
        at = maps[i].at
        return y if at is None else space[at].view(self.steps[i].op.dtype).view(maps[i].shape)

    def _scratch(self, i: int, maps: tuple[Map, ...], space: torch.Tensor) -> torch.Tensor | None:
        at = maps[i].scratch
        return None if at is None else space[at]

    def _prepare(
        self,
        stretch: Stretch,
        maps: tuple[Map, ...],
        y: torch.Tensor,
        x: torch.Tensor,
        space: torch.Tensor,
        deterministic: bool,
    ) -> _native.CudaLaunches:
        """CUDA's ops in a row as one native call; compiles and loads what they take."""
        load = not gpu.runtime(x.device).capturing()
        launches, kernels, source = [], [], x
        for i in range(stretch.start, stretch.stop):
            op, module, weights = self.steps[i]
            out = self._map(i, maps, y, space)
            settings = {"arch": self.arch, "deterministic": deterministic}
            scratch = self._scratch(i, maps, space)
            launches += module.plan(out, source, weights, op.shape, scratch, **settings)
            if load:
                kinds = (op.dtype, source.dtype, out.dtype)
                kernels += module.possible(weights, op.shape, *kinds, deterministic)
            source = out
        if load:
            modules.compile_all([*(one.kernel for one in launches), *kernels], self.arch)
        return cuda.assemble(launches, y, x, space, self.arch, load)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
