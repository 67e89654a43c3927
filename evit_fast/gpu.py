"""What the package asks of torch about a GPU, in one place that tests can exchange."""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache
from typing import Any, NamedTuple, TypeVar

import torch

T = TypeVar("T")

INTERPRETER_ARCH = 80  # the interpreter runs the kernels with the tiles of this architecture


class Place(NamedTuple):
    """Where a program runs, as far as choosing a column depends on it."""

    kind: str  # torch's device type; "hip" for AMD's, which torch calls cuda too
    arch: int = 0  # compute capability as two digits: 90
    missing: str = ""  # why Triton cannot run here; empty where it can
    interpreted: bool = False


def interpreted() -> bool:
    """Triton runs kernels in its interpreter; it reads the variable once, when imported."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@lru_cache(maxsize=64)
def place(device: torch.device) -> Place:
    """The place that a tensor's device is. A machine does not change while a process runs."""
    if device.type == "cuda" and torch.version.hip is None:
        major, minor = torch.cuda.get_device_capability(device)
        return Place("cuda", 10 * major + minor, _without_triton(), interpreted())
    if device.type == "cpu":
        missing = _without_triton()
        if not interpreted():
            missing = (
                "Triton runs on CPU tensors only in its interpreter; set TRITON_INTERPRET=1 before "
                "the program starts, or use a CUDA device"
            )
        return Place("cpu", INTERPRETER_ARCH, missing, interpreted())
    return Place("hip" if device.type == "cuda" else device.type)


def _without_triton() -> str:
    return "" if importlib.util.find_spec("triton") else "triton is not installed: pip install it"


def check_device(device: torch.device | str) -> None:
    """RuntimeError with one sentence where torch cannot use that CUDA device."""
    device = torch.device(device)
    if device.type != "cuda":
        return
    try:
        torch.cuda.init()
        count = torch.cuda.device_count()
    except (AssertionError, RuntimeError) as e:
        says = str(e).split("\n", 1)[0].split(". ", 1)[0].rstrip(".")
        raise RuntimeError(
            f"device={str(device)!r}: torch {torch.__version__} has no CUDA device here: {says}; "
            "use device='cpu', or install a CUDA build of torch and a driver"
        ) from None
    if (device.index or 0) >= count:
        raise RuntimeError(
            f"device={str(device)!r}: torch sees {count} CUDA devices; use an index below {count}"
        )


class Cuda:
    """The CUDA runtime as the walker uses it, through torch."""

    has_graphs = True

    def using(self, device: torch.device) -> AbstractContextManager:
        """`device` is the current one inside: kernels go to the current device."""
        if device.index == torch.cuda.current_device():
            return nullcontext()
        return torch.cuda.device(device)

    def capturing(self) -> bool:
        """Someone captures the current stream into a graph."""
        return torch.cuda.is_current_stream_capturing()

    def stream(self, device: torch.device) -> torch.cuda.Stream:
        """The current stream."""
        return torch.cuda.current_stream(device)

    def side_stream(self, device: torch.device) -> torch.cuda.Stream:
        """A stream to capture on."""
        return torch.cuda.Stream(device)

    def on(self, stream: torch.cuda.Stream) -> AbstractContextManager:
        """`stream` is the current one of its device inside, and its device the current one."""
        return torch.cuda.stream(stream)

    def handle(self, stream: torch.cuda.Stream) -> int:
        """The driver's handle of a stream."""
        return stream.cuda_stream

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event()

    def keep(self, tensor: torch.Tensor, stream: torch.cuda.Stream) -> None:
        """Memory of the tensor that is freed while the stream uses it waits for the stream."""
        tensor.record_stream(stream)

    def capture(self, work: Callable[[], None]) -> Any:
        """What `work` launches on the current stream, as a graph with replay(); nothing runs.

        Not torch.cuda.graph: that synchronises the device and empties torch's memory cache. Other
        threads may allocate meanwhile.
        """
        graph = torch.cuda.CUDAGraph()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            work()
        except BaseException:
            try:
                graph.capture_end()  # or the stream would stay in capture
            except RuntimeError:
                pass  # the capture is broken; the first error says why
            raise
        graph.capture_end()
        return graph


class Host:
    """CPU tensors, for Triton's interpreter: one stream, no graphs."""

    has_graphs = False

    def using(self, device: torch.device) -> AbstractContextManager:
        return nullcontext()

    def capturing(self) -> bool:
        return False

    def stream(self, device: torch.device) -> Host:
        return self

    def on(self, stream: Host) -> AbstractContextManager:
        return nullcontext()

    def keep(self, tensor: torch.Tensor, stream: Host) -> None:
        pass

    def synchronize(self) -> None:
        pass


_cuda, _host = Cuda(), Host()


def runtime(device: torch.device) -> Cuda | Host:
    return _cuda if device.type == "cuda" else _host


def after_fork(work: Callable[[], None]) -> None:
    """Calls `work` in every child that this process forks, where it can."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=work)


def apart(work: Callable[[], T]) -> T:
    """work() in a thread of its own, for what is kept between calls: no mode of the caller's thread
    (inference, autocast, a default device, a dispatch mode) reaches it, nor does a memory pool that
    the caller's allocations go to and that would take the memory back.
    """
    result: list[Any] = []

    def run() -> None:
        try:
            result.extend((True, work()))
        except BaseException as e:
            result.extend((False, e))

    thread = threading.Thread(target=run, name="evit_fast-gpu")
    thread.start()
    thread.join()
    done, value = result
    if not done:
        raise value
    return value
