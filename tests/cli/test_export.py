"""evit-fast export, and the way to the benchmarks."""

from __future__ import annotations

import json

import pytest
import torch

import evit_fast
from evit_fast.bench.weights import randomize

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """The same weights as a state dict and as a saved model."""
    folder = tmp_path_factory.mktemp("export")
    model = randomize(evit_fast.create_model("m0", num_classes=10)).eval()
    torch.save(model.state_dict(), folder / "m0.pth")
    evit_fast.save(evit_fast.accelerate(model), folder / "m0.evit")
    return folder


@pytest.mark.parametrize("name", ["m0.pth", "m0.evit"])
def test_export(evit, files, tmp_path, name):
    path = tmp_path / "m0.onnx"
    argv = ("export", "--checkpoint", str(files / name), "--onnx", str(path), "--json")
    code, out, err = evit(*argv, "--size", "64x96", "--batch", "3")
    assert (code, err) == (0, "")
    said = json.loads(out)
    assert said["onnx"] == str(path) and said["relative_error"] < 1e-5
    graph = onnx.load(path).graph
    assert [d.dim_value for d in graph.input[0].type.tensor_type.shape.dim] == [3, 3, 64, 96]
    assert [d.dim_value for d in graph.output[0].type.tensor_type.shape.dim] == [3, 10]


def test_export_of_any_size(evit, files, tmp_path):
    path = tmp_path / "m0.onnx"
    argv = ("export", "--checkpoint", str(files / "m0.pth"), "--onnx", str(path))
    code, out, _ = evit(*argv, "--size", "dynamic", "--qkv", "joined")
    assert code == 0 and out.startswith(f"{path}: opset 17, off by ")
    dims = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [d.dim_param or d.dim_value for d in dims] == ["batch", 3, "height", "width"]


def test_export_wrong_use(evit, files, tmp_path):
    argv = ("export", "--checkpoint", str(files / "m0.pth"), "--onnx")
    code, out, err = evit(*argv, str(tmp_path / "no" / "m0.onnx"), "--size", "32")
    assert (code, out) == (2, "") and "No such file or directory" in err
    code, _, err = evit(*argv, str(tmp_path / "m0.onnx"), "--size", "1x2x3")
    assert code == 2 and "expected a side, HxW or dynamic, got 1x2x3" in err
    code, _, err = evit("export", "--checkpoint", "none.pth", "--onnx", str(tmp_path / "m0.onnx"))
    assert code == 2 and "no such file" in err


def test_bench_passes_flags_on(evit):
    code, _, err = evit("bench", "models", "--peers", "tensorflow")
    assert code == 2 and "unknown peer 'tensorflow'" in err
    code, _, err = evit("bench", "ops", "--op", "softmax")
    assert code == 2 and "unknown 'softmax'" in err
    code, _, err = evit("bench")
    assert code == 2 and "WHAT" in err
