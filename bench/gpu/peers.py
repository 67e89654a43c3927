"""What whole models are compared with on a card, each at its best settings.

folded      batch norms folded, channels_last
graph       the same, captured in a CUDA graph
jit         the same, traced and frozen
compile*    the same, torch.compile in its modes; reduce-overhead and max-autotune use CUDA graphs
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from evit_fast.bench.gpu.card import Card
from evit_fast.bench.gpu.subjects import eager
from evit_fast.bench.peers import fold_batch_norms

MODES = {
    "compile": "default",
    "compile-graphs": "reduce-overhead",
    "compile-max": "max-autotune",
}
# Peers of one row are timed with fused in the same rounds; a row is one step. Cheap ones first.
GROUPS = (("eager", "folded", "graph", "jit"), ("compile",), ("compile-graphs",), ("compile-max",))
PEERS = tuple(name for group in GROUPS for name in group)
WITHOUT_A_CARD = ("eager", "folded")
GUESS_S = {"eager": 15, "compile": 60, "compile-graphs": 60, "compile-max": 240}  # with building


def build(name: str, model: str, size: int, card: Card, x: torch.Tensor) -> Callable[[], Any]:
    """A function that runs one forward of the peer over x, which has the dtype and the device."""
    if name == "eager":
        return forward_of(_timm_or_ours(model, size).to(card.device, x.dtype).eval(), x)
    folded = fold_batch_norms(copy.deepcopy(eager(model, size))).to(card.device, x.dtype)
    folded, x = (t.to(memory_format=torch.channels_last) for t in (folded, x))
    if name == "graph":
        return _graph(folded, x)
    if name == "jit":
        with torch.no_grad():
            traced = torch.jit.freeze(torch.jit.trace(folded, x, check_trace=False))
        return forward_of(traced, x)
    if name in MODES:
        torch._dynamo.reset()
        return forward_of(torch.compile(folded, mode=MODES[name], dynamic=False), x)
    return forward_of(folded, x)


def forward_of(model: Any, x: torch.Tensor) -> Callable[[], Any]:
    def forward() -> Any:
        with torch.inference_mode():
            return model(x)

    return forward


def _graph(model: nn.Module, x: torch.Tensor) -> Callable[[], Any]:
    forward = forward_of(model, x)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # cuDNN chooses its kernels outside the capture
            forward()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = forward()

    def replay() -> Any:
        graph.replay()
        return y

    return replay


def _timm_or_ours(model: str, size: int) -> nn.Module:
    """timm's model as timm gives it, with our weights; ours where timm is not installed."""
    if importlib.util.find_spec("timm") is None:
        return copy.deepcopy(eager(model, size))
    from evit_fast.bench.timm_stub import import_timm

    options = {} if size == 224 else {"img_size": size}
    found = import_timm().create_model(model, pretrained=False, **options)
    found.load_state_dict(eager(model, size).state_dict())
    return found
