"""The ways to run one model that the benchmark compares, each at its best settings.

A peer is built in a process of its own (`worker.py`): `build(job, x)` returns a function without
arguments that runs one forward over the images x, and a word on what runs it. Conversions of x are
part of the building, not of the time. A peer with streams keeps several batches in flight: its
function runs `batches` of them and returns their outputs one behind the other.

The graph of ONNX Runtime and OpenVINO has q, k, v as three convolutions and its batch fixed, which
is their faster form (OpenVINO splits a joined one by a slow kernel). What torch runs gets tcmalloc
where the system has it: worth 7 to 40 % to an allocator per op, and named beside the version.
"""

from __future__ import annotations

import ctypes.util
import importlib.metadata
import importlib.util
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PER_STREAM = 2  # batches: the streams wait for each other only behind the second


@dataclass(frozen=True)
class Job:
    """One model at one batch and thread count; `weights`: a safetensors file of its state_dict.

    isa: the instruction set that every peer is held to; empty: whatever the machine has. cache: a
    folder that outlives the process, for what takes minutes to make.
    """

    model: str
    batch: int
    threads: int
    size: int
    weights: str
    isa: str = ""
    cache: str = ""


class Built(NamedTuple):
    forward: Callable[[], Any]  # -> array-like [batches * B, N]
    kernel: str
    batches: int = 1  # that one call of forward runs


class Peer(NamedTuple):
    build: Callable[[Job, np.ndarray], Built]
    what: str
    needs: tuple[str, ...] = ()  # modules
    tcmalloc: bool = False
    capped: bool = True  # an environment variable holds it to a lower instruction set

    def missing(self, isa: str = "") -> str | None:
        """Why the peer cannot run, None when it can."""
        for module in self.needs:
            if importlib.util.find_spec(module) is None:
                return f"{module} is not installed"
        if isa and not self.capped:
            return f"it cannot be held to {isa}"
        return None


def environment(peer: Peer, threads: int, isa: str) -> dict[str, str]:
    """What a process of `peer` runs under. An instruction set is capped by EVIT_FAST_MAX_ISA here,
    by ATEN_CPU_CAPABILITY, ONEDNN_MAX_CPU_ISA and MKL_ENABLE_INSTRUCTIONS in torch, by the second
    of them in OpenVINO, whose compiled model is asked what it runs; the others have no such switch.
    """
    names = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
    found = dict.fromkeys(names, str(threads))
    if isa:
        upper = {"avx512": "AVX512_CORE"}.get(isa, isa.upper())
        found |= {
            "EVIT_FAST_MAX_ISA": isa,
            "ATEN_CPU_CAPABILITY": isa if isa != "scalar" else "default",
            "ONEDNN_MAX_CPU_ISA": upper,
            "MKL_ENABLE_INSTRUCTIONS": upper.removesuffix("_CORE"),
        }
    malloc = ctypes.util.find_library("tcmalloc") or ctypes.util.find_library("tcmalloc_minimal")
    if peer.tcmalloc and malloc:
        found["LD_PRELOAD"] = malloc
    return found


def _version(package: str) -> str:
    return f"{package} {importlib.metadata.version(package)}"


def _torch_version() -> str:
    """torch and the allocator that this process was started with."""
    maps = Path("/proc/self/maps")
    tcmalloc = maps.exists() and "tcmalloc" in maps.read_text()
    return _version("torch") + (", tcmalloc" if tcmalloc else "")


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
        model, kernel = model.eval(), f"timm {timm.__version__}, {_torch_version()}"
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
    return Built(_torch_forward(*_folded(job, x)), _torch_version())


def _jit(job: Job, x: np.ndarray) -> Built:
    import torch

    model, images = _folded(job, x)
    with torch.no_grad():
        traced = torch.jit.freeze(torch.jit.trace(model, images, check_trace=False))
        model = torch.jit.optimize_for_inference(traced)
    return Built(_torch_forward(model, images), _torch_version())


def _compile(job: Job, x: np.ndarray) -> Built:
    import torch
    import torch._inductor.config as inductor

    inductor.freezing = True
    inductor.cpp_wrapper = True  # walking the graph in Python costs a millisecond a forward
    if job.isa:
        inductor.cpp.simdlen = {"avx2": 256, "scalar": 1}.get(job.isa)
    model, images = _folded(job, x)
    model = torch.compile(model, mode="max-autotune", dynamic=False)
    return Built(_torch_forward(model, images), _torch_version())


def _onnx_bytes(job: Job) -> bytes:
    from evit_fast.export import to_onnx

    graph = to_onnx(_ours(job), image_size=job.size, batch=job.batch, qkv="separate")
    return graph.SerializeToString()


def _ort_session(graph: bytes, threads: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_ALL
    options.execution_mode = ort.ExecutionMode.ORT_SEQUENTIAL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    return ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _onnxruntime(job: Job, x: np.ndarray) -> Built:
    session = _ort_session(_onnx_bytes(job), job.threads)
    return Built(lambda: session.run(None, {"image": x})[0], _version("onnxruntime"))


def _onnxruntime_streams(job: Job, x: np.ndarray) -> Built:
    """A session of one thread for each thread, PER_STREAM batches each in a call."""
    graph = _onnx_bytes(job)
    sessions = [_ort_session(graph, 1) for _ in range(job.threads)]
    pool = ThreadPoolExecutor(job.threads)

    def stream(session: Any) -> list[np.ndarray]:
        return [session.run(None, {"image": x})[0] for _ in range(PER_STREAM)]

    def forward() -> np.ndarray:
        return np.concatenate([y for ys in pool.map(stream, sessions) for y in ys])

    kernel = f"{_version('onnxruntime')}, {job.threads} sessions"
    return Built(forward, kernel, job.threads * PER_STREAM)


def _openvino_model(job: Job, streams: int) -> tuple[Any, str]:
    """The compiled model, and the version with the instruction set of its convolutions."""
    import openvino as ov

    core = ov.Core()
    compiled = core.compile_model(
        core.read_model(_onnx_bytes(job)),
        "CPU",
        {
            "INFERENCE_NUM_THREADS": job.threads,
            "NUM_STREAMS": streams,
            "PERFORMANCE_HINT": "LATENCY" if streams == 1 else "THROUGHPUT",
            "INFERENCE_PRECISION_HINT": "f32",
        },
    )
    kinds = set()
    for node in compiled.get_runtime_model().get_ordered_ops():
        info = node.get_rt_info()
        if info["layerType"].astype(str) == "Convolution":
            kinds.add(info["primitiveType"].astype(str))
    used = {isa for isa in ("avx512", "avx2") if any(isa in kind for kind in kinds)}
    if job.isa in ("avx2", "scalar") and "avx512" in used:
        raise ValueError(f"it runs {', '.join(sorted(kinds))} although it is held to {job.isa}")
    return compiled, " ".join([_version("openvino"), *sorted(used)])


def _openvino(job: Job, x: np.ndarray) -> Built:
    compiled, kernel = _openvino_model(job, 1)
    request = compiled.create_infer_request()
    return Built(lambda: request.infer({0: x})[0], kernel)


def _openvino_streams(job: Job, x: np.ndarray) -> Built:
    """A stream for each thread, PER_STREAM batches each in a call."""
    import openvino as ov

    compiled, kernel = _openvino_model(job, job.threads)
    batches = job.threads * PER_STREAM
    outputs: list[Any] = [None] * batches
    queue = ov.AsyncInferQueue(compiled, job.threads)

    def keep(request: Any, i: int) -> None:
        outputs[i] = request.get_output_tensor().data.copy()

    queue.set_callback(keep)

    def forward() -> np.ndarray:
        for i in range(batches):
            queue.start_async({0: x}, i)
        queue.wait_all()
        return np.concatenate(outputs)

    return Built(forward, f"{kernel}, {job.threads} streams", batches)


def _litert(job: Job, x: np.ndarray) -> Built:
    """The folded model through litert-torch, NHWC in, XNNPACK."""
    import litert_torch
    import torch
    from ai_edge_litert.interpreter import Interpreter

    images = np.ascontiguousarray(x.transpose(0, 2, 3, 1))
    path = (
        Path(job.cache or Path(job.weights).parent) / f"{job.model}-{job.batch}-{job.size}.tflite"
    )
    if not path.exists():
        model = fold_batch_norms(_ours(job)).to(memory_format=torch.contiguous_format)
        channels_last = litert_torch.to_channel_last_io(model, args=[0]).eval()
        converted = litert_torch.convert(channels_last, (torch.from_numpy(images),))
        converted.export(str(path))
    interpreter = Interpreter(str(path), num_threads=job.threads)
    interpreter.allocate_tensors()
    source = interpreter.get_input_details()[0]["index"]
    result = interpreter.get_output_details()[0]["index"]
    interpreter.set_tensor(source, images)

    def forward() -> np.ndarray:
        interpreter.invoke()
        return interpreter.get_tensor(result)

    return Built(forward, f"{_version('ai-edge-litert')}, XNNPACK")


def _fused(job: Job, x: np.ndarray) -> Built:
    import torch

    import evit_fast
    from evit_fast import _native

    model = evit_fast.accelerate(_ours(job), threads=job.threads, strict=True)
    return Built(_torch_forward(model, torch.from_numpy(x)), f"evit_fast {_native.isa()}")


PEERS = {
    "fused": Peer(_fused, "this package"),
    "eager": Peer(_eager, "timm's model as it comes", tcmalloc=True),
    "folded": Peer(_eager_folded, "eager, BN folded, channels_last", tcmalloc=True),
    "jit": Peer(_jit, "folded, traced, frozen, optimize_for_inference", tcmalloc=True),
    "compile": Peer(
        _compile, "folded, torch.compile with freezing and max-autotune", tcmalloc=True
    ),
    "onnxruntime": Peer(
        _onnxruntime, "folded graph; q, k, v separate", ("onnx", "onnxruntime"), capped=False
    ),
    "openvino": Peer(_openvino, "folded graph; q, k, v separate", ("onnx", "openvino")),
    "litert": Peer(
        _litert, "folded, converted by litert-torch", ("litert_torch", "ai_edge_litert"),
        capped=False,
    ),
    "onnxruntime-streams": Peer(
        _onnxruntime_streams, "a session for each thread, batches in flight",
        ("onnx", "onnxruntime"), capped=False,
    ),
    "openvino-streams": Peer(
        _openvino_streams, "throughput mode, a stream for each thread", ("onnx", "openvino")
    ),
}  # fmt: skip
STREAMS = "-streams"


def expand(names: Sequence[str], batch: int, threads: int) -> list[str]:
    """`names` and, where several threads work on batches, the same runtimes with a stream for each:
    images a second count there; the time of one image is what batch 1 is about."""
    found = list(names)
    if threads > 1 and batch > 1:
        extra = [f"{name}{STREAMS}" for name in names if f"{name}{STREAMS}" in PEERS]
        found += [name for name in extra if name not in found]
    return found
