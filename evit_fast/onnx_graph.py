"""The nodes that each op becomes in a plain ONNX graph; `export.py` makes models of them.

Maps are NCHW. Every `_<op>` function adds an op's nodes behind `x` and returns the output's name.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from evit_fast.ops import OPS

LOG2_E = math.log2(math.e)
Size = tuple[int, int] | None  # H and W of a map; None: any


class Graph:
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


def _stem(g: Graph, x: str, s: Any, w: Any, size: Size, qkv: str) -> str:
    for i in range(1, 5):
        x = g.conv(x, getattr(w, f"conv{i}"), getattr(w, f"bias{i}"), f"conv{i}", stride=2)
        if i < 4:
            x = g.relu(x, f"relu{i}")
    return x


def _dw_ffn(g: Graph, x: str, s: Any, w: Any, size: Size, qkv: str) -> str:
    y = g.conv(x, w.dw, w.dw_bias, "dw", depthwise=True)
    hidden = g.relu(g.conv(y, w.w1, w.b1, "pw1"), "relu")
    return g.node("Add", [g.conv(hidden, w.w2, w.b2, "pw2"), y], "add")


def _head(g: Graph, x: str, s: Any, w: Any, i: int, side: int, qkv: str) -> str:
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

    def __init__(self, g: Graph, x: str, C: int, side: int, size: tuple[int, int] | None) -> None:
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


def _windows(g: Graph, x: str, C: int, sides: _Sides) -> str:
    """[B, C, H, W] -> [B * NH * NW, C, side, side], zero-padded at the bottom and right first."""
    if sides.padded:
        x = g.node("Pad", [x, sides.vector(sides.pads, "pads")], "pad", mode="constant")
    x = g.node("Reshape", [x, sides.vector(sides.parted, "parted")], "partition")
    x = g.node("Transpose", [x], "partition_rows", perm=[0, 2, 4, 1, 3, 5])
    return g.reshape(x, [-1, C, sides.side, sides.side], "windows")


def _unwindows(g: Graph, x: str, sides: _Sides) -> str:
    """The way back from `_windows`, padding cropped."""
    x = g.node("Reshape", [x, sides.vector(sides.rows, "rows")], "reverse")
    x = g.node("Transpose", [x], "reverse_rows", perm=[0, 3, 1, 4, 2, 5])
    x = g.node("Reshape", [x, sides.vector(sides.image, "image")], "image")
    if sides.padded:
        starts = g.constant("crop.starts", np.array([0, 0]), np.int64)
        axes = g.constant("crop.axes", np.array([2, 3]), np.int64)
        x = g.node("Slice", [x, starts, sides.vector(sides.hw, "crop"), axes], "crop")
    return x


def _cga(g: Graph, x: str, s: Any, w: Any, size: Size, qkv: str) -> str:
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


def _patch_merge(g: Graph, x: str, s: Any, w: Any, size: Size, qkv: str) -> str:
    x = g.relu(g.conv(x, w.w1, w.b1, "pw1"), "relu1")
    x = g.relu(g.conv(x, w.dw, w.dw_bias, "dw", stride=2, depthwise=True), "relu2")
    gate = g.node("GlobalAveragePool", [x], "se.pool")
    gate = g.relu(g.conv(gate, w.se1, w.se1_bias, "se.fc1"), "se.relu")
    gate = g.node("Sigmoid", [g.conv(gate, w.se2, w.se2_bias, "se.fc2")], "se.sigmoid")
    return g.conv(g.node("Mul", [x, gate], "se.mul"), w.w3, w.b3, "pw2")


def _classifier(g: Graph, x: str, s: Any, w: Any, size: Size, qkv: str) -> str:
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


def emit(g: Graph, x: str, folded: list[tuple[Any, Any]], size: Size, qkv: str) -> tuple[str, Size]:
    """Adds every op of `fold.fold`'s list behind `x`; the name and size of the last output."""
    for index, (shape, weights) in enumerate(folded):
        g.prefix = f"{index:02d}.{shape.op}."
        x = _EMIT[shape.op](g, x, shape, weights, size, qkv)
        size = OPS[shape.op].out_hw(*size) if size else None
    return x, size
