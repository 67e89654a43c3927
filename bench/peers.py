"""The ways to run one model that the benchmark compares, each at its best settings.

A peer is built in a process of its own (`worker.py`): `build(job, x)` returns a function without
arguments that runs one forward over the images x, and a word on what runs it. Conversions of x are
part of the building, not of the time.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np


@dataclass(frozen=True)
class Job:
    """One model at one batch and thread count; `weights`: a safetensors file of its state_dict."""

    model: str
    batch: int
    threads: int
    size: int
    weights: str


class Built(NamedTuple):
    forward: Callable[[], Any]  # -> array-like [B, N]
    kernel: str


class Peer(NamedTuple):
    build: Callable[[Job, np.ndarray], Built]
    what: str
    needs: tuple[str, ...] = ()  # modules

    def missing(self) -> str | None:
        """Which module is not installed, None when the peer can run."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        return None


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _ours(job: Job) -> Any:
    """The eager model of this package, in eval mode."""
    from safetensors.torch import load_file

    from evit_fast.model import create_model

    model = create_model(job.model, img_size=job.size)
    model.load_state_dict(load_file(job.weights))
    return model.eval()


def _torch_forward(model: Any, x: Any) -> Callable[[], Any]:
    import torch

    def forward() -> Any:
        with torch.inference_mode():
            return model(x)

    return forward


def _eager(job: Job, x: np.ndarray) -> Built:
    """timm's model as timm gives it: NCHW, BN not folded."""
    import torch
    from safetensors.torch import load_file

    from evit_fast.bench.timm_stub import import_timm

    if importlib.util.find_spec("timm") is None:
        model, kernel = _ours(job), "evit_fast eager (timm is not installed)"
    else:
        timm = import_timm()
        options = {} if job.size == 224 else {"img_size": job.size}
        model = timm.create_model(job.model, pretrained=False, **options)
        model.load_state_dict(load_file(job.weights))
        model, kernel = model.eval(), f"timm {timm.__version__}"
    return Built(_torch_forward(model, torch.from_numpy(x)), kernel)


def fold_batch_norms(model: Any) -> Any:
    """`model` with every ConvNorm one convolution and every NormLinear one linear layer, in place.

    The arithmetic is float64; the model comes back in float32, channels_last, in eval mode.
    """
    import torch
    from torch import nn
    from torch.nn.utils.fusion import fuse_conv_bn_eval

    model = model.double().eval()
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if hasattr(child, "conv") and hasattr(child, "bn"):
                setattr(parent, name, fuse_conv_bn_eval(child.conv, child.bn))
            elif hasattr(child, "linear") and hasattr(child, "bn"):
                bn, linear = child.bn, child.linear
                scale = bn.weight / (bn.running_var + bn.eps).sqrt()
                shift = bn.bias - bn.running_mean * scale
                folded = nn.Linear(linear.in_features, linear.out_features, dtype=torch.float64)
                with torch.no_grad():
                    folded.weight.copy_(linear.weight * scale)
                    folded.bias.copy_(linear.bias + linear.weight @ shift)
                setattr(parent, name, folded)
    return model.float().to(memory_format=torch.channels_last)


def _folded(job: Job, x: np.ndarray) -> tuple[Any, Any]:
    import torch

    images = torch.from_numpy(x).to(memory_format=torch.channels_last)
    return fold_batch_norms(_ours(job)), images


def _eager_folded(job: Job, x: np.ndarray) -> Built:
    return Built(_torch_forward(*_folded(job, x)), _version("torch"))


def _jit(job: Job, x: np.ndarray) -> Built:
    import torch

    model, images = _folded(job, x)
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(model, images, check_trace=False))
        model = torch.jit.optimize_for_inference(traced)
    return Built(_torch_forward(model, images), _version("torch"))


def _compile(job: Job, x: np.ndarray) -> Built:
    import torch
    import torch._inductor.config

    torch._inductor.config.freezing = True
    model, images = _folded(job, x)
    model = torch.compile(model, mode="max-autotune", dynamic=False)
    return Built(_torch_forward(model, images), _version("torch"))


def _onnx_bytes(job: Job) -> bytes:
    from evit_fast.export import to_onnx

    graph = to_onnx(_ours(job), image_size=job.size, batch=job.batch, qkv="separate")
    return graph.SerializeToString()


def _onnxruntime(job: Job, x: np.ndarray) -> Built:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = job.threads
    options.inter_op_num_threads = 1
    session = ort.InferenceSession(_onnx_bytes(job), options, providers=["CPUExecutionProvider"])
    return Built(lambda: session.run(None, {"image": x})[0], _version("onnxruntime"))


def _openvino(job: Job, x: np.ndarray) -> Built:
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(
        core.read_model(_onnx_bytes(job)),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": job.threads,
            "NUM_STREAMS": 1,
            "PERFORMANCE_HINT": "LATENCY",
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    request = compiled.create_infer_request()
    return Built(lambda: request.infer({0: x})[0], _version("openvino"))


def _fused(job: Job, x: np.ndarray) -> Built:
    import torch

    import evit_fast
    from evit_fast import _native

    model = evit_fast.accelerate(_ours(job), threads=job.threads, strict=True)
    return Built(_torch_forward(model, torch.from_numpy(x)), f"evit_fast {_native.isa()}")


PEERS = {
    "fused": Peer(_fused, "this package"),
    "eager": Peer(_eager, "timm's model as it comes"),
    "folded": Peer(_eager_folded, "eager, BN folded, channels_last"),
    "jit": Peer(_jit, "folded, traced, frozen, optimize_for_inference"),
    "compile": Peer(_compile, "folded, torch.compile with freezing and max-autotune"),
    "onnxruntime": Peer(
        _onnxruntime, "folded graph; q, k, v separate", ("onnx", "onnxruntime")
    ),
    "openvino": Peer(_openvino, "folded graph; q, k, v separate", ("onnx", "openvino")),
}  # fmt: skip
