"""Memory: what a steady forward allocates, the workspace's size, what a process keeps resident."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

import evit_fast
from evit_fast import _native
from evit_fast.bench.weights import randomize
from tests.native_build import allocation_counter, run

MIB = 2**20


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> dict[str, Path]:
    """Saved models by name."""
    paths = {}
    for name in ("m0", "m5"):
        eager = evit_fast.create_model(name).eval()
        randomize(eager)
        paths[name] = tmp_path_factory.mktemp("saved") / f"{name}.evit"
        evit_fast.save(evit_fast.accelerate(eager), paths[name])
    return paths


# --- workspace


@pytest.mark.parametrize("threads", [1, 2])
def test_workspace_of_m5_at_batch_16(saved, threads):
    program = evit_fast.load(saved["m5"])
    m = _native.Model(program.program, program.blob.data_ptr(), program.blob.numel())
    assert m.workspace_bytes(16, 224, 224, threads) <= 24 * MIB


# --- allocations

COUNT = """
import ctypes, sys, torch
import evit_fast
from evit_fast.bench.weights import randomize
counter = ctypes.CDLL(None)
for function in (counter.large_allocations, counter.large_allocation_bytes):
    function.restype = ctypes.c_long
eager = evit_fast.create_model("m0").eval()
randomize(eager)
models = {"fused": evit_fast.accelerate(eager), "loaded": evit_fast.load(sys.argv[1])}
planar = torch.randn(32, 3, 96, 96)
inputs = {
    "planar": planar,
    "channels last": planar.contiguous(memory_format=torch.channels_last),
    "pixels": torch.randint(0, 256, (32, 3, 96, 96), dtype=torch.uint8),
    "one image": planar[:1],
}
for threads in (1, 2):
    torch.set_num_threads(threads)
    for name, model in models.items():
        for kind, x in inputs.items():
            with torch.inference_mode():
                for turn in range(3):  # the first may grow the workspace
                    n, size = counter.large_allocations(), counter.large_allocation_bytes()
                    y = model(x)
                    n = counter.large_allocations() - n
                    size = counter.large_allocation_bytes() - size
            large = y.numel() * y.element_size()
            want = (1, large) if large > 65536 else (0, 0)
            assert (n, size) == want, (threads, name, kind, n, size)
            del y
print("ok")
"""


def test_a_forward_allocates_its_output_alone(saved, tmp_path):
    preload = {"LD_PRELOAD": str(allocation_counter(tmp_path))}
    script = (sys.executable, "-c", COUNT, saved["m0"])
    assert run(*script, env=os.environ | preload, cwd="/") == "ok\n"


# --- resident memory

RESIDENT = """
import sys, torch
def resident():
    line = next(line for line in open("/proc/self/status") if line.startswith("VmRSS"))
    return int(line.split()[1]) * 1024
with torch.inference_mode():
    x = torch.rand(1, 3, 224, 224)
    torch.nn.functional.linear(x[0, 0], x[0, 1])  # torch's own libraries are in memory
    before = resident()
    import evit_fast
    program = evit_fast.load(sys.argv[1])
    for turn in range(3):
        program(x)
    print(resident() - before, program.blob.numel())
"""


def test_resident_memory_of_a_process_that_classifies(saved):
    used, weights = map(int, run(sys.executable, "-c", RESIDENT, saved["m5"], cwd="/").split())
    assert used >= weights, "the weights are not in memory: the measurement is wrong"
    assert used <= 1.3 * weights + 16 * MIB, f"{used / MIB:.1f} MiB, {weights / MIB:.1f} of weights"
