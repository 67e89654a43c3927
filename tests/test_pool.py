"""The thread pool: the C++ test under sanitizers, unloading the code its threads sleep in, a model
in many threads and after a fork, and how many threads run.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests.native_build import compile_cpp, run

POOL = "csrc/cpu/pool.cpp"
TEST = "tests/native/pool_test.cpp"
# Sanitizers follow no forks: with threads, fork leaves theirs in an undefined state.
WITHIN_ONE_PROCESS = ("sizes", "barrier", "restless", "callers", "nested")


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


# The start of each script below; `forward` uses three threads.
MODEL = """
import os, signal, sys, threading, torch
import evit_fast
from evit_fast.bench.weights import randomize
torch.set_num_threads(1)
torch.manual_seed(0)
model = evit_fast.create_model("m0").eval()
randomize(model)
fast = evit_fast.accelerate(model, threads=3)
x = torch.randn(2, 3, 96, 96)
def forward(images=x):
    with torch.inference_mode():
        return fast(images)
want = forward()
"""

FORK = """
for turn in range(3):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a deadlock ends as a failure
        same = torch.equal(forward(), want)
        if turn == 2:
            sys.exit(0 if same else 1)  # an ordinary exit, with the child's own workers asleep
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0, "the child's forward differs or failed"
assert torch.equal(forward(), want)
print("ok")
"""

FORK_WHILE_BUSY = """
stop = threading.Event()
def work():
    while not stop.is_set():
        forward()
worker = threading.Thread(target=work)
worker.start()
for turn in range(10):
    child = os.fork()
    if child == 0:
        signal.alarm(60)  # a deadlock ends as a failure
        os._exit(0 if torch.equal(forward(), want) else 1)
    assert os.waitpid(child, 0)[1] == 0, "the child's forward differs or failed"
stop.set()
worker.join()
print("ok")
"""

SHARED = """
inputs = [torch.randn(1 + i % 3, 3, 96, 96) for i in range(6)]
wants = [forward(images) for images in inputs]
wrong = []
def work(i):
    for _ in range(20):
        if not torch.equal(forward(inputs[i]), wants[i]):
            wrong.append(i)
threads = [threading.Thread(target=work, args=(i,)) for i in range(len(inputs))]
[t.start() for t in threads]
[t.join() for t in threads]
assert not wrong, wrong
print("ok")
"""


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(FORK, id="fork"),
        pytest.param(FORK_WHILE_BUSY, id="fork-while-busy"),
        pytest.param(SHARED, id="shared-by-threads"),
    ],
)
def test_model_in_many_threads_and_processes(script):
    options = ("-W", "ignore::DeprecationWarning")  # Python's own warning about fork with threads
    assert run(sys.executable, *options, "-c", MODEL + script, cwd="/", timeout=120) == "ok\n"


# One processor is allowed and three threads are asked for.
LIMIT = """
import os, sys, torch
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
from evit_fast import _native
line = "classifier C=64 N=16 at=0"
blob = torch.zeros(_native.op_bytes(line), dtype=torch.uint8)
m = _native.Model(line, blob.data_ptr(), blob.numel())
sizes = [m.workspace_bytes(8, 7, 7, threads) for threads in (1, 2, 3)]
x, y = torch.zeros(8, 7, 7, 64), torch.zeros(8, 16)
space = torch.zeros(sizes[2] // 4 + 16)
at = space.data_ptr() + -space.data_ptr() % 64
before = len(os.listdir("/proc/self/task"))
m.run(x.data_ptr(), "float32", x.shape, x.stride(), y.data_ptr(), at, sizes[2], 3)
print(len(os.listdir("/proc/self/task")) - before + 1, *sizes)
"""


@pytest.mark.parametrize(("limit", "want"), [("", 1), ("2", 2), ("256", 3)])
def test_no_more_threads_than_processors(limit, want):
    env = os.environ | {"EVIT_FAST_MAX_THREADS": limit}
    threads, *sizes = map(int, run(sys.executable, "-c", LIMIT, cwd="/", env=env).split())
    assert threads == want
    assert sizes[2] == sizes[want - 1]


@pytest.mark.parametrize("limit", ["0", "257", "two"])
def test_limit_of_threads_that_is_no_number(limit):
    env = os.environ | {"EVIT_FAST_MAX_THREADS": limit}
    command = [sys.executable, "-c", LIMIT]
    result = subprocess.run(command, capture_output=True, text=True, cwd="/", env=env)
    assert result.returncode == 1
    assert "RuntimeError: EVIT_FAST_MAX_THREADS: expected a number from 1 to 256" in result.stderr
