"""patch_merge's CUDA kernels on the emulator, both forms, against the float64 reference."""

from __future__ import annotations

import ctypes

import pytest
import torch
from torch import Tensor

from evit_fast.cuda import patch_merge as cuda
from evit_fast.cuda.kernels import family
from evit_fast.ops.patch_merge import Shape, Weights, out_hw, reference
from evit_fast.program import map_arrays
from tests.emulator.building import ORDERS, emulate, library
from tests.emulator.cases import CANARY, EDGE, TARGETS, USUAL, Run, check, guarded, targets
from tests.ops.eager import Case, cases

MODELS = ("M0.0", "M5.1")
SMALL = Shape(32, 112, 16, 48)  # two steps, the second of them ragged
MAPS = ((3, 7, 7), (1, 5, 9), (3, 1, 1), (1, 14, 14))
FORMS = {
    "whole-16": cuda.Whole(64, 64, 8, 2, 16, 1),  # a tile holds one map of 7 x 7, the block two
    "whole-49": cuda.Whole(112, 64, 4, 1, 49, 1),
    "pair-16": cuda.Whole(112, 64, 4, 2, 16, 2),  # a tile holds two maps of 7 x 7
    "pair-49": cuda.Whole(112, 128, 8, 2, 49, 1),
    "few": "few",
    "many": "many",
}
USUAL_FORMS = ("whole-49", "pair-16", "few", "many")


def random_weights(s: Shape) -> Weights:
    generator = torch.Generator().manual_seed(sum((s.C, s.F, s.R, s.CO)))

    def values(*shape: int) -> Tensor:
        scale = shape[-1] ** 0.5 if len(shape) == 2 else 2.0
        return torch.randn(shape, dtype=torch.float64, generator=generator) / scale

    return Weights(
        values(s.F, s.C), values(s.F), values(s.F, 3, 3), values(s.F), values(s.R, s.F),
        values(s.R), values(s.F, s.R), values(s.F), values(s.CO, s.F), values(s.CO),
    )  # fmt: skip


def tokens(dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).to(dtype)


def rows(
    form: str, s: Shape, dtype: torch.dtype, arch: int, H: int, W: int
) -> cuda.Whole | cuda.Split | None:
    """The rows of a form's name; None where the map has more outputs than it has room for."""
    OH, OW = out_hw(H, W)
    chosen = FORMS[form]
    if isinstance(chosen, cuda.Whole):
        return chosen if OH * OW <= chosen.outputs else None
    return cuda.split_config(s, family(arch, dtype), arch, form == "few", OH * OW)


def run(
    s: Shape,
    w: Weights,
    x: Tensor,
    arch: int,
    dtype: torch.dtype,
    form: cuda.Whole | cuda.Split,
    *,
    order: str = "ascending",
    y_dtype: torch.dtype | None = None,
) -> Run:
    """On a poisoned output and workspace, with canaries around both."""
    B, H, W, _ = x.shape
    shape = (B, *out_hw(H, W), s.CO)
    packed = cuda.prepare(map_arrays(w, lambda a: a.float()), s, dtype, family(arch, dtype))
    y, y_whole = guarded(torch.Size(shape).numel(), y_dtype or x.dtype, float("nan"))
    scratch = 0
    if isinstance(form, cuda.Split):
        scratch = cuda.split_bytes(s, dtype, B, H, W, form)
    space, space_whole = guarded(scratch, torch.uint8, 255)
    y = y.view(shape)
    emulate(cuda.plan(y, x, packed, s, space, arch=arch, form=form), order, seed=1)
    for whole in (y_whole, space_whole):
        assert (whole[:EDGE] == CANARY).all() and (whole[-EDGE:] == CANARY).all(), "out of bounds"
    return Run(y, reference(x.double(), w, s), s, w, x, dtype)


def forms(usual: tuple[str, ...] = USUAL_FORMS) -> list:
    return [pytest.param(form, marks=() if form in usual else pytest.mark.full) for form in FORMS]


def model_cases() -> list:
    return [
        pytest.param(
            case,
            side,
            *target,
            id=f"{case.name}-{side}x{side}-{name}",
            marks=()
            if case.name in MODELS and side == case.side and name in USUAL
            else pytest.mark.full,
        )
        for case in cases("patch_merge")
        for side in (7, 14)
        for name, target in TARGETS.items()
    ]


@pytest.mark.parametrize("batch", ["few", "many"])
@pytest.mark.parametrize(("case", "side", "arch", "dtype"), model_cases())
def test_equals_reference(case: Case, side: int, arch: int, dtype: torch.dtype, batch: str):
    """The forms that the tables take for one image and, deterministic, for any number."""
    s = case.shape
    where = (s, family(arch, dtype), arch, 1, side, side, batch == "many")
    form = cuda.whole_form(*where) or cuda.split_form(*where)
    check(run(s, case.weights, tokens(dtype, 1, side, side, s.C), arch, dtype, form))


@pytest.mark.parametrize(("arch", "dtype"), targets())
@pytest.mark.parametrize("form", forms())
def test_ragged_maps_and_orders(form: str, arch: int, dtype: torch.dtype):
    w = random_weights(SMALL)
    for size in (*MAPS, (1, 17, 30), (1, 2, 100)):
        if chosen := rows(form, SMALL, dtype, arch, *size[1:]):
            x, found = tokens(dtype, *size, SMALL.C), None
            for order in ORDERS:
                r = run(SMALL, w, x, arch, dtype, chosen, order=order)
                check(r)
                assert found is None or torch.equal(r.y, found)
                found = r.y


@pytest.mark.parametrize(("arch", "dtype"), targets())
@pytest.mark.parametrize("form", forms(("pair-16", "pair-49", "few", "many")))
def test_same_bits_for_every_batch(form: str, arch: int, dtype: torch.dtype):
    w = random_weights(SMALL)
    for H, W in ((7, 7), (4, 5), (14, 14)):
        if chosen := rows(form, SMALL, dtype, arch, H, W):
            x = tokens(dtype, 3, H, W, SMALL.C)
            y = run(SMALL, w, x, arch, dtype, chosen).y
            for i in range(3):  # an image is once the first of its block, once the second
                alone = run(SMALL, w, x[i : i + 1].clone(), arch, dtype, chosen).y
                assert torch.equal(alone, y[i : i + 1])


@pytest.mark.parametrize(("arch", "dtype"), targets())
@pytest.mark.parametrize("form", forms())
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_nan_and_inf_stay_in_their_image(value: float, form: str, arch: int, dtype: torch.dtype):
    w, chosen = random_weights(SMALL), rows(form, SMALL, dtype, arch, 7, 7)
    for token, channel in (((6, 6), 3), ((0, 2), 20)):
        x = tokens(dtype, 3, 7, 7, SMALL.C)
        x[1, token[0], token[1], channel] = value
        r = run(SMALL, w, x, arch, dtype, chosen)
        assert r.want[1].isnan().any() and r.want[[0, 2]].isfinite().all()
        assert torch.equal(r.y.isnan(), r.want.isnan())
        assert torch.equal(r.y.isinf(), r.want.isinf())


@pytest.mark.parametrize(("arch", "dtype"), targets(("sm_80-f16",)))
@pytest.mark.parametrize("form", forms(("whole-49", "many")))
def test_any_kind_in_and_out(form: str, arch: int, dtype: torch.dtype):
    w, x = random_weights(SMALL), tokens(torch.float32, 2, 7, 7, SMALL.C)
    chosen = rows(form, SMALL, dtype, arch, 7, 7)
    for x_dtype, y_dtype in ((torch.float32, dtype), (dtype, torch.float32)):
        check(run(SMALL, w, x.to(x_dtype), arch, dtype, chosen, y_dtype=y_dtype))


@pytest.mark.parametrize(("arch", "dtype"), targets(("sm_80-f16",)))
@pytest.mark.parametrize("form", forms(("whole-49", "few")))
def test_gate_saturates_without_overflow(form: str, arch: int, dtype: torch.dtype):
    w = random_weights(SMALL)._replace(se2_bias=torch.linspace(-400.0, 400.0, SMALL.F).double())
    chosen = rows(form, SMALL, dtype, arch, 7, 7)
    check(run(SMALL, w, tokens(dtype, 1, 7, 7, SMALL.C), arch, dtype, chosen))


def test_no_images():
    packed = cuda.prepare(random_weights(SMALL), SMALL, torch.float16, 80)
    x, y = (torch.empty(0, 7, 7, n, dtype=torch.float16) for n in (SMALL.C, SMALL.CO))
    assert cuda.plan(y, x, packed, SMALL, None, arch=80) == []


def test_forms():
    """Whole images where a map fits on chip and images are many; deterministic never by B."""
    shape = {case.name: case.shape for case in cases("patch_merge")}
    for name, arch, side, fits in (
        ("M0.0", 75, 14, True), ("M0.0", 70, 14, True), ("M3.0", 80, 14, True),
        ("M5.0", 80, 14, True), ("M5.0", 90, 14, True), ("M5.0", 70, 14, False),
        ("M5.1", 70, 7, True), ("M5.1", 75, 7, False), ("M0.0", 90, 15, False),
    ):  # fmt: skip
        where = (shape[name], family(arch, torch.float16), arch)
        for B in (1, 1000):
            assert (cuda.whole_form(*where, B, side, side, True) is not None) == fits
            found = cuda.whole_form(*where, B, side, side, False)
            assert (found is not None) == (fits and B > 1)
            split = cuda.split_form(*where, B, side, side, True)
            assert split == cuda.split_form(*where, 1000, side, side, True)


@pytest.mark.parametrize("arch", [70, 75, 80, 86, 89, 90, 100, 120])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_supports_every_model(arch: int, dtype: torch.dtype):
    if dtype == torch.bfloat16 and arch < 80:
        return
    for case in cases("patch_merge"):
        assert cuda.supports(case.shape, dtype, arch) is None


@pytest.mark.parametrize(
    ("shape", "dtype", "arch", "words"),
    [
        (Shape(4096, 16, 16, 16), torch.float16, 75, "C=4096 in float16"),
        (SMALL, torch.bfloat16, 75, "bfloat16 needs sm_80"),
        (SMALL, torch.float16, 61, "sm_70 or newer"),
    ],
)
def test_says_why_not(shape: Shape, dtype: torch.dtype, arch: int, words: str):
    assert words in (cuda.supports(shape, dtype, arch) or "")


def test_scratch_holds_every_form():
    for case in cases("patch_merge"):
        for B, H, W in ((1, 7, 7), (9, 14, 14), (200, 7, 7), (200, 14, 14), (2, 33, 20)):
            for dtype in (torch.float16, torch.float32):
                space = cuda.scratch(case.shape, dtype, B, H, W)
                assert space % 256 == 0
                for arch in cuda.SHARED_KIB:
                    for deterministic in (False, True):
                        where = (case.shape, family(arch, dtype), arch, B, H, W, deterministic)
                        if cuda.whole_form(*where) is None:
                            form = cuda.split_form(*where)
                            assert cuda.split_bytes(case.shape, dtype, B, H, W, form) <= space


LAUNCHES = """
#include "patch_merge.cuh"
using namespace evit::cuda;
extern "C" int shared_bytes(const PatchMergeSizes* s, int family, int whole) {
  return patch_merge_memory(*s, family, whole).end;
}
extern "C" int tiles(const PatchMergeSizes* s, long H, long W) {
  const PatchMergeTiling t = patch_merge_tiling(*s, H, W);
  const auto reach = [](int outputs, int n) {
    const int all = (n + 1) / 2;
    if (outputs >= all) return n;
    return 2 * outputs >= all && n - 2 * outputs + 1 <= 2 * outputs ? 2 * outputs : 2 * outputs + 1;
  };
  const bool held = t.images * reach(t.rows, int(H)) * reach(t.columns, int(W)) <= s->tokens;
  return held ? t.down * t.across : -1;
}
"""


def test_header_and_python_agree(tmp_path):
    """The header compiles as C++17 without the emulator; bytes and tiles are Python's."""
    (tmp_path / "launches.cpp").write_text(LAUNCHES)
    flags = ("-std=c++17", "-Wno-unused-function")
    header = library(tmp_path / "launches.so", tmp_path / "launches.cpp", *flags)
    all_rows = [row for table in (cuda.WHOLE, cuda.HIDDEN) for v in table.values() for row in v]
    for case in cases("patch_merge"):
        for row in all_rows:
            fields = cuda.sizes(case.shape, 1, 1, tile=row)
            numbers = (ctypes.c_int * len(fields))(*fields)
            for tiles in (0, 70, 75, 80):
                wanted = cuda.shared_bytes(case.shape, row, tiles)
                found = header.shared_bytes(numbers, tiles, isinstance(row, cuda.Whole))
                assert found == wanted
    for tokens_ in (16, 48, 64, 80, 112):
        fields = cuda.sizes(SMALL, 1, 1, tile=cuda.Hidden(tokens_, 64, 4, 2, 1, 1))
        numbers = (ctypes.c_int * len(fields))(*fields)
        for H in range(1, 40):
            for W in range(1, 40):
                found = header.tiles(numbers, ctypes.c_long(H), ctypes.c_long(W))
                assert found == cuda.tiles(tokens_, H, W) > 0
