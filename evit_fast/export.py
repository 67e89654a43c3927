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
from evit_fast.onnx_graph import Graph, Size, emit
from evit_fast.ops import OPS

OPSET = 17
BOUND = 1e-4  # relative L2 error at the logits, ONNX Runtime against float64 eager
QKV_FORMS = ("separate", "joined")
DYNAMIC = "dynamic"
DYNAMIC_SIZES = ((224, 224), (160, 208))  # where a graph of any size is checked


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
    g = Graph(onnx)
    channels = folded[0][0].in_
    _, size = emit(g, "image", folded, size, qkv)
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
