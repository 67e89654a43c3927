"""The torch op that runs a program, and the columns it can run in.

    evit_fast::forward(Tensor x, str program, Tensor blob, Tensor? anchor=None, str backend="auto",
    int threads=0, bool? graphs=None, bool deterministic=False)

x is [B, in, H, W] where the program starts with `stem` (any strides; uint8 pixels or normalised
float), else [B, H, W, C]. The result is [B, N] logits where the program ends with `classifier`,
else contiguous [B, H', W', C]; it has x's dtype (uint8: float32) whatever the program computes in,
and autocast does not reach inside.

The op has no gradient. Where grad mode is on and x or `anchor` requires grad the result carries a
grad_fn whose backward raises: `anchor` is one parameter of the model that owns the weights (the
blob itself cannot require grad). `threads=0` follows torch.get_num_threads() at each call. The op
is opaque: torch.compile and torch.export see one node. `graphs` and `deterministic` matter on a GPU
only: see accelerate().
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from evit_fast import _native, gpu, walker
from evit_fast import program as programs

BACKENDS = ("auto", "reference", "cpu", "triton", "cuda")
DTYPES = (torch.float32, torch.uint8, torch.float16, torch.bfloat16, torch.float64)
MAX_THREADS = 256
MODELS_KEPT = 256  # native models, one per program or slice and blob: a few pointers per line

NO_BACKWARD = (
    "evit_fast: the fused forward has no backward; call .train() first, which runs the eager "
    "model, or use the eager model itself"
)


class Settings(NamedTuple):
    """How to run: the last arguments of the op, in its order."""

    backend: str = "auto"
    threads: int = 0
    graphs: bool | None = None
    deterministic: bool = False


@lru_cache(maxsize=256)
def choose(program: str, place: gpu.Place, backend: str = "auto") -> tuple[str, str]:
    """(column, reason) for a program on a device; "triton" where it is walked on a GPU and any op
    is Triton's, "cuda" where none is. reason: why the reference runs it, or some of its ops.

    ValueError: unknown backend. NotImplementedError: that backend cannot run this program here.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend: expected one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend == "reference":
        return "reference", "backend='reference' was asked for"
    if backend in ("triton", "cuda") or (backend == "auto" and place.kind == "cuda"):
        column, why = _choose_gpu(program, place, backend)
    else:
        column, why = _choose_cpu(program, place)
    if why and backend != "auto":
        raise NotImplementedError(f"backend={backend!r}: {why}; use backend='auto' or 'reference'")
    return column, why


def _choose_gpu(program: str, place: gpu.Place, backend: str) -> tuple[str, str]:
    if place.kind not in ("cuda", "cpu"):
        return "reference", f"no column for {place.kind} devices in this version"
    ops = walker.columns(program, place, backend)
    why = next((op.reason for op in ops if op.name == "reference"), "")
    names = {op.name for op in ops}
    return next(name for name in ("triton", "cuda", "reference") if name in names), why


def _choose_cpu(program: str, place: gpu.Place) -> tuple[str, str]:
    other = {op.dtype for op in programs.parse(program)} - {torch.float32}
    if place.kind != "cpu":
        return "reference", f"no column for {place.kind} devices in this version"
    if other:
        name = str(other.pop()).removeprefix("torch.")
        return "reference", f"the cpu column computes in float32 only, this program in {name}"
    return "cpu", ""


class _Space:
    """One thread's workspace; weakly known to empty_cache(), so that it dies with its thread."""

    tensor: torch.Tensor | None = None


_spaces: weakref.WeakValueDictionary[int, _Space] = weakref.WeakValueDictionary()


class _Arena(threading.local):
    """One workspace per calling thread, kept between calls: fresh pages would cost milliseconds."""

    def __init__(self) -> None:
        self.space = _Space()
        _spaces[id(self.space)] = self.space


_arena = _Arena()
_CPU = torch.device("cpu")
_models: dict[tuple[str, int, int], _native.Model] = {}


def empty_cache() -> None:
    """Frees the workspace of every thread (one in use right now is freed after its call), the
    native models, and what lies on GPUs: weights as the kernels read them, and CUDA graphs.
    """
    for space in _spaces.valuerefs():
        if (alive := space()) is not None:
            alive.tensor = None
    _models.clear()
    walker.empty_cache()


def _workspace(nbytes: int) -> torch.Tensor:
    space = _arena.space
    tensor = space.tensor
    if tensor is None or tensor.numel() < nbytes:
        space.tensor = tensor = None  # frees the old one first
        space.tensor = tensor = torch.empty(nbytes, dtype=torch.uint8, device=_CPU)
    return tensor


def _model(program: str, blob: torch.Tensor) -> _native.Model:
    # A Model is a verified view of (program, address, length) and keeps nothing of the bytes, so
    # that another blob at the same address may use it too.
    key = (program, blob.data_ptr(), blob.numel())
    model = _models.get(key)
    if model is None:
        if not blob.is_contiguous() or blob.dtype != torch.uint8:
            raise ValueError("blob: expected one contiguous uint8 tensor; pack it again")
        if len(_models) >= MODELS_KEPT:
            _models.clear()
        model = _models[key] = _native.Model(program, key[1], key[2])
    return model


def _run_cpu(x: torch.Tensor, program: str, blob: torch.Tensor, threads: int) -> torch.Tensor:
    model, shape = _model(program, blob), x.shape
    B, H, W = (shape[0], *_hw(program, shape))
    y = torch.empty(model.output_shape(B, H, W), dtype=torch.float32, device=_CPU)
    threads = threads or min(torch.get_num_threads(), MAX_THREADS)
    space = _workspace(model.workspace_bytes(B, H, W, threads))
    kind = "uint8" if x.dtype == torch.uint8 else "float32"
    model.run(
        x.data_ptr(),
        kind,
        shape,
        x.stride(),
        y.data_ptr(),
        space.data_ptr(),
        space.numel(),
        threads,
    )
    return y


def _hw(program: str, shape: Sequence[int]) -> Sequence[int]:
    return shape[2:] if program.startswith("stem ") else shape[1:3]


def _check(x: torch.Tensor, program: str, blob: torch.Tensor) -> None:
    """Raises one sentence where x is not what the program takes."""
    first = programs.parse(program)[0]
    wide = first.shape.channels_in
    stem = first.name == "stem"
    if x.dtype not in DTYPES or x.layout != torch.strided:
        kind = f"{x.dtype}" if x.layout == torch.strided else f"{x.layout}"
        raise ValueError(
            f"evit_fast: x is {kind}, but expected uint8 pixels or a dense float16, bfloat16, "
            "float32 or float64 tensor; convert it"
        )
    axes = f"[B, {wide}, H, W]" if stem else f"[B, H, W, {wide}]"
    if x.dim() != 4 or x.shape[1 if stem else 3] != wide:
        raise ValueError(f"evit_fast: expected x of shape {axes}, got {list(x.shape)}")
    H, W = _hw(program, x.shape)
    if H < 1 or W < 1:
        raise ValueError(
            f"evit_fast: expected x of shape {axes} with H and W of at least 1, got {list(x.shape)}"
        )
    if x.dtype == torch.uint8 and not stem:
        raise ValueError(
            f"evit_fast: x is uint8, but a program that starts with {first.name} takes tokens, "
            "not pixels; convert it to a float dtype"
        )
    if x.device.type == "meta":
        raise ValueError(
            "evit_fast: x is on the meta device and has no data; move it to a real one"
        )
    if x.device != blob.device:
        raise ValueError(
            f"evit_fast: x is on {x.device}, the weights are on {blob.device}; move one of them"
        )


# Below, `rest` are Settings; torch leaves out what has its default.


def _forward(
    x: torch.Tensor, program: str, blob: torch.Tensor, anchor: torch.Tensor | None = None, *rest
) -> torch.Tensor:
    _check(x, program, blob)
    dtype = torch.float32 if x.dtype == torch.uint8 else x.dtype
    backend, threads, graphs, deterministic = Settings(*rest)
    place = gpu.place(x.device)
    column, _ = choose(program, place, backend)
    if column == "reference":
        y = programs.run_reference(x, program, blob)
    elif column in ("triton", "cuda"):
        y = walker.run(x, program, blob, place, graphs, deterministic, backend)
    else:
        if x.dtype != torch.uint8 and x.dtype != torch.float32:
            x = x.float()
        if not program.startswith("stem "):
            x = x.contiguous()
        y = _run_cpu(x, program, blob, threads)
    return y if y.dtype == dtype else y.to(dtype)


def _fake(
    x: torch.Tensor, program: str, blob: torch.Tensor, anchor: torch.Tensor | None = None, *rest
) -> torch.Tensor:
    _check(x, program, blob)
    dtype = torch.float32 if x.dtype == torch.uint8 else x.dtype
    return x.new_empty(programs.output_shape(program, x.shape), dtype=dtype)


class _NoBackward(torch.autograd.Function):
    """Gives the result a grad_fn. Its backward is an op of its own, which raises when it runs, not
    when it is traced.
    """

    @staticmethod
    def forward(ctx, x: torch.Tensor, anchor: torch.Tensor | None, *rest: object) -> torch.Tensor:
        ctx.likes = [None if t is None else (t.shape, t.dtype) for t in (x, anchor)]
        with torch._C._AutoDispatchBelowAutograd():
            return _op(x, rest[0], rest[1], None, *rest[2:])

    @staticmethod
    def backward(ctx, grad: torch.Tensor) -> tuple:
        wanted = [
            torch.ops.evit_fast.no_backward.default(grad, *like) if needs else None
            for needs, like in zip(ctx.needs_input_grad, ctx.likes, strict=False)
        ]
        return (*wanted, *(None for _ in ctx.needs_input_grad[2:]))


def _autograd(
    x: torch.Tensor, program: str, blob: torch.Tensor, anchor: torch.Tensor | None = None, *rest
) -> torch.Tensor:
    wants = x.requires_grad or (anchor is not None and anchor.requires_grad)
    if wants and torch.is_grad_enabled():
        return _NoBackward.apply(x, anchor, program, blob, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(x, program, blob, None, *rest)


def _no_backward(grad: torch.Tensor, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    raise RuntimeError(NO_BACKWARD)


def _no_backward_fake(grad: torch.Tensor, size: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    return grad.new_empty(size, dtype=dtype)


_library = torch.library.Library("evit_fast", "FRAGMENT")
_library.define(
    "forward(Tensor x, str program, Tensor blob, Tensor? anchor=None, "
    'str backend="auto", int threads=0, bool? graphs=None, bool deterministic=False) -> Tensor',
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.define(
    "no_backward(Tensor grad, SymInt[] size, ScalarType dtype) -> Tensor",
    tags=(torch.Tag.pt2_compliant_tag,),
)
_library.impl("forward", _forward, "CompositeExplicitAutograd")  # any device and layout
_library.impl("no_backward", _no_backward, "CompositeExplicitAutograd")
_library.impl("forward", _autograd, "Autograd")
torch.library.register_fake("evit_fast::forward", _fake, lib=_library)
torch.library.register_fake("evit_fast::no_backward", _no_backward_fake, lib=_library)
_op = torch.ops.evit_fast.forward.default


def forward(
    x: torch.Tensor, program: str, blob: torch.Tensor, anchor: torch.Tensor | None = None, *rest
) -> torch.Tensor:
    """The op. Where nobody could tell the difference, without torch's dispatcher: after a forward
    that went through megabytes of weights its code is out of the caches, and the way through it
    costs 50 us and more, not the 10 us of a warm loop.
    """
    if torch.compiler.is_compiling():
        return _op(x, program, blob, anchor, *rest)
    wants = x.requires_grad or (anchor is not None and anchor.requires_grad)
    if wants and torch.is_grad_enabled():
        return _NoBackward.apply(x, anchor, program, blob, *rest)
    plain = type(x) is torch.Tensor and type(blob) is torch.Tensor and not x.is_neg()
    if plain and not _observed():
        return _forward(x, program, blob, None, *rest)
    with torch._C._AutoDispatchBelowAutograd():
        return _op(x, program, blob, None, *rest)


def _observed() -> bool:
    """Someone watches or changes what ops do: a mode, a transform, a trace, a profiler."""
    return (
        torch._C._len_torch_dispatch_stack() > 0
        or torch._C._len_torch_function_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch._C._autograd._profiler_enabled()
    )
