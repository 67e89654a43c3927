"""What compiled.py reads from a binary, and how the committed table is kept."""

from __future__ import annotations

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from evit_fast.config import VARIANTS
from evit_fast.kernels import compiled
from evit_fast.kernels.compiled import Resources, cache_key, compile_launch, faults
from evit_fast.model_ops import model_ops
from tests.kernels import tiny
from tests.ops import eager

ROW = ("cga", "0", "cga_kernel", "C=64 14x14", "1", "float16", "86", "BT=16 warps=4 stages=2")


@pytest.mark.parametrize("arch", compiled.ARCHS)
def test_half_precision_uses_tensor_cores_everywhere(arch):
    for dtype in (torch.float16, torch.bfloat16):
        r = compile_launch(tiny.on_meta(100, 64, dtype), arch)
        assert r.dots == 1 and r.mma and not r.stack and not r.local and not r.ffma
        assert 16 <= r.registers <= 255


def test_float32_is_multiplied_as_float32():
    r = compile_launch(tiny.on_meta(100, 64, torch.float32), 80)
    assert r.ffma and not r.mma


@pytest.mark.parametrize("arch", compiled.ARCHS)
def test_relu_lets_nan_through(arch):
    signature = {"y_ptr": "*fp32", "x_ptr": "*fp32", "C": "constexpr"}
    source = ASTSource(tiny.relu_kernel, signature, {"C": 64})
    ptx = triton.compile(source, target=GPUTarget("cuda", arch, 32)).asm["ptx"]
    assert "max.NaN.f32" in ptx and "max.f32" not in ptx


def test_a_kernel_that_spills_is_seen():
    r = compile_launch(tiny.on_meta(100, 64, torch.float32, tiny.LARGE), 80)
    assert r.stack and r.local
    assert "stack" in faults(ROW, r)[0]


def test_a_kernel_that_exceeds_the_shared_memory_of_a_card_is_seen():
    r = Resources(32, 0, 100 << 10, mma=8, ffma=0, local=0, dots=1, seconds=1.0)
    assert "101376 at most" in faults(ROW, r)[0]  # sm_86
    assert not faults((*ROW[:6], "80", ROW[7]), r)


def test_a_half_precision_kernel_without_tensor_cores_is_seen():
    r = Resources(32, 0, 1 << 10, mma=0, ffma=64, local=0, dots=1, seconds=1.0)
    assert "tensor cores" in faults(ROW, r)[0]
    assert not faults(ROW, r._replace(dots=0))  # pooling multiplies nothing
    assert not faults((*ROW[:5], "float32", *ROW[6:]), r)


def test_another_size_is_the_same_binary_unless_the_kernel_specialises_it():
    keys = {cache_key(tiny.on_meta(T, 64, torch.float16), 90) for T in (1, 16, 17, 4096)}
    assert len(keys) == 1
    keys = {cache_key(tiny.careless(T), 90) for T in (1, 16, 17)}
    assert len(keys) == 3


def test_tiles_dtype_and_card_are_other_binaries():
    one = tiny.on_meta(64, 64, torch.float16)
    keys = {
        cache_key(one, 90),
        cache_key(one._replace(config=tiny.LARGE), 90),
        cache_key(one._replace(config=one.config._replace(num_warps=8)), 90),
        cache_key(tiny.on_meta(64, 64, torch.bfloat16), 90),
    }
    assert len(keys) == 4


def test_shapes_are_those_of_the_folded_models():
    for op in compiled.OPS:
        assert {s for s, _ in compiled.shapes(op)} == {c.shape for c in eager.cases(op)}


def test_maps_are_as_large_as_in_the_models():
    sides = [(s.op, side) for s, side in model_ops(VARIANTS["efficientvit_m5"])]
    merges = [side for op, side in sides if op == "patch_merge"]
    assert (sides[0], merges, sides[-1]) == (("stem", 224), [14, 7], ("classifier", 4))


def test_writing_keeps_the_rows_that_were_not_asked_for(tmp_path):
    path = tmp_path / "compiled.csv"
    values = ("64", "1024", "8")
    other = (*ROW[:6], "90", ROW[7])
    compiled.write_table({ROW: values, other: values}, set(), path)
    new, asked = (*ROW[:3], "C=128 7x7", *ROW[4:]), {("cga", "float16", "86")}
    compiled.write_table({new: values}, asked, path)
    version, rows = compiled.read_table(path)
    assert version == compiled.triton.__version__
    assert rows == {new: values, other: values}


def test_a_line_of_the_table_has_a_cell_for_each_card(tmp_path):
    path = tmp_path / "compiled.csv"
    cards = {(*ROW[:6], arch, ROW[7]): (arch, "1024", "8") for arch in ("100", "90", "86")}
    compiled.write_table(cards, set(), path)
    *_, header, line = path.read_text().splitlines()
    assert header.endswith(",tiles,sm_86,sm_90,sm_100")
    assert line.endswith(",BT=16 warps=4 stages=2,86/1024/8,90/1024/8,100/1024/8")
    assert compiled.read_table(path)[1] == cards


def test_a_table_of_another_triton_is_written_anew(tmp_path, monkeypatch):
    path = tmp_path / "compiled.csv"
    values = ("64", "1024", "8")
    compiled.write_table({ROW: values}, set(), path)
    monkeypatch.setattr(compiled.triton, "__version__", "9.9.9")
    other = (*ROW[:6], "90", ROW[7])
    compiled.write_table({other: values}, {("cga", "float16", "90")}, path)
    assert compiled.read_table(path) == ("9.9.9", {other: values})


def test_rows_lie_in_the_order_of_their_numbers(tmp_path):
    path = tmp_path / "compiled.csv"
    rows = [(*ROW[:3], f"C={C} 7x7", *ROW[4:]) for C in (128, 64, 1024)]
    compiled.write_table({row: ("1",) * 3 for row in rows}, set(), path)
    assert [row[3] for row in compiled.read_table(path)[1]] == [
        "C=64 7x7",
        "C=128 7x7",
        "C=1024 7x7",
    ]
