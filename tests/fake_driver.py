"""A card for the CUDA column that is not there: kernels are "compiled" to their own source, and
the driver of fake_driver.cpp runs them in the emulator, on CPU tensors.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

from evit_fast import _native, gpu, nvrtc
from evit_fast.cuda import modules
from tests.emulator.building import library
from tests.fake_gpu import FakeCuda, FakeGraph, World, clear_choices
from tests.native_build import compile_cpp

# Behind a kernel's source: one launch, as the driver has it.
ENTRY = """
extern "C" void launch_grid(const void* words, unsigned x, unsigned y, unsigned threads,
                            unsigned shared) {{
  emulator::Launch launch;
  launch.grid = {{x, y, 1}};
  launch.block.x = threads;
  launch.shared_bytes = shared;
  evit::cuda::Args args;
  __builtin_memcpy(&args, words, sizeof args);
  void* pointers[] = {{&args}};
  emulator::run_kernel(&{name}, launch, pointers);
}}
extern "C" long args_bytes() {{ return sizeof(evit::cuda::Args); }}
extern "C" const char* kernel_name() {{ return "{name}"; }}
"""

_missing = modules.missing
_folder = TemporaryDirectory(prefix="evit_fast_driver_")


class Compiler:
    """In NVRTC's place: a cubin is the source, and what it includes must have been given."""

    version = "12.9"

    def __init__(self) -> None:
        self.compiled: list[str] = []

    def compile(self, source, name, arch, options, headers) -> nvrtc.Cubin:
        for text in (source, *headers.values()):
            for included in re.findall(r'^#include "(.+)"$', text, re.M):
                assert included in headers or included == "emulator.h", f"{name}: {included}"
        assert options == ("--std=c++20",)
        self.compiled.append(name.removesuffix(".cu"))
        image = json.dumps({"name": name.removesuffix(".cu"), "source": source})
        return nvrtc.Cubin(image.encode() + b"\0", "", {})


@cache
def _built(image: bytes) -> ctypes.Array[ctypes.c_char]:
    """The path of a "cubin" as a library for the emulator."""
    fields = json.loads(image)
    source = Path(_folder.name, f"{hashlib.sha256(image).hexdigest()[:20]}.cpp")
    source.write_text(fields["source"] + ENTRY.format(name=fields["name"]))
    out = source.with_suffix(".so")
    library(out, source, "-Wno-unused-parameter")
    return ctypes.create_string_buffer(str(out).encode())


_loader_type = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_char_p)


@_loader_type
def _loader(image: bytes) -> int | None:
    try:
        return ctypes.addressof(_built(image))
    except (ValueError, AssertionError) as e:  # no cubin of ours; or g++ says no
        print(e)
        return None


@cache
def _driver() -> ctypes.CDLL:
    flags = ("-shared", "-fPIC", "-Wall", "-Wextra", "-Werror")
    path = compile_cpp(Path(_folder.name, "driver.so"), "tests/fake_driver.cpp", flags=flags)
    lib = ctypes.CDLL(str(path))
    lib.fake_launches.restype = ctypes.c_char_p
    lib.fake_calls.restype = ctypes.c_long
    lib.path = str(path)
    return lib


class Driver:
    """The fake driver, opened in the place of NVIDIA's."""

    def __init__(self) -> None:
        self.lib = _driver()
        self.path = self.lib.path
        self.lib.fake_reset()
        self.lib.fake_loader(_loader)
        _native.cuda_driver(self.path)

    def fail(self, entry: str, status: int) -> None:
        """The next call of an entry point returns `status`."""
        self.lib.fake_fail(entry.encode(), status)

    def calls(self, entry: str) -> int:
        return self.lib.fake_calls(entry.encode())

    @property
    def launches(self) -> list[list[str]]:
        """[kernel, blocks x, blocks y, threads, shared bytes, stream] of each."""
        return [line.split() for line in self.lib.fake_launches().decode().splitlines()]

    @property
    def kernels(self) -> list[str]:
        return [words[0] for words in self.launches]


class DriverGraph:
    def __init__(self, driver: Driver, inner: FakeGraph, number: int) -> None:
        self.driver, self.inner, self.number = driver, inner, number

    def replay(self) -> None:
        self.inner.replay()
        self.driver.lib.fake_replay(self.number)


class DriverCuda(FakeCuda):
    """Captures what goes to the driver; torch's own operations must not be among it."""

    def __init__(self, driver: Driver) -> None:
        super().__init__()
        self.driver = driver

    def capture(self, work: Callable[[], None]) -> DriverGraph:
        self.driver.lib.fake_capture_begin()
        try:
            inner = super().capture(work)
        finally:
            number = self.driver.lib.fake_capture_end()
        assert not inner.calls, "torch's operations and launches mixed in one capture"
        return DriverGraph(self.driver, inner, number)


class Card(World):
    """A World whose place is an sm_70, with a driver and a compiler."""

    driver: Driver
    compiler: Compiler


@pytest.fixture
def card(world: World, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Card]:
    monkeypatch.setenv("EVIT_FAST_CACHE", str(tmp_path / "cubins"))
    driver, compiler = Driver(), Compiler()
    fake = DriverCuda(driver)
    kept = {"kernels": world.kernels, "without_cuda": ""}
    card = Card(runtime=fake, place=gpu.Place("cuda", 70), driver=driver, compiler=compiler, **kept)
    for double in card.kernels.values():
        double.runtime = fake
    card.patch(monkeypatch)
    monkeypatch.setattr(modules, "missing", _missing)
    monkeypatch.setattr(nvrtc, "find", lambda arch=None: compiler)
    modules.forget()
    clear_choices()
    yield card
    clear_choices()
    modules.forget()
