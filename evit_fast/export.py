"""EfficientViT as a plain ONNX graph: BN folded, standard operators only, for any ONNX runtime.

    graph    image float32 [B, in, H, W] (normalised)  ->  logits float32 [B, N]; pooled features
             [B, C] when N = 0; the last map [B, C, H', W'] when the model has no classifier
    qkv      "separate": q, k and v of a head are three convolutions; no Split, which some runtimes
             run slowly. "joined": one convolution and a Split, the graph of the original code

The graph is written from the folded weights (`fold.fold`), the same float64 arrays that the fused
ops are packed from; the log2(e) of their softmax is divided out. H and W are fixed, B is free
unless given. The residual of a depthwise convolution stays in its centre tap and the scale of the
scores in the q weights, so no node is spent on either.
"""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import numpy as np

from evit_fast._version import __version__
from evit_fast.ops import OPS

OPSET = 17
BOUND = 1e-4  # relative L2 error at the logits, ONNX Runtime against float64 eager
LOG2_E = math.log2(math.e)
QKV_FORMS = ("separate", "joined")


class _Graph:
    """Nodes and constants in the order they are made, each named after the op that makes it."""

    def __init__(self, onnx: Any) -> None:
        self.onnx = onnx
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}
        self.prefix = ""

    def constant(self, name: str, value: np.ndarray, dtype: type = np.float32) -> str:
        """Add `value`, rounded once to `dtype`; shape constants of one name are one constant."""
        array = np.ascontiguousarray(value, dtype=dtype)
        self.constants[name] = self.onnx.numpy_helper.from_array(array, name)
        return name

    def node(
        self, op: str, inputs: list[str], name: str, outputs: int = 1, **attributes: Any
    ) -> Any:
        """Append one node; return its output name, or the list of them when there are several."""
        name = self.prefix + name
        names = [name] if outputs == 1 else [f"{name}.{i}" for i in range(outputs)]
        self.nodes.append(self.onnx.helper.make_node(op, inputs, names, name=name, **attributes))
        return names[0] if outputs == 1 else names

    def conv(
        self,
        x: str,
        weight: np.ndarray,
        bias: np.ndarray,
        name: str,
        stride: int = 1,
        depthwise: bool = False,
    ) -> str:
        """Convolution, zero-padded by k/2. weight [O, I, k, k], [O, I] or, depthwise, [C, k, k]."""
        if depthwise:
            weight = weight[:, None]  # [C, 1, k, k]
        elif weight.ndim == 2:
            weight = weight[:, :, None, None]  # [O, I, 1, 1]
        side = weight.shape[2]
        weights = [
            self.constant(f"{self.prefix}{name}.weight", weight),
            self.constant(f"{self.prefix}{name}.bias", bias),
        ]
        return self.node(
            "Conv", [x, *weights], name, kernel_shape=[side, side], strides=[stride, stride],
            pads=[side // 2] * 4, group=weight.shape[0] if depthwise else 1,
        )  # fmt: skip

    def relu(self, x: str, name: str) -> str:
        return self.node("Relu", [x], name)

    def reshape(self, x: str, shape: list[int], name: str) -> str:
        """Reshape; the single -1 stands for the free batch (times windows)."""
        sizes = self.constant("shape." + "x".join(map(str, shape)), np.array(shape), np.int64)
        return self.node("Reshape", [x, sizes], name)


def _stem(g: _Graph, x: str, s: Any, w: Any, size: tuple[int, int], qkv: str) -> str:
    for i in range(1, 5):
        x = g.conv(x, getattr(w, f"conv{i}"), getattr(w, f"bias{i}"), f"conv{i}", stride=2)
        if i < 4:
            x = g.relu(x, f"relu{i}")
    return x


def _dw_ffn(g: _Graph, x: str, s: Any, w: Any, size: tuple[int, int], qkv: str) -> str:
    y = g.conv(x, w.dw, w.dw_bias, "dw", depthwise=True)
    hidden = g.relu(g.conv(y, w.w1, w.b1, "pw1"), "relu")
    return g.node("Add", [g.conv(hidden, w.w2, w.b2, "pw2"), y], "add")


def _head(g: _Graph, x: str, s: Any, w: Any, i: int, side: int, qkv: str) -> str:
    """One head inside its windows: x [Bw, DV, side, side] -> [Bw, DV, side, side]."""
    dk, tokens = s.dk, side * side
    weight, bias = w.qkv[i], w.qkv_bias[i]
    width = weight.shape[0] - 2 * dk  # DV
    rows = {"q": slice(0, dk), "k": slice(dk, 2 * dk), "v": slice(2 * dk, None)}
    name = f"head{i}."
    if qkv == "separate":
        q, k, v = (g.conv(x, weight[r], bias[r], name + n) for n, r in rows.items())
    else:
        sizes = g.constant(f"split.{dk}.{dk}.{width}", np.array([dk, dk, width]), np.int64)
        joined = g.conv(x, weight, bias, name + "qkv")
        q, k, v = g.node("Split", [joined, sizes], name + "split", outputs=3, axis=1)
    q = g.conv(q, w.dw[i] / LOG2_E, w.dw_bias[i] / LOG2_E, name + "dw", depthwise=True)
    q = g.reshape(q, [-1, dk, tokens], name + "q_flat")
    k = g.reshape(k, [-1, dk, tokens], name + "k_flat")
    v = g.reshape(v, [-1, width, tokens], name + "v_flat")
    q = g.node("Transpose", [q], name + "q_rows", perm=[0, 2, 1])
    scores = g.node("MatMul", [q, k], name + "scores")  # [Bw, S queries, S keys]
    table = g.constant(f"{g.prefix}{name}attention_bias", w.bias[i] / LOG2_E)  # [S, S]
    scores = g.node("Add", [scores, table], name + "biased")
    probabilities = g.node("Softmax", [scores], name + "softmax", axis=-1)
    probabilities = g.node("Transpose", [probabilities], name + "columns", perm=[0, 2, 1])
    out = g.node("MatMul", [v, probabilities], name + "apply")  # [Bw, DV, S]
    return g.reshape(out, [-1, width, side, side], name + "map")


def _windows(g: _Graph, x: str, C: int, side: int, size: tuple[int, int]) -> str:
    """[B, C, H, W] -> [B * NH * NW, C, side, side], zero-padded at the bottom and right first."""
    H, W = size
    NH, NW = -(-H // side), -(-W // side)
    if (NH * side, NW * side) != size:
        pads = [0, 0, 0, 0, 0, 0, NH * side - H, NW * side - W]
        amounts = g.constant("pads." + "x".join(map(str, pads)), np.array(pads), np.int64)
        x = g.node("Pad", [x, amounts], "pad", mode="constant")
    x = g.reshape(x, [-1, C, NH, side, NW, side], "partition")
    x = g.node("Transpose", [x], "partition_rows", perm=[0, 2, 4, 1, 3, 5])
    return g.reshape(x, [-1, C, side, side], "windows")


def _unwindows(g: _Graph, x: str, C: int, side: int, size: tuple[int, int]) -> str:
    """The way back from `_windows`, padding cropped."""
    H, W = size
    NH, NW = -(-H // side), -(-W // side)
    x = g.reshape(x, [-1, NH, NW, C, side, side], "reverse")
    x = g.node("Transpose", [x], "reverse_rows", perm=[0, 3, 1, 4, 2, 5])
    x = g.reshape(x, [-1, C, NH * side, NW * side], "image")
    if (NH * side, NW * side) != size:
        starts = g.constant("crop.starts", np.array([0, 0]), np.int64)
        ends = g.constant(f"crop.ends.{H}x{W}", np.array([H, W]), np.int64)
        axes = g.constant("crop.axes", np.array([2, 3]), np.int64)
        x = g.node("Slice", [x, starts, ends, axes], "crop")
    return x


def _cga(g: _Graph, x: str, s: Any, w: Any, size: tuple[int, int], qkv: str) -> str:
    windowed = size != (s.window, s.window)
    tokens = _windows(g, x, s.C, s.window, size) if windowed else x
    sizes = g.constant(f"split.heads.{s.heads}.{s.C}", np.full(s.heads, s.C // s.heads), np.int64)
    parts = [tokens]
    if s.heads > 1:
        parts = g.node("Split", [tokens, sizes], "heads", outputs=s.heads, axis=1)
    outputs: list[str] = []
    for i, part in enumerate(parts):
        feature = g.node("Add", [outputs[-1], part], f"head{i}.cascade") if i else part
        outputs.append(_head(g, feature, s, w, i, s.window, qkv))
    y = g.node("Concat", outputs, "concat", axis=1)
    y = g.conv(g.relu(y, "relu"), w.proj, w.proj_bias, "proj")
    if windowed:
        y = _unwindows(g, y, s.C, s.window, size)
    return g.node("Add", [y, x], "add")


def _patch_merge(g: _Graph, x: str, s: Any, w: Any, size: tuple[int, int], qkv: str) -> str:
    x = g.relu(g.conv(x, w.w1, w.b1, "pw1"), "relu1")
    x = g.relu(g.conv(x, w.dw, w.dw_bias, "dw", stride=2, depthwise=True), "relu2")
    gate = g.node("GlobalAveragePool", [x], "se.pool")
    gate = g.relu(g.conv(gate, w.se1, w.se1_bias, "se.fc1"), "se.relu")
    gate = g.node("Sigmoid", [g.conv(gate, w.se2, w.se2_bias, "se.fc2")], "se.sigmoid")
    return g.conv(g.node("Mul", [x, gate], "se.mul"), w.w3, w.b3, "pw2")


def _classifier(g: _Graph, x: str, s: Any, w: Any, size: tuple[int, int], qkv: str) -> str:
    x = g.node("Flatten", [g.node("GlobalAveragePool", [x], "pool")], "features", axis=1)
    if s.N == 0:
        return x
    weight = g.constant(f"{g.prefix}linear.weight", w.w)
    bias = g.constant(f"{g.prefix}linear.bias", w.bias)
    return g.node("Gemm", [x, weight, bias], "linear", transB=1)


_EMIT = {
    "stem": _stem,
    "dw_ffn": _dw_ffn,
    "cga": _cga,
    "patch_merge": _patch_merge,
    "classifier": _classifier,
}


def _import_onnx() -> Any:
    try:
        import onnx
    except ImportError as error:
        raise RuntimeError(
            "export: the onnx package writes the graph and is not installed; run `pip install onnx`"
        ) from error
    return onnx


def _image_size(model: Any, image_size: int | tuple[int, int] | None) -> tuple[int, int]:
    if image_size is None:
        image_size = getattr(model, "img_size", 224)
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"export: image_size must be one or two positive sizes, got {image_size}")
    return size


def _folded(model: Any) -> list[tuple[Any, Any]]:
    if isinstance(model, (list, tuple)):
        return list(model)
    from evit_fast.fold import fold

    return fold(model, (0.0,), (1.0,))  # mean and std matter to uint8 input only


def to_onnx(
    model: Any,
    *,
    image_size: int | tuple[int, int] | None = None,
    batch: int | None = None,
    qkv: str = "separate",
) -> Any:
    """The onnx.ModelProto of `model`: an EfficientViT, or the list that `fold.fold` returns.

    image_size: side or (H, W); None takes the model's own. batch: None leaves it free (>= 1).
    ValueError on a bad size or form, RuntimeError when the onnx package is missing.
    """
    onnx = _import_onnx()
    if qkv not in QKV_FORMS:
        raise ValueError(f"export: qkv must be one of {', '.join(QKV_FORMS)}, got {qkv!r}")
    size = image_shape = _image_size(model, image_size)
    folded = _folded(model)
    g = _Graph(onnx)
    value, channels = "image", folded[0][0].in_
    for index, (shape, weights) in enumerate(folded):
        g.prefix = f"{index:02d}.{shape.op}."
        value = _EMIT[shape.op](g, value, shape, weights, size, qkv)
        size = OPS[shape.op].out_hw(*size)
    last = folded[-1][0]
    name = "logits" if getattr(last, "N", 0) else "features"
    g.nodes[-1].output[0] = name
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    B = "batch" if batch is None else batch
    y_shape = [B, last.channels_out, *(() if last.op == "classifier" else size)]
    graph = helper.make_graph(
        g.nodes,
        "efficientvit",
        [helper.make_tensor_value_info("image", kind, [B, channels, *image_shape])],
        [helper.make_tensor_value_info(name, kind, y_shape)],
        list(g.constants.values()),
    )
    proto = helper.make_model(
        graph,
        opset_imports=[helper.make_opsetid("", OPSET)],
        producer_name="evit_fast",
        producer_version=__version__,
        ir_version=8,  # the IR that came with opset 17: older runtimes read it
    )
    onnx.checker.check_model(proto, full_check=True)
    return proto


def run_onnx(proto: Any, x: np.ndarray, threads: int = 1) -> np.ndarray:
    """The output of the graph in ONNX Runtime on the CPU; x and it are float32."""
    try:
        import onnxruntime
    except ImportError as error:
        raise RuntimeError(
            "export: checking the graph needs ONNX Runtime; run `pip install onnxruntime`"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    session = onnxruntime.InferenceSession(
        proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    return session.run(None, {"image": x})[0]


def relative_error(got: np.ndarray, expected: np.ndarray) -> float:
    """Relative L2 error over the whole array, in float64; NaN and Inf in `got` give inf."""
    difference = np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected)
    return float(difference) if np.isfinite(difference) else math.inf


def export(
    model: Any,
    path: str | Path,
    *,
    image_size: int | tuple[int, int] | None = None,
    batch: int | None = None,
    qkv: str = "separate",
) -> float:
    """Write an EfficientViT as an ONNX file, once ONNX Runtime agrees with float64 eager on it.

    Returns the relative L2 error on random images; over 1e-4 a RuntimeError, and no file.
    """
    import torch

    proto = to_onnx(model, image_size=image_size, batch=batch, qkv=qkv)
    shape = [dim.dim_value or 2 for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    with torch.no_grad():
        expected = copy.deepcopy(model).double().eval()(torch.from_numpy(x).double()).numpy()
    error = relative_error(run_onnx(proto, x), expected)
    if error > BOUND:
        raise RuntimeError(
            f"export: ONNX Runtime is off by {error:.1e} from float64 eager, {BOUND:.0e} is "
            "allowed; nothing was written"
        )
    Path(path).write_bytes(proto.SerializeToString())
    return error
