"""FLOPs and distinct bytes of every aten op of an eager forward, in the order of their execution.

    with Counter() as counter:
        model(x)
    counter.ops

Bytes: every different element that goes in and every one that comes out, once each; a view is none
and is not listed. FLOPs: a multiply-add is two, an element of a softmax five (maximum, difference,
power, sum, quotient), of any other element-wise function one; a copy has none.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch.nn.modules.module import (
    register_module_forward_hook,
    register_module_forward_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from evit_fast.profiles import classes

SOFTMAX_FLOPS = 5  # an element


@dataclass(frozen=True)
class Counted:
    """One op. kind: `aten::convolution`; shape: of what goes in, as text; part: the fused op that
    does its work, empty where no module says so."""

    kind: str
    shape: str
    group: str  # its class
    flops: int
    bytes: int
    part: str = ""


# Modules of the eager model, of timm's and ours, and the fused op that stands for each.
PARTS = {
    "PatchEmbedding": "stem",
    "ResidualDrop": "dw_ffn",
    "LocalWindowAttention": "cga",
    "PatchMerging": "patch_merge",
    "NormLinear": "classifier",
    "Linear": "classifier",
    "GlobalPool": "classifier",
    "SelectAdaptivePool2d": "classifier",
}


class Counter(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.ops: list[Counted] = []
        self._parts: list[str] = []  # of the modules that are running, the outermost first
        self._hooks: list[Any] = []

    def __enter__(self) -> Counter:
        self._hooks = [
            register_module_forward_pre_hook(lambda module, args: self._enter(module)),
            register_module_forward_hook(lambda module, args, out: self._leave()),
        ]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def _enter(self, module: torch.nn.Module) -> None:
        inside = getattr(module, "m", module)  # of a residual
        name = type(inside).__name__
        own = PARTS.get(name if name in PARTS else type(module).__name__, "")
        self._parts.append(next(filter(None, self._parts), own))

    def _leave(self) -> None:
        self._parts.pop()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func._schema.name
        if classes.is_view(name):
            return out
        inputs, outputs = _tensors((args, kwargs)), _tensors(out)
        written = func._schema.is_mutable
        if not written and _memory(outputs) & _memory(inputs):
            return out  # `contiguous` or `to` with nothing to do
        part = self._parts[-1] if self._parts else ""
        self.ops.append(counted(name, inputs, outputs, args, part))
        return out


def counted(
    name: str,
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[torch.Tensor],
    args: tuple = (),
    part: str = "",
) -> Counted:
    """ValueError: the table of classes does not have the op."""
    depthwise = False
    if classes.bare(name) == "convolution":
        groups, channels = args[8], inputs[0].shape[1]
        depthwise = groups > 1 and groups == channels
    group = classes.class_of(name, depthwise)
    if group is None:
        raise ValueError(f"profiles/classes.py: no class for the op {name!r}; add it to OPS")
    sizes = [tuple(t.shape) for t in inputs]
    flops = flops_of(name, group, sizes, tuple(outputs[0].shape))
    moved = _distinct(inputs) + _distinct(outputs)
    return Counted(name, shape_text(sizes), group, flops, moved, part)


def flops_of(name: str, group: str, inputs: Sequence[Sequence[int]], output: Sequence[int]) -> int:
    """FLOPs from sizes alone; what goes in is listed as the op takes it: a bias may come first."""
    size = prod(output)
    if group in ("conv_gemm", "attention"):
        bias_first = classes.bare(name) in ("addmm", "baddbmm")
        a, b = inputs[1:3] if bias_first else (*inputs, ())[:2]
        if len(b) == 4 and len(output) == 4 and group == "conv_gemm":  # [CO, C / groups, KH, KW]
            return 2 * size * prod(b[1:])
        return 2 * size * prod(a) * output[-1] // max(size, 1)  # [.., M, N] of [.., M, K]
    if group == "depthwise":
        return 2 * size * prod(inputs[1][1:])
    if group == "softmax":
        return SOFTMAX_FLOPS * size
    if group == "normalisation":
        return 2 * size  # the statistics are given: one multiply-add
    if group == "elementwise":
        return size
    return prod(inputs[0]) if group == "pooling" else 0


def shape_text(sizes: Iterable[Sequence[int]]) -> str:
    """`1x64x14x14, 128x64x1x1`: tensors of two dimensions and more, the first two of them."""
    found = ["x".join(map(str, size)) for size in sizes if len(size) > 1]
    return ", ".join(found[:2])


def _tensors(values: Any) -> list[torch.Tensor]:
    return [value for value in tree_leaves(values) if isinstance(value, torch.Tensor)]


def _memory(tensors: Sequence[torch.Tensor]) -> set[int]:
    return {t.untyped_storage().data_ptr() for t in tensors if t.numel()}


def _distinct(tensors: Sequence[torch.Tensor]) -> int:
    """Bytes of the different elements; one tensor given twice is one, a broadcast dimension too."""
    seen = {(t.data_ptr(), t.shape, t.stride()): t for t in tensors}
    return sum(
        t.element_size() * prod(n for n, stride in zip(t.shape, t.stride(), strict=True) if stride)
        for t in seen.values()
        if t.numel()
    )
