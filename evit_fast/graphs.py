"""CUDA graphs of whole forwards: one captured forward, and the bounded table that holds them.

A graph is captured at the second call of a key; the first compiles and loads kernels. Where a
capture fails, `graphs=True` raises; otherwise that key runs without a graph from then on, a warning
says so once, and so does `explain()`.
"""

from __future__ import annotations

import threading
import warnings
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

from evit_fast import gpu

if TYPE_CHECKING:
    from evit_fast.walk import Walk

GRAPHS_KEPT = 16
KEYS_KEPT = 256
BACKOFF = 4  # see Calls

_capturing = threading.Lock()  # torch: one capture at a time in a process


def _new_lock_in_child() -> None:
    global _capturing
    _capturing = threading.Lock()


gpu.after_fork(_new_lock_in_child)


class Key(NamedTuple):
    """What a graph is for. shape: of x."""

    program: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    deterministic: bool
    backend: str


class Graph:
    """One captured forward with its own input, result and workspace. The lock orders the threads
    that use it, an event their streams.
    """

    def __init__(self, runtime: gpu.Cuda, walk: Walk, x: torch.Tensor, deterministic: bool) -> None:
        """x: an input of the kind; its values are not read. On the current stream."""
        self._runtime = runtime
        self._lock = threading.Lock()
        self._x = torch.empty_like(x, requires_grad=False)
        self._y, self._space = walk.buffers(self._x)
        buffers = (self._y, self._x, self._space)
        walk.launch(*buffers, deterministic)  # other strides than x's may need other kernels
        self._graph = runtime.capture(lambda: walk.launch(*buffers, deterministic))
        self._free = runtime.event()  # the buffers are
        self._last = runtime.stream(x.device)
        self._free.record(self._last)
        self._streams = {self._last}

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """The result of the forward, in memory of the caller's, on the current stream."""
        with self._lock:
            stream = self._runtime.stream(x.device)
            if stream != self._last:
                stream.wait_event(self._free)
            if stream not in self._streams:
                for buffer in (self._x, self._y, self._space):
                    self._runtime.keep(buffer, stream)
                self._streams.add(stream)
            self._x.copy_(x)
            self._graph.replay()
            y = self._y.clone()
            self._free.record(stream)
            self._last = stream
            return y


class Calls:
    """Of one key, since its last capture. Each capture waits for BACKOFF times as many calls as the
    one before it, so that more keys in turn than graphs in the table cost few captures.
    """

    __slots__ = ("captures", "count")

    def __init__(self) -> None:
        self.count = self.captures = 0


class Table:
    """The graphs over one set of weights, the last used at the end."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.failed: dict[Key, str] = {}
        self._graphs: OrderedDict[Key, Graph] = OrderedDict()
        self._calls: OrderedDict[Key, Calls] = OrderedDict()

    def __len__(self) -> int:
        return len(self._graphs)

    def get(self, key: Key) -> Graph | None:
        with self.lock:
            graph = self._graphs.get(key)
            if graph is not None:
                self._graphs.move_to_end(key)
            return graph

    def ran(self, key: Key) -> bool:
        """A call was counted; the last KEYS_KEPT keys are known."""
        return key in self._calls

    def count(self, key: Key) -> bool:
        """Counts a call without a graph. True: it is the first."""
        with self.lock:
            calls = self._calls.setdefault(key, Calls())
            self._calls.move_to_end(key)
            if len(self._calls) > KEYS_KEPT:
                self._calls.popitem(last=False)
            calls.count += 1
            return calls.count == 1 and not calls.captures

    def capture(self, key: Key, make: Callable[[], Graph], must: bool) -> Graph | None:
        """The graph of the key, captured if it is time; None: run without. RuntimeError: `must`,
        and it cannot be captured.
        """
        with self.lock:
            if (graph := self._graphs.get(key)) is not None:
                return graph
            why, calls = self.failed.get(key), self._calls[key]
            if why is None and calls.count < BACKOFF**calls.captures:
                return None
            if why is None:
                try:
                    with _capturing:
                        graph = gpu.apart(make)
                except RuntimeError as e:
                    why = self.failed[key] = _no_capture(key, e)
                    if not must:
                        warnings.warn(f"evit_fast: {why}", RuntimeWarning, stacklevel=2)
            if graph is None:
                if must:
                    raise RuntimeError(f"graphs=True: {why}; use graphs=False")
                return None
            calls.captures += 1
            calls.count = 0
            self._graphs[key] = graph
            while len(self._graphs) > GRAPHS_KEPT:
                self._graphs.popitem(last=False)
            return graph

    def clear(self) -> None:
        with self.lock:
            self._graphs.clear()
            self._calls.clear()
            self.failed.clear()


def _no_capture(key: Key, e: RuntimeError) -> str:
    says = str(e).split("\n", 1)[0].rstrip(".")
    return f"no CUDA graph for an input of shape {list(key.shape)}, its capture failed: {says}"
