"""cga's CUDA kernels on the emulator, against the float64 reference."""

from __future__ import annotations

import ctypes

import pytest
import torch

from evit_fast.cuda import cga as cuda
from evit_fast.cuda.kernels import KINDS
from evit_fast.ops import cga
from tests.emulator.building import ORDERS, library
from tests.emulator.cases import check, run, targets
from tests.ops.eager import Case, cases
from tests.ops.test_cga import random_weights

MODELS = ("M0.0", "M0.2", "M5.0")
TINY = cga.Shape(32, 2, 16, 3, (3, 1))  # 9 tokens a window: compiles fast


def model_cases() -> list:
    """Every order for the usual ones, and one for the others."""
    return [
        pytest.param(
            case,
            order,
            id=f"{case.name}-{order}",
            marks=() if case.name in MODELS else pytest.mark.full,
        )
        for case in cases("cga")
        for order in ORDERS
        if case.name in MODELS or order == "shuffled"
    ]


@pytest.mark.parametrize(("arch", "dtype"), targets())
@pytest.mark.parametrize(("case", "order"), model_cases())
def test_equals_reference(case: Case, order: str, arch: int, dtype: torch.dtype):
    x = torch.randn(1, case.side, case.side, case.shape.C).to(dtype)
    check(run(case.shape, case.weights, x, arch, dtype, order=order))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("arch", "dtype"), targets())
@pytest.mark.parametrize("B", [1, 3])
@pytest.mark.parametrize("size", [(7, 7), (5, 9), (1, 1)], ids=lambda v: "{}x{}".format(*v))
def test_ragged_maps(size: tuple[int, int], B: int, arch: int, dtype: torch.dtype, order: str):
    w = random_weights(TINY)
    check(run(TINY, w, torch.randn(B, *size, TINY.C).to(dtype), arch, dtype, order=order))


@pytest.mark.parametrize(("arch", "dtype"), targets(("sm_70-f16",)))
@pytest.mark.parametrize("window", [pytest.param(9, marks=pytest.mark.full), 14])
def test_more_than_64_tokens(window: int, arch: int, dtype: torch.dtype):
    s = cga.Shape(32, 2, 16, window, (5, 3))
    check(run(s, random_weights(s), torch.randn(1, 8, 17, s.C).to(dtype), arch, dtype))


@pytest.mark.parametrize(("arch", "dtype"), targets(("sm_80-f16",)))
def test_same_bits_for_every_batch(arch: int, dtype: torch.dtype):
    s = cga.Shape(128, 2, 16, 4, (5, 3))  # four windows to a block, the last block has fewer
    w, x = random_weights(s), torch.randn(5, 4, 6, s.C).to(dtype)
    whole = run(s, w, x, arch, dtype, deterministic=True)
    check(whole)
    for B in (1, 3):
        assert torch.equal(run(s, w, x[:B], arch, dtype, deterministic=True).y, whole.y[:B])
    # Configs differ in who sums, never in the order of a sum.
    assert torch.equal(run(s, w, x, arch, dtype).y, whole.y)


@pytest.mark.parametrize(("arch", "dtype"), targets(("sm_80-f16",)))
@pytest.mark.parametrize(
    "fused", [True, pytest.param(False, marks=pytest.mark.full)], ids=["inside", "apart"]
)
def test_any_kind_in_and_out(fused: bool, arch: int, dtype: torch.dtype):
    s = TINY if not fused else cga.Shape(32, 2, 16, 5, (3, 1))
    assert (cuda.scratch(s, dtype, 1, 5, 5) == 0) == fused
    w, x = random_weights(s), torch.randn(1, 5, 6, s.C)
    for x_dtype, y_dtype in ((torch.float32, dtype), (dtype, torch.float32)):
        check(run(s, w, x.to(x_dtype), arch, dtype, y_dtype=y_dtype))


@pytest.mark.parametrize(("arch", "dtype"), targets())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_fill_their_window_alone(value: float, arch: int, dtype: torch.dtype):
    w = random_weights(TINY)
    for token, channel in (((1, 1), 3), ((4, 5), 20)):  # in the first head, in the second
        x = torch.randn(2, 5, 9, TINY.C).to(dtype)
        x[1, token[0], token[1], channel] = value
        r = run(TINY, w, x, arch, dtype)
        assert r.want.isnan().any() and not r.want.isnan().all()
        assert torch.equal(r.y.isnan(), r.want.isnan())
        assert torch.equal(r.y.isinf(), r.want.isinf())


@pytest.mark.parametrize(("arch", "dtype"), targets())
def test_widely_spread_scores(arch: int, dtype: torch.dtype):
    w = random_weights(TINY, spread=60.0)
    check(run(TINY, w, torch.randn(2, 6, 6, TINY.C).to(dtype), arch, dtype))


def test_no_images():
    packed = cuda.prepare(random_weights(TINY), TINY, torch.float16, 80)
    x = torch.empty(0, 7, 7, TINY.C, dtype=torch.float16)
    assert cuda.plan(x, x, packed, TINY, None, arch=80) == []


@pytest.mark.parametrize(
    ("shape", "dtype", "arch", "words"),
    [
        (cga.Shape(144, 1, 16, 7, (3,)), torch.float16, 80, "at most 128 channels a head"),
        (cga.Shape(64, 4, 16, 15, (3,) * 4), torch.float16, 80, "at most 14x14"),
        (cga.Shape(2048, 16, 16, 4, (3,) * 16), torch.float16, 75, "bytes of shared memory"),
        (cga.Shape(96, 1, 16, 14, (3,)), torch.float32, 75, "bytes of shared memory"),
        (TINY, torch.bfloat16, 75, "bfloat16 needs sm_80"),
    ],
)
def test_says_why_not(shape: cga.Shape, dtype: torch.dtype, arch: int, words: str):
    assert words in (cuda.supports(shape, dtype, arch) or "")


@pytest.mark.parametrize("arch", [70, 75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_supports_every_model(arch: int, dtype: torch.dtype):
    if dtype == torch.bfloat16 and arch < 80:
        return
    for case in cases("cga"):
        assert cuda.supports(case.shape, dtype, arch) is None


LAUNCHES = """
#include "cga.cuh"
extern "C" int shared_bytes(const evit::cuda::CgaSizes* s, int family) {
  return evit::cuda::cga_attention_launch(*s, family, 1, 1, 1).shared_bytes;
}
extern "C" int projection_bytes(const evit::cuda::CgaSizes* s, int family) {
  return evit::cuda::cga_projection_launch(*s, family, 1, 1, 1).shared_bytes;
}
int main() {}
"""


def test_shared_memory_is_what_the_header_says(tmp_path):
    """The header compiles as C++17 without the emulator; Python's bytes are its."""
    (tmp_path / "launches.cpp").write_text(LAUNCHES)
    flags = ("-std=c++17", "-Wno-unused-function")
    header = library(tmp_path / "launches.so", tmp_path / "launches.cpp", *flags)
    shapes = [case.shape for case in cases("cga")]
    shapes += [cga.Shape(32, 2, 16, window, (5, 3)) for window in (1, 3, 5, 6, 9, 12, 14)]
    for s in shapes:
        for tiles in (0, 70, 75, 80):
            for windows in (1, 1000):
                a = cuda.attention_config(s, tiles, windows, False)
                p = cuda.projection_config(s, tiles, windows, False)
                numbers = cuda.sizes(s, a, p, KINDS[torch.float16], KINDS[torch.float16])
                fields = (ctypes.c_int * 64)(*numbers)  # the heads that are not there: 0
                assert header.shared_bytes(fields, tiles) == cuda.shared_bytes(s, a, tiles)
                wanted = cuda.projection_bytes(s, p, tiles)
                assert header.projection_bytes(fields, tiles) == wanted
