"""A GPU that is not there: a runtime on CPU tensors, and kernels made of the references.

As strict as a device: a capture runs nothing, a replay repeats every operation on the same memory,
and what was captured or never written holds NaN.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from evit_fast import columns, gpu, walker
from evit_fast import program as programs
from evit_fast.cuda import modules
from evit_fast.ops import OPS

H100 = gpu.Place("cuda", 90)
NAN = float("nan")


class Recorder(TorchDispatchMode):
    """Records every operation that a capture sees."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, tuple, dict, Any]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        returns = [r.alias_info for r in func._schema.returns]
        is_view = any(a is not None and not a.is_write for a in returns)
        if not is_view and not func._schema.name.startswith("aten::empty"):
            self.calls.append((func, args, kwargs or {}, out))
        return out


class FakeGraph:
    def __init__(self, runtime: FakeCuda, calls: list) -> None:
        self.runtime, self.calls = runtime, calls

    def replay(self) -> None:
        self.runtime.log.append(("replay", self.runtime.stream(None)))
        with torch.autocast("cpu", enabled=False):
            for func, args, kwargs, out in self.calls:
                result = func(*args, **kwargs)
                if isinstance(out, Tensor) and result.data_ptr() != out.data_ptr():
                    out.copy_(result)


class FakeStream:
    def __init__(self, runtime: FakeCuda) -> None:
        self.runtime = runtime

    @property
    def cuda_stream(self) -> int:
        return id(self)

    def wait_event(self, event: FakeEvent) -> None:
        self.runtime.log.append(("wait", self, event.recorded_on))

    def synchronize(self) -> None:
        self.runtime.log.append(("synchronize", self))


class FakeEvent:
    recorded_on: FakeStream | None = None

    def __init__(self, runtime: FakeCuda) -> None:
        self.runtime = runtime

    def record(self, stream: FakeStream) -> None:
        self.recorded_on = stream
        self.runtime.log.append(("record", stream))


class FakeCuda(gpu.Cuda):
    def __init__(self) -> None:
        self.log: list[tuple] = []
        self.kept: list[tuple[int, FakeStream]] = []
        self.main = FakeStream(self)
        self.local = threading.local()
        self.foreign = False  # the user captures the current stream
        self.broken = ""  # what a capture fails with
        self.captures = 0

    def using(self, device: torch.device):
        return self.on(self.stream(device))

    def is_current(self) -> bool:
        """The device was made the current one, as every launch needs it."""
        return hasattr(self.local, "stream")

    def capturing(self) -> bool:
        return self.foreign and threading.current_thread() is threading.main_thread()

    def stream(self, device: torch.device | None) -> FakeStream:
        return getattr(self.local, "stream", self.main)

    def side_stream(self, device: torch.device) -> FakeStream:
        return FakeStream(self)

    @contextmanager
    def on(self, stream: FakeStream) -> Iterator[None]:
        before = vars(self.local).copy()
        self.local.stream = stream
        try:
            yield
        finally:
            vars(self.local).clear()
            vars(self.local).update(before)

    def event(self) -> FakeEvent:
        return FakeEvent(self)

    def keep(self, tensor: Tensor, stream: FakeStream) -> None:
        self.kept.append((tensor.data_ptr(), stream))

    def capture(self, work: Callable[[], None]) -> FakeGraph:
        assert self.stream(None) is not self.main, "captured on the stream of the caller"
        assert not torch.is_inference_mode_enabled()
        self.captures += 1
        with Recorder() as recorder:
            work()
            if self.broken:
                raise RuntimeError(f"{self.broken}.\nMore about it.")
        for _, _, _, out in recorder.calls:
            if isinstance(out, Tensor) and out.is_floating_point():
                out.fill_(NAN)
        return FakeGraph(self, recorder.calls)


class Double:
    """One op's kernel module: the reference behind the interface of a kernel."""

    def __init__(self, name: str, runtime: FakeCuda) -> None:
        self.name = name
        self.runtime = runtime
        self.CONFIGS = SimpleNamespace(arch=lambda arch: 90 if arch >= 90 else 80)
        self.refuses = ""
        self.prepared = 0
        self.launches: list[SimpleNamespace] = []

    def supports(self, s, dtype: torch.dtype, arch: int) -> str | None:
        if arch < 80:
            return f"triton: sm_{arch} is too old"
        return "triton: not in float64" if dtype == torch.float64 else self.refuses or None

    def prepare(self, w, s, dtype: torch.dtype):
        assert not torch.is_inference_mode_enabled()
        if next(walker._tensors(w)).device.type != "meta":
            assert self.runtime.is_current()
            self.runtime.log.append(("prepare", self.runtime.stream(None)))
        self.prepared += 1
        return programs.map_arrays(w, lambda t: t.float())

    def scratch(self, s, dtype: torch.dtype, B: int, H: int, W: int) -> int:
        return {"cga": 512 * B, "patch_merge": 1024}.get(self.name, 0)

    def plan(self, y, x, w, s, space=None, *, arch: int) -> list[SimpleNamespace]:
        assert x.is_meta and y.is_meta and all(t.is_meta for t in walker._tensors(w))
        names = [f"{self.name}_kernel", *["sum_kernel"] * (2 if space is not None else 0)]
        return [SimpleNamespace(kernel=SimpleNamespace(__name__=name)) for name in names]

    def launch(self, y, x, w, s, space=None, *, arch, deterministic=False) -> None:
        assert self.runtime.is_current()
        matrix = next(t for t in walker._tensors(w))
        self.launches.append(SimpleNamespace(y=y, x=x, space=space, deterministic=deterministic))
        assert arch >= 80 and y.is_contiguous() and y.dtype != torch.float64 != x.dtype
        assert self.name == "stem" or x.is_contiguous()
        if self.name == "classifier" and not s.N:
            matrix = None
        H, W = x.shape[2:] if self.name == "stem" else x.shape[1:3]
        wanted = self.scratch(s, x.dtype, x.shape[0], H, W)
        assert (0 if space is None else space.numel()) == wanted
        ranges = sorted(
            (t.data_ptr(), t.data_ptr() + t.numel() * t.element_size())
            for t in (y, x, space, matrix)
            if t is not None and (t is not x or x.is_contiguous())
        )
        assert all(a[1] <= b[0] for a, b in pairwise(ranges)), "overlap"
        y.fill_(NAN)
        if space is not None:
            space.fill_(255)
        wide = x if x.dtype == torch.uint8 else x.float()
        with torch.autocast("cpu", enabled=False):  # a kernel knows no autocast
            y.copy_(OPS[self.name].reference(wide, w, s))


class World(SimpleNamespace):
    """The fake, the doubles and the place; what `columns` and `walker` are made to see."""

    runtime: FakeCuda
    kernels: dict[str, Double]
    without_cuda: str  # why the CUDA column is not there

    def patch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(gpu, "place", lambda device: self.place)
        monkeypatch.setattr(gpu, "runtime", lambda device: self.runtime)
        monkeypatch.setattr(walker, "kernel", lambda name: self.kernels[name])
        if self.without_cuda:
            monkeypatch.setattr(modules, "missing", lambda arch: self.without_cuda)

    @property
    def launched(self) -> int:
        return sum(len(k.launches) for k in self.kernels.values())

    def forget(self) -> None:
        """Lets go of the tensors that the kernels saw."""
        for k in self.kernels.values():
            k.launches.clear()
        gc.collect()

    @property
    def prepared(self) -> int:
        return sum(k.prepared for k in self.kernels.values())


def clear_choices() -> None:
    columns.choose.cache_clear()
    walker.columns.cache_clear()


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> Iterator[World]:
    fake = FakeCuda()
    kernels = {name: Double(name, fake) for name in OPS}
    world = World(runtime=fake, kernels=kernels, place=H100, without_cuda="cuda: no driver")
    world.patch(monkeypatch)
    clear_choices()
    with torch.no_grad():
        yield world
    clear_choices()
    walker.empty_cache()
