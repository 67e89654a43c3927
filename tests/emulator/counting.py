"""The memory traffic of launches, counted on the emulator: sectors and bank conflicts."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass, field

from torch import Tensor

from evit_fast.cuda.kernels import Launch
from tests.emulator.building import emulate, emulated

SECTOR = 32  # bytes


class BufferCounts(ctypes.Structure):  # counts.h
    _fields_ = [(n, ctypes.c_long) for n in ("instructions", "sectors", "read", "written")]


class SharedCounts(ctypes.Structure):
    _fields_ = [
        (n, ctypes.c_long)
        for n in ("instructions", "conflict_free", "wavefronts", "least_wavefronts")
    ]


@dataclass
class Bytes:
    """Of one kind of tensor: distinct sectors of each launch, summed, and what L1 was asked for."""

    distinct: int = 0
    asked: int = 0


@dataclass
class Traffic:
    """kinds: 'x', 'y', 'scratch' or 'weights'; shared: in warp instructions and wavefronts."""

    kinds: dict[str, Bytes] = field(default_factory=dict)
    shared: SharedCounts = field(default_factory=SharedCounts)

    def distinct(self, *without: str) -> int:
        return sum(b.distinct for kind, b in self.kinds.items() if kind not in without)

    @property
    def asked(self) -> int:
        return sum(b.asked for b in self.kinds.values())

    @property
    def conflict_free(self) -> float:
        """Share of the shared accesses of a warp that take as few turns as their width allows."""
        return self.shared.conflict_free / max(1, self.shared.instructions)


def count(launches: list[Launch], y: Tensor, x: Tensor, space: Tensor) -> Traffic:
    """Runs launches and counts; their results are worth nothing (emulator.h)."""
    known = {t.untyped_storage().data_ptr(): name for t, name in ((space, "scratch"), (x, "x"))}
    known[y.untyped_storage().data_ptr()] = "y"
    traffic = Traffic()
    for launch in launches:
        tensors = {w.untyped_storage().data_ptr(): w for w in launch.words if isinstance(w, Tensor)}
        built = emulated(launch.kernel, "counts")
        sizes = [t.untyped_storage().nbytes() for t in tensors.values()]
        buffers = (ctypes.c_void_p * len(tensors))(*tensors)
        built.watch(len(tensors), buffers, (ctypes.c_long * len(tensors))(*sizes))
        emulate([launch], build="counts")
        found, shared = (BufferCounts * len(tensors))(), SharedCounts()
        built.counts(found, ctypes.byref(shared))
        for address, of in zip(tensors, found, strict=True):
            bytes_ = traffic.kinds.setdefault(known.get(address, "weights"), Bytes())
            bytes_.distinct += (of.read + of.written) * SECTOR
            bytes_.asked += of.sectors * SECTOR
        for name, _ in SharedCounts._fields_:
            setattr(traffic.shared, name, getattr(traffic.shared, name) + getattr(shared, name))
    return traffic
