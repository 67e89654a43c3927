"""Programs: text, slices, shapes, unpacking the blob, and the reference column in every dtype."""

from __future__ import annotations

import copy
import dataclasses
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from evit_fast import _native, program
from evit_fast.fold import build, fold
from evit_fast.ops import OPS, cga, classifier, dw_ffn, patch_merge, stem
from evit_fast.ops.line import arrays
from tests.close import assert_close, budget
from tests.ops.eager import MEAN, STD, cases, model

ROOT = Path(__file__).parents[1]
DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]


def name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@pytest.fixture(scope="module")
def m5() -> tuple[str, Tensor]:
    return build(fold(model("efficientvit_m5"), MEAN, STD), torch.float64)


# ---- text

LINES = {
    "stem in=3 C=192 at=0": stem.Shape(in_=3, C=192),
    "dw_ffn C=192 F=384 at=0": dw_ffn.Shape(C=192, F=384),
    "cga C=192 heads=3 dk=16 window=7 ks=7,5,3 at=0": cga.Shape(192, 3, 16, 7, (7, 5, 3)),
    "cga C=64 heads=1 dk=16 window=4 ks=5 at=0": cga.Shape(64, 1, 16, 4, (5,)),
    "patch_merge C=192 F=768 R=192 CO=288 at=0": patch_merge.Shape(192, 768, 192, 288),
    "classifier C=384 N=0 at=0": classifier.Shape(C=384, N=0),
}


@pytest.mark.parametrize("line", LINES)
def test_line_and_shape_are_the_same(line: str):
    shape = LINES[line]
    assert shape.line() == line
    assert OPS[shape.op].parse(line) == shape
    longer = line.replace(" at=0", " dtype=bfloat16 at=640")
    assert shape.line(640, torch.bfloat16) == longer
    (op,) = program.parse(longer)
    assert op == program.Op(shape.op, shape, torch.bfloat16, 640, longer)


def test_ops_and_fields_are_those_of_the_grammar():
    grammar = _native.grammar()
    assert list(OPS) == list(grammar)
    for name, op in OPS.items():
        fields = [field.name.rstrip("_") for field in dataclasses.fields(op.Shape)]
        assert fields == [field["name"] for field in grammar[name]]
        assert op.Shape.op == name and callable(getattr(op, name))


@pytest.mark.parametrize("op", OPS)
def test_weights_are_the_sections(op: str):
    """Names and natural shapes of what Python folds are those the native library lays out."""
    for case in cases(op):
        folded = arrays(case.weights)
        sections = {s["name"]: s for s in _native.layout(case.shape.line())}
        assert set(folded) == set(sections)
        for name, array in folded.items():
            assert array.shape == tuple(sections[name]["dims"])


@pytest.mark.parametrize(
    "make,fact",
    [
        (lambda: cga.Shape(200, 3, 16, 7, (7, 5, 3)), "cga: C=200"),
        (lambda: cga.Shape(192, 3, 16, 7, (7, 5)), "cga: ks has 2 values for 3 heads"),
        (lambda: cga.Shape(192, 3, 16, 7, (7, 5, 4)), "cga: ks=4"),
        (lambda: dw_ffn.Shape(C=24, F=48), "dw_ffn: C=24"),
        (lambda: stem.Shape(in_=0, C=64), "stem: in=0"),
        (lambda: classifier.Shape(C=64, N=-1), "classifier: N="),
        (lambda: dw_ffn.parse("cga C=64 heads=1 dk=16 window=4 ks=5 at=0"), "dw_ffn: expected"),
        (lambda: dw_ffn.parse("dw_ffn C=64"), "dw_ffn"),
        (lambda: program.parse(""), "unknown op"),
        (lambda: program.parse("stem in=3 C=64 at=0\ndw_ffn C=128 F=64 at=0"), "line 2"),
        (lambda: program.parse("dw_ffn C=64 F=64 at=32"), "multiple of 64"),
        (lambda: program.slice_("dw_ffn C=64 F=64 at=0", 1), "at least one line"),
    ],
)
def test_wrong_text_is_a_value_error(make, fact: str):
    with pytest.raises(ValueError, match=fact):
        make()


def test_the_documented_example_is_m5():
    text, _ = build(fold(model("efficientvit_m5"), MEAN, STD))
    example = (ROOT / "docs" / "format.md").read_text().split("```")[1].strip()
    assert set(example.split("\n")) <= set(text.split("\n"))


# ---- slices and shapes


def test_slices_keep_their_offsets(m5: tuple[str, Tensor]):
    text, _ = m5
    ops = program.parse(text)
    middle = program.slice_(text, 2, 9)
    assert program.parse(middle) == ops[2:9]
    assert program.parse(program.slice_(text, -1)) == ops[-1:]


@pytest.mark.parametrize("cut", [1, 6, 31])
def test_slices_compose_to_the_whole(m5: tuple[str, Tensor], cut: int):
    text, blob = m5
    x = torch.randn(2, 3, 80, 112, dtype=torch.float64)
    half = program.run_reference(x, program.slice_(text, 0, cut), blob)
    assert half.shape == program.output_shape(program.slice_(text, 0, cut), x.shape)
    assert half.is_contiguous()
    y = program.run_reference(half, program.slice_(text, cut), blob)
    assert torch.equal(y, program.run_reference(x, text, blob))


def test_walk_states_every_shape(m5: tuple[str, Tensor]):
    shapes = [out for _, _, out in program.walk(m5[0], (5, 3, 224, 200))]
    assert shapes[0] == (5, 14, 13, 192)
    assert shapes[5] == (5, 7, 7, 288)
    assert shapes[-2] == (5, 4, 4, 384)
    assert shapes[-1] == program.output_shape(m5[0], (5, 3, 224, 200)) == (5, 1000)
    assert program.output_shape("classifier C=64 N=0 at=0", (2, 9, 9, 64)) == (2, 64)


@pytest.mark.parametrize(
    "text,shape,fact",
    [
        ("stem in=3 C=64 at=0", (1, 4, 32, 32), r"stem: expected x \[B, C, H, W\] with C=3"),
        ("stem in=3 C=64 at=0", (3, 32, 32), "has 3 dimensions"),
        ("dw_ffn C=64 F=64 at=0", (1, 64, 7, 7), "with C=64, but C=7"),
        ("dw_ffn C=64 F=64 at=0", (1, 0, 7, 64), "at least 1x1, but x is 0x7"),
    ],
)
def test_shapes_that_do_not_fit(text: str, shape: tuple, fact: str):
    with pytest.raises(ValueError, match=fact):
        program.output_shape(text, shape)


# ---- unpacking


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
@pytest.mark.parametrize("op", OPS)
def test_unpack_undoes_pack(op: str, dtype: torch.dtype):
    """Every element comes back at its place, rounded once."""
    for case in cases(op)[:3]:
        # Other numbers than a folded model's: its attention bias is symmetric.
        want = program.map_arrays(case.weights, torch.randn_like)
        text, blob = build([(case.shape, want)], dtype)
        (line,) = program.parse(text)
        got = program.unpack(line, blob)
        assert type(got) is type(want)
        for field, a, b in zip(want._fields, got, want, strict=True):
            many = isinstance(b, tuple)
            for x, y in zip(a if many else [a], b if many else [b], strict=True):
                assert torch.equal(x, y.to(x.dtype)), field
                wide = y.dim() == 1 or field in ("dw", "bias", "pad_u8")
                exact = torch.float64 if dtype == torch.float64 else torch.float32
                assert x.dtype == (exact if wide else dtype), field
                assert x.is_contiguous()


def test_unpack_ignores_where_the_op_stands():
    case = cases("cga")[0]
    line = case.shape.line(at=1024)
    blob = torch.full((1024 + _native.op_bytes(line) + 64,), 255, dtype=torch.uint8)
    _native.pack(line, arrays(case.weights), blob.numpy())
    (op,) = program.parse(line)
    assert torch.equal(program.unpack(op, blob).proj, case.weights.proj.float())
    assert (blob[:1024] == 255).all() and (blob[-64:] == 255).all()


def test_unpacked_weights_are_kept_until_the_blob_changes():
    case = cases("dw_ffn")[0]
    text, blob = build([(case.shape, case.weights)])
    (op,) = program.parse(text)
    first = program.unpack(op, blob)
    assert program.unpack(op, blob) is first
    blob.zero_()
    assert not program.unpack(op, blob).w1.any()
    with torch.inference_mode():
        quiet = torch.zeros(blob.numel(), dtype=torch.uint8)
        program.unpack(op, quiet)
        quiet.fill_(1)
        assert program.unpack(op, quiet).w1.any()


def test_unpacked_weights_die_with_the_blob():
    case = cases("dw_ffn")[0]
    text, blob = build([(case.shape, case.weights)])
    (op,) = program.parse(text)
    kept = weakref.ref(program.unpack(op, blob).w1)
    assert kept() is not None
    del blob
    gc.collect()
    assert kept() is None


# ---- the reference column


@pytest.mark.parametrize("x_dtype", [torch.float32, torch.float16, torch.uint8], ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_reference_in_every_dtype(dtype: torch.dtype, x_dtype: torch.dtype):
    m = model("efficientvit_m1")
    text, blob = build(fold(m, MEAN, STD), dtype)
    if x_dtype == torch.uint8:
        x = torch.randint(0, 256, (2, 3, 96, 128), dtype=torch.uint8)
        mean, std = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (MEAN, STD))
        seen = (x.double() / 255 - mean) / std
    else:
        x = torch.randn(2, 3, 96, 128).to(x_dtype)
        seen = x.double()
    y = program.run_reference(x, text, blob)
    assert y.dtype == (torch.float32 if x_dtype == torch.uint8 else x_dtype)
    with torch.no_grad():
        want = m(seen)
        narrow = max((torch.float32, dtype, y.dtype), key=budget)
        eager = copy.deepcopy(m).to(narrow)(seen.to(narrow)).double()
    error = float((eager - want).norm() / want.norm())
    assert_close(y, want, budget(narrow, error), f"eager {error:.2g}")


def test_autocast_changes_nothing():
    text, blob = build(fold(model("efficientvit_m0"), MEAN, STD))
    x = torch.randn(1, 3, 64, 64)
    want = program.run_reference(x, text, blob)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(program.run_reference(x, text, blob), want)


def test_any_strides_and_no_images(m5: tuple[str, Tensor]):
    text, blob = m5
    x = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    want = program.run_reference(x, text, blob)
    last = x.contiguous(memory_format=torch.channels_last)
    assert_close(program.run_reference(last, text, blob), want, 1e-12)
    assert_close(program.run_reference(x.mT.contiguous().mT, text, blob), want, 1e-12)
    assert program.run_reference(x[:0], text, blob).shape == (0, 1000)


def test_nan_and_inf_come_out(m5: tuple[str, Tensor]):
    text, blob = m5
    x = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    x[1, 0, 30, 30] = float("nan")
    y = program.run_reference(x, text, blob)
    assert y[0].isfinite().all() and y[1].isnan().all()


@pytest.mark.parametrize(
    "x,blob,fact",
    [
        (torch.zeros(1, 3, 9, 9, dtype=torch.int32), None, "floating point or uint8 pixels"),
        (torch.zeros(1, 3, 9, 9, device="meta"), None, "x is on meta, the weights on cpu"),
        (torch.zeros(1, 3, 9, 9), torch.zeros(64, dtype=torch.uint8), "program line 1: needs"),
        (torch.zeros(1, 3, 9, 9), torch.zeros(64), "contiguous blob of uint8"),
    ],
)
def test_wrong_input_is_a_value_error(
    m5: tuple[str, Tensor], x: Tensor, blob: Tensor | None, fact: str
):
    with pytest.raises(ValueError, match=fact):
        program.run_reference(x, m5[0], m5[1] if blob is None else blob)


def test_pixels_are_for_the_stem_only(m5: tuple[str, Tensor]):
    x = torch.zeros(1, 4, 4, 192, dtype=torch.uint8)
    with pytest.raises(ValueError, match="expected x of floating point"):
        program.run_reference(x, program.slice_(m5[0], 1), m5[1])


@pytest.mark.parametrize(
    "change,fact",
    [
        (lambda w: w._replace(w1=np.zeros((64, 64))), r"'w1' has shape \(64, 64\)"),
        (lambda w: w._replace(b1=None), "'b1' is missing"),
    ],
)
def test_wrong_weights_are_named(change, fact: str):
    case = cases("dw_ffn")[0]
    with pytest.raises(ValueError, match=fact):
        build([(case.shape, change(case.weights))])
