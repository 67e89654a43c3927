"""Walks a program on a GPU: one kernel column per op, weights uploaded once, CUDA graphs.

Memory of a forward: its result, and one workspace that holds two maps (each op reads one and writes
the other) and the ops' scratch; both are fresh from torch on the current stream. A CUDA graph
(`graphs.py`; by default up to GRAPH_BATCH images) owns its copies of them and of the input: the
input is copied in, the result copied out to a tensor of the caller's.

Weights on the device and graphs hang weakly on the blob, and are made anew when it was written to.
"""

from __future__ import annotations

import importlib
import itertools
import threading
from collections.abc import Iterator
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from evit_fast import _native, gpu
from evit_fast import program as programs
from evit_fast.graphs import Graph, Key, Table
from evit_fast.ops import OPS
from evit_fast.ops.line import LineShape

GRAPH_BATCH = 64  # up to here a forward takes less time on the GPU than its launches on the CPU
PROGRAMS_KEPT = 64  # per blob: a model and its slices
LAYOUTS_KEPT = 256  # per program
ALIGNMENT = 256  # in the workspace; torch gives memory on a device at least as aligned


def kernel(name: str) -> Any:
    """The Triton module of an op. ImportError: no Triton that works here."""
    return importlib.import_module(f"evit_fast.kernels.{name}")


class Reference:
    """The reference of one op, called as a kernel module is: for what no kernel runs."""

    def __init__(self, op: programs.Op) -> None:
        self.dtype = op.dtype
        self.wide = torch.promote_types(op.dtype, torch.float32)
        self.reference = OPS[op.name].reference

    def prepare(self, w: NamedTuple, s: LineShape, dtype: torch.dtype) -> NamedTuple:
        return programs.map_arrays(w, lambda t: t.to(self.wide))

    def scratch(self, s: LineShape, dtype: torch.dtype, B: int, H: int, W: int) -> int:
        return 0

    @torch.no_grad()
    def launch(
        self,
        y: torch.Tensor,
        x: torch.Tensor,
        w: NamedTuple,
        s: LineShape,
        space: torch.Tensor | None = None,
        **settings: Any,
    ) -> None:
        with torch.autocast(x.device.type, enabled=False):
            if x.is_floating_point():
                x = x.to(self.dtype).to(self.wide)
            y.copy_(self.reference(x, w, s).to(self.dtype))


class Column(NamedTuple):
    """Who runs one op, and what rules out a faster one."""

    name: str  # triton or reference
    reason: str


@lru_cache(maxsize=256)
def columns(program: str, arch: int) -> tuple[Column, ...]:
    """The column of each op on an NVIDIA GPU of that architecture, with Triton installed."""
    return tuple(_column(op, arch) for op in programs.parse(program))


def _column(op: programs.Op, arch: int) -> Column:
    try:
        why = kernel(op.name).supports(op.shape, op.dtype, arch)
    except ImportError as e:
        why = f"triton: {type(e).__name__}: {e}".split("\n")[0]
    return Column("reference", why) if why else Column("triton", "")


def kernels_of(op: programs.Op, arch: int) -> list[str]:
    """Names of the kernels that one map of 14 x 14 tokens takes, or one image of 224 x 224."""
    module, meta = kernel(op.name), torch.device("meta")
    blob = torch.empty(_native.op_bytes(op.line) + op.at, dtype=torch.uint8, device=meta)
    weights = module.prepare(programs.unpack(op, blob, keep=False), op.shape, op.dtype)
    C = op.shape.channels_in
    x = torch.empty((1, C, 224, 224) if op.name == "stem" else (1, 14, 14, C), device=meta)
    y, space = Walk(op.line, (Step(op, module, weights),), arch).buffers(x)
    plan = module.plan(y, x, weights, op.shape, space if space.numel() else None, arch=arch)
    return list(dict.fromkeys(launch.kernel.__name__ for launch in plan))


# ------------------------------------------------------------------ one program over one blob


class Step(NamedTuple):
    """One op with its weights as its column reads them."""

    op: programs.Op
    module: Any
    weights: Any


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
        self._layouts: dict[tuple[int, ...], Layout] = {}

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
        for step, at in zip(self.steps, self.layout(tuple(x.shape)).maps, strict=True):
            op = step.op
            out = y if at.at is None else space[at.at].view(op.dtype).view(at.shape)
            step.module.launch(
                out,
                x,
                step.weights,
                op.shape,
                None if at.scratch is None else space[at.scratch],
                arch=self.arch,
                deterministic=deterministic,
            )
            x = out


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        yield from itertools.chain.from_iterable(map(_tensors, value))


# ------------------------------------------------------------------ what belongs to a blob


class Upload:
    """The weights of one blob as the kernels read them, and the graphs that read those."""

    def __init__(self, blob: torch.Tensor) -> None:
        self.version = None if blob.is_inference() else blob._version
        self.graphs = Table()
        self.pinned: list[dict[str, Any]] = []  # weights that a graph of the user's reads
        self._lock = threading.RLock()
        self._weights: dict[str, Any] = {}  # by line: a model and its slices share them
        self._walks: dict[tuple[str, int], Walk] = {}
        self._streams: set[Any] = set()

    def has(self, program: str, arch: int) -> bool:
        return (program, arch) in self._walks

    def walk(self, runtime: gpu.Cuda, program: str, blob: torch.Tensor, arch: int) -> Walk:
        """The program over these weights, which are on the device when this returns."""
        walk = self._walks.get((program, arch))
        if walk is None:
            with self._lock:
                walk = self._walks.get((program, arch))
                if walk is None:
                    if len(self._walks) >= PROGRAMS_KEPT:
                        self._walks.clear()
                    stream = runtime.stream(blob.device)
                    walk = gpu.apart(lambda: self._put(runtime, stream, program, blob, arch))
                    self._walks[program, arch] = walk
        return walk

    def used_on(self, runtime: gpu.Cuda, stream: Any) -> None:
        """Weights that are freed while the stream still reads them wait for it."""
        if stream in self._streams:
            return
        with self._lock:
            for tensor in _tensors(list(self._weights.values())):
                runtime.keep(tensor, stream)
            self._streams.add(stream)

    def pin(self) -> None:
        """The weights live as long as the blob."""
        with self._lock:
            if not any(weights is self._weights for weights in self.pinned):
                self.pinned.append(self._weights)

    def clear(self) -> None:
        with self._lock:
            self.graphs.clear()
            self._walks.clear()
            self._weights = {}

    def _put(
        self, runtime: gpu.Cuda, stream: Any, program: str, blob: torch.Tensor, arch: int
    ) -> Walk:
        programs.check_blob(program, blob)
        steps = []
        with runtime.on(stream):
            for op, column in zip(programs.parse(program), columns(program, arch), strict=True):
                module = kernel(op.name) if column.name == "triton" else Reference(op)
                if op.line not in self._weights:
                    w = programs.unpack(op, blob, keep=False)
                    self._weights[op.line] = module.prepare(w, op.shape, op.dtype)
                steps.append(Step(op, module, self._weights[op.line]))
            stream.synchronize()  # from now on any stream may read them
        self._streams.clear()
        return Walk(program, tuple(steps), arch)


_uploads = WeakTensorKeyDictionary()  # blob -> Upload
_lock = threading.RLock()
_of_parent: Any = None


def _start_anew_in_child() -> None:
    # What is on a device belongs to the parent, which alone can free it: it is kept, not used.
    global _uploads, _lock, _of_parent
    _of_parent = _uploads
    _uploads, _lock = WeakTensorKeyDictionary(), threading.RLock()


gpu.after_fork(_start_anew_in_child)


def _upload(blob: torch.Tensor) -> Upload:
    if blob.is_inference():  # no version counter: a later write could not be seen
        return Upload(blob)
    found = _uploads.get(blob)
    if found is None or found.version != blob._version:
        with _lock:
            found = _uploads.get(blob)
            if found is None or found.version != blob._version:
                new = Upload(blob)
                new.pinned = [] if found is None else found.pinned
                found = _uploads[blob] = new
    return found


def upload(program: str, blob: torch.Tensor, place: gpu.Place) -> None:
    """Puts the weights on the device now; otherwise the first forward does."""
    _upload(blob).walk(gpu.runtime(blob.device), program, blob, place.arch)


def empty_cache() -> None:
    """Frees the graphs and the uploaded weights; those that a graph of the user's reads live on
    with their blob.
    """
    with _lock:
        for found in list(_uploads.values()):
            found.clear()


def failures(blob: torch.Tensor) -> list[str]:
    """Why forwards with this blob that might have a graph run without."""
    found = _uploads.get(blob)
    return [] if found is None else sorted(set(found.graphs.failed.values()))


# ------------------------------------------------------------------ the forward


def run(
    x: torch.Tensor,
    program: str,
    blob: torch.Tensor,
    place: gpu.Place,
    graphs: bool | None = None,
    deterministic: bool = False,
) -> torch.Tensor:
    """The program on x's device. x: as evit_fast::forward takes it, checked; a program in the
    middle takes float64 as float32. The result has x's dtype (float64, uint8: float32).

    RuntimeError: graphs=True and no graph can be captured; or the caller captures a forward that
    never ran.
    """
    runtime = gpu.runtime(x.device)
    if x.dtype == torch.float64:
        x = x.float()
    if not program.startswith("stem "):
        x = x.contiguous()
    with runtime.using(x.device):
        found = _upload(blob)
        captured = runtime.capturing()
        if captured and not found.has(program, place.arch):
            raise RuntimeError(_never_ran("its weights are not on the device yet"))
        walk = found.walk(runtime, program, blob, place.arch)
        if x.shape[0] == 0:
            return walk.buffers(x)[0]
        found.used_on(runtime, runtime.stream(x.device))
        table, key = found.graphs, Key(program, tuple(x.shape), x.dtype, deterministic)
        if captured:
            if not table.ran(key):
                raise RuntimeError(_never_ran(f"no {x.dtype} of shape {list(x.shape)} ever ran"))
            found.pin()
            return _raw(walk, x, deterministic)
        wanted = graphs if graphs is not None else x.shape[0] <= GRAPH_BATCH
        # Without a version counter nothing would drop a graph; the interpreter has no device.
        if found.version is None or place.interpreted or not runtime.has_graphs:
            wanted = False
        graph = table.get(key) if wanted else None
        if graph is None:
            with table.lock:  # the first call compiles; others with these weights wait
                if table.count(key):
                    return _raw(walk, x, deterministic)
            if wanted:
                make = partial(_captured, runtime, walk, x, deterministic)
                graph = table.capture(key, make, must=bool(graphs))
        return _raw(walk, x, deterministic) if graph is None else graph(x)


def _raw(walk: Walk, x: torch.Tensor, deterministic: bool) -> torch.Tensor:
    y, space = walk.buffers(x)
    walk.launch(y, x, space, deterministic)
    return y


def _captured(runtime: gpu.Cuda, walk: Walk, x: torch.Tensor, deterministic: bool) -> Graph:
    with runtime.on(runtime.side_stream(x.device)):
        return Graph(runtime, walk, x, deterministic)


def _never_ran(fact: str) -> str:
    return (
        f"evit_fast: this forward is being captured into a CUDA graph, but {fact}; run the model "
        "once on such an input before the capture, which can neither upload nor compile"
    )
