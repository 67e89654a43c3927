"""The ONNX graph in ONNX Runtime against the eager model in float64."""

from __future__ import annotations

import copy
import dataclasses

import numpy as np
import pytest
import torch

pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from evit_fast.bench.weights import randomize
from evit_fast.export import BOUND, QKV_FORMS, export, relative_error, run_onnx, to_onnx
from evit_fast.fold import fold
from evit_fast.model import create_model

MODELS = [f"m{i}" for i in range(6)]
# 14x14 tokens in four windows; 13x13 padded; 10x12 padded; one token, padded in every stage.
SIZES = [(224, 224), (208, 208), (160, 192), (16, 16)]


def _model(name: str, **kwargs: object) -> torch.nn.Module:
    return randomize(create_model(name, **kwargs).eval(), seed=3)


def _images(batch: int, size: tuple[int, int]) -> np.ndarray:
    return np.random.default_rng(5).standard_normal((batch, 3, *size)).astype(np.float32)


@torch.no_grad()
def _expected(model: torch.nn.Module, x: np.ndarray) -> np.ndarray:
    return copy.deepcopy(model).double()(torch.from_numpy(x).double()).numpy()


@pytest.mark.parametrize("qkv", QKV_FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_logits(name: str, qkv: str) -> None:
    model = _model(name)
    x = _images(2, (224, 224))
    got = run_onnx(to_onnx(model, qkv=qkv), x)
    assert got.shape == (2, 1000) and got.dtype == np.float32
    assert relative_error(got, _expected(model, x)) < 1e-5


@pytest.mark.parametrize("size", SIZES[1:], ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", ["m1", "m3"])
def test_sizes(name: str, size: tuple[int, int]) -> None:
    model = _model(name)
    x = _images(1, size)
    assert relative_error(run_onnx(to_onnx(model, image_size=size), x), _expected(model, x)) < 1e-5


@pytest.mark.parametrize("name", ["m1", "m3"])
def test_any_size_and_batch(name: str) -> None:
    """One graph: whole windows, padded ones, and maps smaller than a window."""
    model = _model(name)
    proto = to_onnx(model, image_size="dynamic")
    for batch, size in enumerate([*SIZES, (240, 176)], 1):
        x = _images(batch, size)
        assert relative_error(run_onnx(proto, x), _expected(model, x)) < 1e-5, size
    dims = proto.graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_param or dim.dim_value for dim in dims] == ["batch", 3, "height", "width"]


def test_export_of_any_size_checks_two(tmp_path, monkeypatch) -> None:
    """A graph that is made for 224 and claims any size is refused."""
    model = _model("m0", num_classes=10)
    assert export(model, tmp_path / "m0.onnx", image_size="dynamic") < BOUND
    monkeypatch.setattr("evit_fast.export.DYNAMIC_SIZES", ((224, 224), (160, 200)))
    real = to_onnx(model, image_size=224)
    for dim in real.graph.input[0].type.tensor_type.shape.dim[2:]:
        dim.dim_param = "side"
    monkeypatch.setattr("evit_fast.export.to_onnx", lambda *args, **kwargs: real)
    with pytest.raises(Exception, match=r"off by|Reshape|shape"):
        export(model, tmp_path / "wrong.onnx", image_size="dynamic")
    assert not (tmp_path / "wrong.onnx").exists()


def test_export_of_a_folded_list(tmp_path) -> None:
    folded = fold(_model("m0", num_classes=10), (0.0,), (1.0,))
    assert export(folded, tmp_path / "m0.onnx", image_size=64) < BOUND
    assert export(folded[:-1], tmp_path / "map.onnx", image_size=64) < BOUND


def test_batch_is_free_unless_given() -> None:
    model = _model("m0")
    free, fixed = to_onnx(model), to_onnx(model, batch=2)
    expected = _expected(model, _images(3, (224, 224)))
    for batch in (1, 3):
        x = _images(3, (224, 224))[:batch]
        assert relative_error(run_onnx(free, x), expected[:batch]) < 1e-5
    assert fixed.graph.input[0].type.tensor_type.shape.dim[0].dim_value == 2
    with pytest.raises(Exception, match="Got: 3 Expected: 2"):
        run_onnx(fixed, _images(3, (224, 224)))


def test_qkv_forms_differ_in_nothing_but_convolutions() -> None:
    """Separate: two convolutions more per head and no Split of q, k, v."""
    model = _model("m1")
    counts = {}
    for qkv in QKV_FORMS:
        nodes = [node.op_type for node in to_onnx(model, qkv=qkv).graph.node]
        counts[qkv] = {op: nodes.count(op) for op in ("Conv", "Split", "MatMul", "Softmax")}
    heads = sum(d * h for d, h in zip(model.config.depth, model.config.num_heads, strict=True))
    assert counts["separate"]["Conv"] - counts["joined"]["Conv"] == 2 * heads
    assert counts["joined"]["Split"] - counts["separate"]["Split"] == heads
    assert counts["separate"]["MatMul"] == counts["joined"]["MatMul"] == 2 * heads
    assert counts["separate"]["Softmax"] == counts["joined"]["Softmax"] == heads


def test_pooled_features_and_maps() -> None:
    """num_classes=0 gives [B, C]; a folded list without a classifier gives the last map, NCHW."""
    model = _model("m0", num_classes=0)
    x = _images(2, (224, 224))
    expected = _expected(model, x)
    assert expected.shape == (2, 192)
    assert relative_error(run_onnx(to_onnx(model), x), expected) < 1e-5
    folded = fold(model, (0.0,), (1.0,))[:-1]
    got = run_onnx(to_onnx(folded, image_size=224), x)
    assert got.shape == (2, 192, 4, 4)
    assert relative_error(got.mean((2, 3)), expected) < 1e-5


def test_distilled_heads_are_averaged() -> None:
    model = _model("m0", distillation=True, num_classes=7)
    x = _images(2, (224, 224))
    assert relative_error(run_onnx(to_onnx(model), x), _expected(model, x)) < 1e-5


def test_export_writes_a_checked_file(tmp_path) -> None:
    import onnx

    model = _model("m0", num_classes=10)
    assert export(model, tmp_path / "m0.onnx") < BOUND
    proto = onnx.load(tmp_path / "m0.onnx")
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 17)]


def test_export_refuses_a_graph_that_disagrees(tmp_path, monkeypatch) -> None:
    """A folded weight off by 1 %: one sentence and no file."""
    model = _model("m0", num_classes=10)
    folded = fold(model, (0.0,), (1.0,))
    shape, weights = folded[-1]
    folded[-1] = (shape, weights._replace(w=weights.w * 1.01))
    monkeypatch.setattr("evit_fast.export._folded", lambda model: folded)
    with pytest.raises(RuntimeError, match=r"off by .* nothing was written"):
        export(model, tmp_path / "m0.onnx")
    assert not (tmp_path / "m0.onnx").exists()


def test_wrong_arguments() -> None:
    model = _model("m0")
    with pytest.raises(ValueError, match="qkv must be one of separate, joined, got 'split'"):
        to_onnx(model, qkv="split")
    with pytest.raises(ValueError, match="image_size must be one or two positive sizes"):
        to_onnx(model, image_size=(224, 224, 3))


def test_folded_weights_stay_as_they_are() -> None:
    """The list of a caller is read, not changed: the log2(e) comes out of copies."""
    folded = fold(_model("m0"), (0.0,), (1.0,))
    before = copy.deepcopy(folded)
    to_onnx(folded)
    for (shape, weights), (old_shape, old) in zip(folded, before, strict=True):
        assert dataclasses.asdict(shape) == dataclasses.asdict(old_shape)
        for value, old_value in zip(weights, old, strict=True):
            np.testing.assert_equal(value, old_value)
