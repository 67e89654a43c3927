"""Every op that a forward runs has a class, and what is moved by being renamed does not vanish."""

from __future__ import annotations

import pytest
import torch

from evit_fast import _native
from evit_fast.fold import fold
from evit_fast.model import create_model
from evit_fast.ops import OPS as FUSED_OPS
from evit_fast.profiles import classes


def test_names_of_every_runtime() -> None:
    for name, expected in {
        "aten::convolution": "conv_gemm",
        "aten::bmm": "attention",
        "aten::_softmax": "softmax",
        "aten::native_batch_norm": "normalisation",
        "aten::copy_": "movement",
        "aten::mean": "pooling",
        "FusedMatMul": "attention",
        "ReorderOutput": "movement",
        "Gemm": "conv_gemm",
        "aoti_torch_cpu_mkldnn__convolution_pointwise": "conv_gemm",
        "aoti_torch_cpu_bmm_out": "attention",
        "graph_0_cpp_fused__softmax_add_3": "softmax",
        "graph_0_cpp_fused__unsafe_view_add_clone_permute_split_view_4": "elementwise",
        "graph_0_cpp_fused__unsafe_view_clone_convolution_permute_split_view_1": "movement",
        "graph_0_cpp_fused_mean_relu_7": "pooling",
        "graph_0_cpp_fused_convolution_relu_9": "elementwise",
    }.items():
        assert classes.class_of(name) == expected, name
    assert classes.class_of("aten::convolution", depthwise=True) == "depthwise"
    assert classes.class_of("aten::something_new") is None


def test_a_view_is_no_op() -> None:
    for name in ("aten::view", "aten::expand", "aten::_unsafe_view", "Reshape", "aten::empty"):
        assert classes.is_view(name) and classes.class_of(name) is None
    assert not classes.is_view("aten::copy_")


def test_names_stand_once() -> None:
    names = [name for group in classes.OPS.values() for name in group.split()]
    assert len(names) == len(set(names)) and not set(names) & classes.VIEWS
    assert set(classes.OPS) | {"depthwise", "overhead"} == set(classes.CLASSES)
    assert set(classes.STAGES) <= set(classes.CLASSES)


def test_stages() -> None:
    assert {classes.stage_class(stage) for stage in ("gather", "load")} == {"movement"}
    assert classes.stage_class("values") == "attention" and classes.stage_class("up") == "conv_gemm"
    with pytest.raises(ValueError, match="no class for the stage 'dance'"):
        classes.stage_class("dance")
    names = [name for group in classes.STAGES.values() for name in group.split()]
    assert len(names) == len(set(names))


def test_the_native_library_names_no_other_stage() -> None:
    for op, stages in _native.stages().items():
        assert op in classes.FUSED
        assert all(classes.stage_class(stage) in classes.CLASSES for stage in stages)


def test_a_fused_op_whole_is_where_its_flops_are() -> None:
    """Products of matrices in every one, in M0 as in M5."""
    for model in ("m0", "m5"):
        for shape, _ in fold(create_model(model), (0.0,), (1.0,)):
            assert classes.FUSED[shape.op] == "conv_gemm"
            if shape.op == "cga":
                flops, _ = FUSED_OPS["cga"].cost(shape, 1, 14, 14, torch.float32)
                tokens = -((-14 // shape.window) ** 2) * shape.window**2
                products = tokens * shape.heads * shape.tokens * (shape.dk + shape.dv)
                assert 2 * 2 * products < flops
    assert set(classes.FUSED) == set(FUSED_OPS)
