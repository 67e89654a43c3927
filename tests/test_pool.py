"""The thread pool: the C++ test under sanitizers, and unloading the code its threads sleep in."""

from __future__ import annotations

import sys

import pytest

from tests.native_build import compile_cpp, run

POOL = "csrc/cpu/pool.cpp"
TEST = "tests/native/pool_test.cpp"
# Sanitizers follow no forks: with threads, fork leaves theirs in an undefined state.
WITHIN_ONE_PROCESS = ("sizes", "barrier", "callers", "nested")


@pytest.mark.parametrize(
    ("flags", "checks"),
    [
        pytest.param((), (), id="plain"),
        pytest.param(("-fsanitize=thread",), WITHIN_ONE_PROCESS, id="thread"),
        pytest.param(
            ("-fsanitize=address,undefined", "-fno-sanitize-recover=all"),
            WITHIN_ONE_PROCESS,
            id="address",
        ),
    ],
)
def test_pool_and_barrier(tmp_path, flags, checks):
    program = compile_cpp(tmp_path / "pool_test", TEST, POOL, flags=flags)
    assert run(program, *checks).endswith("ok\n")


UNLOAD = """
import ctypes, _ctypes, sys, time
Fn = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
ranks = []
fn = Fn(lambda ctx, rank, size: ranks.append(rank))
library = ctypes.CDLL(sys.argv[1])
library._ZN4evit8pool_runEiPFvPviiES0_(3, fn, None)
assert sorted(ranks) == [0, 1, 2], ranks
time.sleep(0.01)  # the workers are asleep inside the library
_ctypes.dlclose(library._handle)
mapped = open("/proc/self/maps").read()
assert sys.argv[1] not in mapped, "the library was not unloaded"
threads = open("/proc/self/status").read().split("Threads:")[1].split()[0]
assert threads == "1", threads
print("ok")
"""


def test_library_can_be_unloaded_with_sleeping_workers(tmp_path):
    library = compile_cpp(tmp_path / "libpool.so", POOL, flags=("-shared", "-fPIC"))
    assert run(sys.executable, "-c", UNLOAD, library) == "ok\n"
