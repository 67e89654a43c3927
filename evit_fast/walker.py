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

from evit_fast import _native, gpu, preferred
from evit_fast import program as programs
from evit_fast.cuda import column as cuda
from evit_fast.cuda import modules
from evit_fast.graphs import Graph, Key, Table
from evit_fast.ops import OPS
from evit_fast.ops.line import LineShape
from evit_fast.walk import Step, Walk

GRAPH_BATCH = 64  # up to here a forward takes less time on the GPU than its launches on the CPU
PROGRAMS_KEPT = 64  # per blob: a model and its slices


def kernel(name: str) -> Any:
    """The Triton module of an op. ImportError: no Triton that works here."""
    return importlib.import_module(f"evit_fast.kernels.{name}")


def cuda_kernel(name: str, arch: int) -> cuda.Kernels:
    """The CUDA kernels of an op. ImportError: this version has none."""
    return cuda.kernels(name, arch)


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

    name: str  # triton, cuda or reference
    reason: str


@lru_cache(maxsize=256)
def columns(program: str, place: gpu.Place, backend: str = "auto") -> tuple[Column, ...]:
    """The column of each op on an NVIDIA GPU. backend: auto, triton or cuda."""
    return tuple(_column(op, place, backend) for op in programs.parse(program))


def _column(op: programs.Op, place: gpu.Place, backend: str) -> Column:
    names = [backend]
    if backend == "auto":
        first = preferred.column(op, place.arch)
        names = [first, "triton" if first == "cuda" else "cuda"]
    refused = []
    for name in names:
        why = _REFUSALS[name](op, place)
        if not why:
            return Column(name, "; ".join(refused))
        refused.append(why)
    return Column("reference", "; ".join(refused))


def _without_triton(op: programs.Op, place: gpu.Place) -> str:
    if place.missing:
        return place.missing
    try:
        return kernel(op.name).supports(op.shape, op.dtype, place.arch) or ""
    except ImportError as e:
        return f"triton: {type(e).__name__}: {e}".split("\n")[0]


def without_cuda(op: programs.Op, place: gpu.Place) -> str:
    """Why the CUDA column cannot run an op, "" where it can."""
    if place.kind != "cuda":
        return "cuda: the kernels need a CUDA device"
    try:
        kernels = cuda_kernel(op.name, place.arch)
    except ModuleNotFoundError:
        return f"cuda: this version has no kernel for {op.name}"
    return kernels.supports(op.shape, op.dtype, place.arch) or modules.missing(place.arch)


_REFUSALS = {"triton": _without_triton, "cuda": without_cuda}


def undecided(op: programs.Op, place: gpu.Place) -> str:
    """What there is to say of the choice between two columns that both could run the op."""
    note = preferred.note(op, place.arch)
    return note if note and not any(why(op, place) for why in _REFUSALS.values()) else ""


def kernels_of(op: programs.Op, column: str, arch: int) -> list[str]:
    """Names of the kernels that one map of 14 x 14 tokens takes, or one image of 224 x 224."""
    native = column == "cuda"
    module = cuda_kernel(op.name, arch) if native else kernel(op.name)
    meta = torch.device("meta")
    blob = torch.empty(_native.op_bytes(op.line) + op.at, dtype=torch.uint8, device=meta)
    weights = module.prepare(programs.unpack(op, blob, keep=False), op.shape, op.dtype)
    C = op.shape.channels_in
    x = torch.empty((1, C, 224, 224) if op.name == "stem" else (1, 14, 14, C), device=meta)
    y, space = Walk(op.line, (Step(op, module, weights),), arch).buffers(x)
    plan = module.plan(y, x, weights, op.shape, space if space.numel() else None, arch=arch)
    kernels = (launch.kernel for launch in plan)
    return list(dict.fromkeys(k.name if native else k.__name__ for k in kernels))


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
        # By line and column: a model and its slices share them.
        self._weights: dict[tuple[str, str], Any] = {}
        self._walks: dict[tuple[str, gpu.Place, str], Walk] = {}
        self._streams: set[Any] = set()

    def has(self, program: str, place: gpu.Place, backend: str) -> bool:
        return (program, place, backend) in self._walks

    def walk(
        self, runtime: gpu.Cuda, program: str, blob: torch.Tensor, place: gpu.Place, backend: str
    ) -> Walk:
        """The program over these weights, which are on the device when this returns."""
        key = (program, place, backend)
        walk = self._walks.get(key)
        if walk is None:
            with self._lock:
                walk = self._walks.get(key)
                if walk is None:
                    if len(self._walks) >= PROGRAMS_KEPT:
                        self._walks.clear()
                    stream = runtime.stream(blob.device)
                    walk = gpu.apart(lambda: self._put(runtime, stream, blob, *key))
                    self._walks[key] = walk
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
        self,
        runtime: gpu.Cuda,
        stream: Any,
        blob: torch.Tensor,
        program: str,
        place: gpu.Place,
        backend: str,
    ) -> Walk:
        programs.check_blob(program, blob)
        steps = []
        with runtime.on(stream):
            chosen = columns(program, place, backend)
            for op, column in zip(programs.parse(program), chosen, strict=True):
                module = _module(op, column.name, place.arch)
                key = (op.line, column.name)
                if key not in self._weights:
                    w = programs.unpack(op, blob, keep=False)
                    self._weights[key] = module.prepare(w, op.shape, op.dtype)
                steps.append(Step(op, module, self._weights[key]))
            stream.synchronize()  # from now on any stream may read them
        self._streams.clear()
        return Walk(program, tuple(steps), place.arch)


def _module(op: programs.Op, column: str, arch: int) -> Any:
    if column == "cuda":
        return cuda_kernel(op.name, arch)
    return kernel(op.name) if column == "triton" else Reference(op)


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


def upload(program: str, blob: torch.Tensor, place: gpu.Place, backend: str = "auto") -> None:
    """Puts the weights on the device now; otherwise the first forward does."""
    _upload(blob).walk(gpu.runtime(blob.device), program, blob, place, backend)


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
    backend: str = "auto",
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
        if captured and not found.has(program, place, backend):
            raise RuntimeError(_never_ran("its weights are not on the device yet"))
        walk = found.walk(runtime, program, blob, place, backend)
        if x.shape[0] == 0:
            return walk.buffers(x)[0]
        found.used_on(runtime, runtime.stream(x.device))
        table, key = found.graphs, Key(program, tuple(x.shape), x.dtype, deterministic, backend)
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
