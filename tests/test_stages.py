"""Times of the stages inside the fused ops: which there are, what they add up to, the same bits."""

from __future__ import annotations

import threading
import time
from functools import lru_cache
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from evit_fast import _native
from evit_fast.config import Config
from evit_fast.fold import build, fold
from evit_fast.model import EfficientVit
from evit_fast.ops.cga import Shape as Cga
from tests.native_build import isa_objects, run
from tests.ops import columns
from tests.ops.columns import ISAS, Guarded, blob_of, instruction_set
from tests.ops.eager import MEAN, STD, model, tensors
from tests.ops.test_cga import random_weights
from tests.randomize import randomize

STAGES = {
    "stem": ["load", "conv1", "conv2", "conv3", "conv4"],
    "dw_ffn": ["depthwise", "up", "down"],
    "cga": ["gather", "qkv", "depthwise", "scores", "softmax", "values", "project"],
    "patch_merge": ["expand", "depthwise", "squeeze", "excite", "gate", "project"],
    "classifier": ["pool", "linear"],
}
CLOCK = 1e-6  # seconds: what reading the clocks may add
SMALL = Config("small", (64, 64, 64), (1, 1, 1), (4, 2, 4), (5, 3, 3, 1))


class Timed(NamedTuple):
    y: Tensor
    stages: list[list[tuple[str, float]]]
    wall: float  # seconds around the call

    def total(self) -> float:
        return sum(seconds for op in self.stages for _, seconds in op)


def stage_times(program: str, blob: Tensor, x: Tensor, threads: int = 1) -> Timed:
    """One timed run on poisoned buffers whose canaries are checked."""
    m = _native.Model(program, blob.data_ptr(), blob.numel())
    H, W = x.shape[2:] if program.startswith("stem ") else x.shape[1:3]
    shape = m.output_shape(x.shape[0], H, W)
    y = Guarded(torch.Size(shape).numel())
    nbytes = m.workspace_bytes(x.shape[0], H, W, threads)
    space = Guarded(nbytes // 4)
    kind = str(x.dtype).removeprefix("torch.")
    start = time.perf_counter()
    stages = m.stage_times(
        x.data_ptr(), kind, list(x.shape), list(x.stride()), y.view.data_ptr(),
        space.view.data_ptr(), nbytes, threads,
    )  # fmt: skip
    wall = time.perf_counter() - start
    y.check(f"{program}: output")
    space.check(f"{program}: workspace")
    return Timed(y.view.view(shape), stages, wall)


@lru_cache(maxsize=1)
def m5_ops() -> dict[str, tuple[str, Tensor, Tensor]]:
    """(program, blob, two images of its input) of the first op of each kind in M5."""
    found, side = {}, 14
    for shape, weights in fold(model("efficientvit_m5"), MEAN, STD):
        if shape.op not in found:
            size = (3, 224, 224) if shape.op == "stem" else (side, side, shape.C)
            found[shape.op] = (*blob_of(shape, tensors(weights)), torch.randn(2, *size))
    return found


@lru_cache(maxsize=1)
def small() -> tuple[str, Tensor]:
    m = randomize(EfficientVit(SMALL, num_classes=5), seed=1).eval()
    return build(fold(m, MEAN, STD))


OPS = pytest.mark.parametrize("op", STAGES)
EVERY_ISA = pytest.mark.parametrize("isa", ISAS)


def test_stages_of_each_op():
    assert _native.stages() == STAGES


@EVERY_ISA
@OPS
def test_one_op(op: str, isa: str):
    """The bits of an untimed run; every stage took time, all together not more than the call."""
    program, blob, x = m5_ops()[op]
    with instruction_set(isa):
        runs = [stage_times(program, blob, x) for _ in range(5)]
        want = columns.run(program, blob, x)
    for r in runs:
        assert torch.equal(r.y, want), "timed and untimed runs have different bits"
        (stages,) = r.stages
        assert [name for name, _ in stages] == STAGES[op]
        assert all(seconds > 0 for _, seconds in stages), stages
        assert r.total() <= 1.05 * r.wall + CLOCK
    # Nothing but the call itself is outside the stages.
    assert max(r.total() / r.wall for r in runs) > 0.5


@EVERY_ISA
@pytest.mark.parametrize("dtype", [torch.float32, torch.uint8])
def test_whole_program(dtype: torch.dtype, isa: str):
    """All images and all groups of them add to the op they went through."""
    program, blob = small()
    x = (torch.rand(19, 3, 64, 48) * 255).to(dtype)
    with instruction_set(isa):
        r = stage_times(program, blob, x)
        assert torch.equal(r.y, columns.run(program, blob, x))
    ops = [line.split()[0] for line in program.split("\n")]
    assert [[name for name, _ in stages] for stages in r.stages] == [STAGES[op] for op in ops]
    assert all(sum(seconds for _, seconds in stages) > 0 for stages in r.stages)
    assert r.total() <= 1.05 * r.wall + CLOCK


@EVERY_ISA
@pytest.mark.parametrize("window", [5, 7], ids=["any-window", "lone-query"])
def test_windows_have_the_same_bits(window: int, isa: str):
    s = Cga(64, 2, 16, window, (5, 3))
    program, blob = blob_of(s, random_weights(s))
    for side in (window, window + 2):
        x = torch.randn(3, side, side, s.C)
        with instruction_set(isa):
            assert torch.equal(stage_times(program, blob, x).y, columns.run(program, blob, x))


def test_no_images():
    program, blob = small()
    r = stage_times(program, blob, torch.empty(0, 3, 64, 48))
    assert len(r.stages) == len(program.split("\n")) and r.total() == 0


def test_several_threads_are_refused():
    program, blob, x = m5_ops()["dw_ffn"]
    with pytest.raises(ValueError, match=r"^stage times need one thread, got 2$"):
        stage_times(program, blob, x, threads=2)


def test_callers_have_clocks_of_their_own():
    program, blob, x = m5_ops()["dw_ffn"]
    x = x.repeat(32, 1, 1, 1)  # tens of milliseconds: callers on one processor meet as well
    want = columns.run(program, blob, x)
    start, found = threading.Barrier(2), {}

    def call(i: int) -> None:
        start.wait(60)
        found[i] = [stage_times(program, blob, x) for _ in range(4)]

    callers = [threading.Thread(target=call, args=(i,)) for i in range(2)]
    for t in callers:
        t.start()
    for t in callers:
        t.join(60)
    for runs in (found[0], found[1]):
        assert all(torch.equal(r.y, want) for r in runs)
        assert all(r.total() <= 1.05 * r.wall + CLOCK for r in runs)
        assert sum(r.total() for r in runs) > 0.5 * sum(r.wall for r in runs)


@EVERY_ISA
def test_only_the_timed_kernels_have_a_clock(isa: str):
    def clocks(form: str) -> list[str]:
        return [p.name for p in isa_objects(form) if "enter_stage" in run("nm", "--undefined", p)]

    assert clocks(isa) == []
    assert sorted(clocks(f"{isa}_stages")) == sorted(f"{op}.cpp.o" for op in STAGES)
