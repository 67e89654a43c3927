"""EfficientViT as a plain ONNX graph: BN folded, standard operators only, for any ONNX runtime.

    graph    image float32 [B, in, H, W] (normalised)  ->  logits float32 [B, N]; pooled features
             [B, C] when N = 0; the last map [B, C, H', W'] when the model has no classifier
    qkv      "separate": q, k and v of a head are three convolutions; no Split, which some runtimes
             run slowly. "joined": one convolution and a Split, the graph of the original code

The graph is written from the folded weights (`fold.fold`), the same float64 arrays that the fused
ops are packed from; the log2(e) of their softmax is divided out. H and W are fixed, or free with
image_size="dynamic" (then windows are counted by the graph itself: a few nodes more per attention);
B is free unless given. The residual of a depthwise convolution stays in its centre tap and the
scale of the scores in the q weights, so no node is spent on either.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from evit_fast._version import __version__
from evit_fast.ops import OPS

OPSET = 17
BOUND = 1e-4  # relative L2 error at the logits, ONNX Runtime against float64 eager
LOG2_E = math.log2(math.e)
QKV_FORMS = ("separate", "joined")
DYNAMIC = "dynamic"
DYNAMIC_SIZES = ((224, 224), (160, 208))  # where a graph of any size is checked
Size = tuple[int, int] | None  # None: the graph takes any


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


def _stem(g: _Graph, x: str, s: Any, w: Any, size: Size, qkv: str) -> str:
    for i in range(1, 5):
        x = g.conv(x, getattr(w, f"conv{i}"), getattr(w, f"bias{i}"), f"conv{i}", stride=2)
        if i < 4:
            x = g.relu(x, f"relu{i}")
    return x


def _dw_ffn(g: _Graph, x: str, s: Any, w: Any, size: Size, qkv: str) -> str:
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


class _Sides:
    """Of an attention: how its windows tile a map of H x W. Names of shapes for the graph's nodes.

    size: (H, W), or None where the graph counts them itself from x [B, C, H, W].
    """

    def __init__(self, g: _Graph, x: str, C: int, side: int, size: tuple[int, int] | None) -> None:
        self.g, self.side, self.padded = g, side, True
        if size is not None:
            counts = [-(-n // side) for n in size]
            self.padded = (counts[0] * side, counts[1] * side) != size
            H, W = ([n] for n in size)
            NH, NW = ([n] for n in counts)
            PH, PW = ([n * side] for n in counts)
            extra = [[n * side - m] for n, m in zip(counts, size, strict=True)]
        else:
            H, W, NH, NW, PH, PW, *extra = self._count(x)
        self.pads = [0, 0, 0, 0, 0, 0], *extra
        self.parted = [-1, C], NH, [side], NW, [side]
        self.rows = [-1], NH, NW, [C, side, side]
        self.image = [-1, C], PH, PW
        self.hw = H, W

    def _count(self, x: str) -> list[str]:
        """Nodes of one int64 each: H, W, windows down and across, padded H and W, padding."""
        g = self.g
        shape = g.node("Shape", [x], "shape")
        side = g.constant(f"window.{self.side}", np.array([self.side]), np.int64)
        most = g.constant(f"window_less_one.{self.side}", np.array([self.side - 1]), np.int64)
        columns = []
        for axis, name in ((2, "rows"), (3, "columns")):
            at = g.constant(f"axis.{axis}", np.array([axis]), np.int64)
            n = g.node("Gather", [shape, at], name, axis=0)
            count = g.node("Div", [g.node("Add", [n, most], f"{name}.up"), side], f"{name}.windows")
            whole = g.node("Mul", [count, side], f"{name}.whole")
            columns.append((n, count, whole, g.node("Sub", [whole, n], f"{name}.extra")))
        return [name for pair in zip(*columns, strict=True) for name in pair]

    def vector(self, parts: tuple[list[int] | str, ...], name: str) -> str:
        """One int64 tensor out of numbers and nodes."""
        if all(isinstance(part, list) for part in parts):
            numbers = [n for part in parts for n in part]
            label = f"shape.{name}." + "x".join(map(str, numbers))
            return self.g.constant(label, np.array(numbers), np.int64)
        names = [
            self.g.constant("shape." + "x".join(map(str, part)), np.array(part), np.int64)
            if isinstance(part, list) else part
            for part in parts
        ]  # fmt: skip
        return self.g.node("Concat", names, f"{name}.sizes", axis=0)


def _windows(g: _Graph, x: str, C: int, sides: _Sides) -> str:
    """[B, C, H, W] -> [B * NH * NW, C, side, side], zero-padded at the bottom and right first."""
    if sides.padded:
        x = g.node("Pad", [x, sides.vector(sides.pads, "pads")], "pad", mode="constant")
    x = g.node("Reshape", [x, sides.vector(sides.parted, "parted")], "partition")
    x = g.node("Transpose", [x], "partition_rows", perm=[0, 2, 4, 1, 3, 5])
    return g.reshape(x, [-1, C, sides.side, sides.side], "windows")


def _unwindows(g: _Graph, x: str, sides: _Sides) -> str:
    """The way back from `_windows`, padding cropped."""
    x = g.node("Reshape", [x, sides.vector(sides.rows, "rows")], "reverse")
    x = g.node("Transpose", [x], "reverse_rows", perm=[0, 3, 1, 4, 2, 5])
    x = g.node("Reshape", [x, sides.vector(sides.image, "image")], "image")
    if sides.padded:
        starts = g.constant("crop.starts", np.array([0, 0]), np.int64)
        axes = g.constant("crop.axes", np.array([2, 3]), np.int64)
        x = g.node("Slice", [x, starts, sides.vector(sides.hw, "crop"), axes], "crop")
    return x


def _cga(g: _Graph, x: str, s: Any, w: Any, size: Size, qkv: str) -> str:
    windowed = size != (s.window, s.window)
    sides = _Sides(g, x, s.C, s.window, size) if windowed else None
    tokens = _windows(g, x, s.C, sides) if sides else x
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
    if sides:
        y = _unwindows(g, y, sides)
    return g.node("Add", [y, x], "add")


def _patch_merge(g: _Graph, x: str, s: Any, w: Any, size: Size, qkv: str) -> str:
    x = g.relu(g.conv(x, w.w1, w.b1, "pw1"), "relu1")
    x = g.relu(g.conv(x, w.dw, w.dw_bias, "dw", stride=2, depthwise=True), "relu2")
    gate = g.node("GlobalAveragePool", [x], "se.pool")
    gate = g.relu(g.conv(gate, w.se1, w.se1_bias, "se.fc1"), "se.relu")
    gate = g.node("Sigmoid", [g.conv(gate, w.se2, w.se2_bias, "se.fc2")], "se.sigmoid")
    return g.conv(g.node("Mul", [x, gate], "se.mul"), w.w3, w.b3, "pw2")


def _classifier(g: _Graph, x: str, s: Any, w: Any, size: Size, qkv: str) -> str:
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


def _image_size(model: Any, image_size: int | str | tuple[int, int] | None) -> Size:
    if image_size == DYNAMIC:
        return None
    if image_size is None:
        image_size = getattr(model, "img_size", 224)
    size = (image_size, image_size) if isinstance(image_size, int) else tuple(image_size)
    if len(size) != 2 or not all(isinstance(n, int) and n > 0 for n in size):
        raise ValueError(
            "export: image_size must be one or two positive sizes, or 'dynamic', got "
            f"{image_size!r}"
        )
    return size


def _folded(model: Any) -> list[tuple[Any, Any]]:
    if isinstance(model, (list, tuple)):
        return list(model)
    from evit_fast.fold import fold

    return fold(model, (0.0,), (1.0,))  # mean and std matter to uint8 input only


def to_onnx(
    model: Any,
    *,
    image_size: int | str | tuple[int, int] | None = None,
    batch: int | None = None,
    qkv: str = "separate",
) -> Any:
    """The onnx.ModelProto of `model`: an EfficientViT, or the list that `fold.fold` returns.

    image_size: side or (H, W), "dynamic" for any; None takes the model's own. batch: None leaves it
    free (>= 1). ValueError on a bad size or form, RuntimeError when the onnx package is missing.
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
        size = OPS[shape.op].out_hw(*size) if size else None
    last = folded[-1][0]
    name = "logits" if getattr(last, "N", 0) else "features"
    g.nodes[-1].output[0] = name
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    B = "batch" if batch is None else batch
    map_shape = size or ("map_height", "map_width")
    y_shape = [B, last.channels_out, *(() if last.op == "classifier" else map_shape)]
    image_shape = image_shape or ("height", "width")
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


def _eager_double(model: Any) -> Callable[[np.ndarray], np.ndarray]:
    """images float32 [B, in, H, W] -> what the model gives in float64."""
    import torch

    from evit_fast.program import map_arrays

    if not isinstance(model, (list, tuple)):
        double = copy.deepcopy(model).double().eval()

        def run(x: np.ndarray) -> np.ndarray:
            with torch.no_grad():
                return double(torch.from_numpy(x).double()).numpy()

        return run

    def run_folded(x: np.ndarray) -> np.ndarray:
        y = torch.from_numpy(x).double()
        for shape, weights in model:
            tensors = map_arrays(weights, lambda a: torch.from_numpy(np.array(a, np.float64)))
            y = OPS[shape.op].reference(y, tensors, shape)
        return (y.permute(0, 3, 1, 2) if y.ndim == 4 else y).numpy()

    return run_folded


def export(
    model: Any,
    path: str | Path,
    *,
    image_size: int | str | tuple[int, int] | None = None,
    batch: int | None = None,
    qkv: str = "separate",
) -> float:
    """Write an EfficientViT, or the list that `fold.fold` returns, as an ONNX file, once ONNX
    Runtime agrees with float64 on it: eager, or the ops' references for a list.

    image_size, batch, qkv: see to_onnx. Returns the relative L2 error on random images; over 1e-4 a
    RuntimeError, and no file.
    """
    proto = to_onnx(model, image_size=image_size, batch=batch, qkv=qkv)
    shape = [dim.dim_value for dim in proto.graph.input[0].type.tensor_type.shape.dim]
    sizes = DYNAMIC_SIZES if image_size == DYNAMIC else (tuple(shape[2:]),)
    expected_of = _eager_double(model)
    error = 0.0
    for size in sizes:
        drawn = np.random.default_rng(0).standard_normal((shape[0] or 2, shape[1], *size))
        x = drawn.astype(np.float32)
        error = max(error, relative_error(run_onnx(proto, x), expected_of(x)))
    if error > BOUND:
        raise RuntimeError(
            f"export: ONNX Runtime is off by {error:.1e} from float64 eager, {BOUND:.0e} is "
            "allowed; nothing was written"
        )
    Path(path).write_bytes(proto.SerializeToString())
    return error
