"""The counters on a kernel whose traffic is known, and the traffic of the shipped ones."""

from __future__ import annotations

import ctypes
from pathlib import Path

import pytest
import torch

from tests.emulator.building import compile_emulated
from tests.emulator.counting import BufferCounts, SharedCounts
from tests.emulator.sectors import row
from tests.ops.eager import Case, cases

ALLOWED = 1.15  # distinct sectors over cost()

# Ops that write something for their next launch, and why. cost() does not count it; at batch 16 it
# stays in an L2 of 6 MiB for all but the stem.
THROUGH_MEMORY = {
    "stem": "maps 2 and 3: four convolutions in one block would compute their borders many times",
    "dw_ffn": "float32 partial sums where tokens are few: more SMs draw the weights",
    "cga": "relu(concat) where C > 96: two attention blocks fit on an SM",
    "patch_merge": "the hidden map: its gate needs the mean over the whole image",
}
READ_AGAIN = {"cga": 1.5}  # x for the residual, in the projection of its own: most without scratch

KERNEL = """
#include "instructions.cuh"
using namespace evit::cuda;
static void kernel(const float* x, float* y, int stride) {
  float* s = reinterpret_cast<float*>(shared_memory());
  const int i = thread_id();
  s[i * stride] = x[i * stride];
  sync_warp();
  if (i % 2 == 0) y[i] = s[i];
  const f32x4 wide = load_f32x4(x + i * 4);
  for (int turn = 0; turn < 3; turn++) store_vector(s + i * 4, wide);
  for (int k = 0; k < i % 4; k++) s[32 * k] = 1;
}
extern "C" void run(const float* x, float* y, int stride) {
  emulator::Launch launch;
  launch.grid.x = 2;
  launch.block.x = 32;
  launch.shared_bytes = 32 * 32 * 4;
  void* args[] = {&x, &y, &stride};
  emulator::run_kernel(&kernel, launch, args);
}
"""


@pytest.fixture(scope="module")
def counted(tmp_path_factory) -> ctypes.CDLL:
    folder: Path = tmp_path_factory.mktemp("counted")
    source = folder / "kernel.cpp"
    source.write_text(KERNEL)
    return ctypes.CDLL(str(compile_emulated(folder / "kernel.so", source, build="counts")))


@pytest.mark.parametrize(
    ("stride", "sectors", "free", "turns"),
    # Two blocks; a block has one strided store, one load of every other word, three wide stores of
    # four turns each, and lanes that store 0, 1, 2 or 3 times to a word that all share.
    [(1, 4, 1, 1), (2, 8, 0, 2), (8, 32, 0, 8), (32, 32, 0, 32)],
)
def test_counts_what_is_known(counted, stride: int, sectors: int, free: int, turns: int):
    x, y = torch.zeros(32 * 32), torch.zeros(32)
    addresses = (ctypes.c_void_p * 2)(x.data_ptr(), y.data_ptr())
    counted.watch(2, addresses, (ctypes.c_long * 2)(4 * x.numel(), 4 * y.numel()))
    counted.run(ctypes.c_void_p(x.data_ptr()), ctypes.c_void_p(y.data_ptr()), stride)
    found, shared = (BufferCounts * 2)(), SharedCounts()
    counted.counts(found, ctypes.byref(shared))
    assert (found[0].instructions, found[1].instructions) == (4, 2)
    assert found[0].sectors == 2 * (sectors + 16)
    first = set(range(0, 32 * 4, 8))  # words of the wide load, by sector
    assert found[0].read == len({w // 8 for w in first | {i * stride for i in range(32)}})
    assert (found[0].written, found[1].read, found[1].written, found[1].sectors) == (0, 0, 4, 8)
    accesses, wide = 1 + 1 + 3 + 3, 3 * 4
    assert shared.instructions == 2 * accesses
    assert shared.conflict_free == 2 * (accesses - 1 + free)
    assert shared.least_wavefronts == 2 * (5 + wide)
    assert shared.wavefronts == 2 * (4 + turns + wide)


def shipped() -> list:
    return [
        pytest.param(case, arch, id=f"{case.name}-{op}-sm_{arch}", marks=marks)
        for op in ("stem", "dw_ffn", "cga", "patch_merge", "classifier")
        for case in cases(op)
        for arch in (70, 80)
        if case.name.startswith(("M0.0", "M5."))
        for marks in [() if case.name == "M0.0" and arch == 80 else pytest.mark.full]
    ]


@pytest.mark.parametrize(("case", "arch"), shipped())
def test_memory_traffic_is_near_the_cost(case: Case, arch: int):
    found = row(case, 2, arch)
    if found["scratch"]:
        most = READ_AGAIN.get(case.shape.op, ALLOWED)
        assert float(found["ratio_without_scratch"]) <= most, found
        assert case.shape.op in THROUGH_MEMORY, found
    else:
        assert float(found["ratio"]) <= ALLOWED, found
