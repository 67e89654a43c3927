"""torch sees the kernels of a Triton op: in make_fx and in what a compiler backend receives."""

from __future__ import annotations

import importlib

import pytest
import torch
from functorch.compile import aot_module_simplified
from torch._subclasses import FakeTensorMode

from evit_fast import _native, program
from evit_fast.kernels import compiled, torch_ops
from evit_fast.ops import OPS


def arguments(op: str, dtype: torch.dtype = torch.float16, device: str = "cpu"):
    s, _ = compiled.shapes(op)[0]
    kernels = importlib.import_module(f"evit_fast.kernels.{op}")
    line = s.line(0, dtype)
    blob = torch.zeros(_native.op_bytes(line), dtype=torch.uint8, device=device)
    packed = kernels.prepare(program.unpack(program.parse(line)[0], blob), s, dtype)
    shape = (2, s.channels_in, 32, 32) if op == "stem" else (2, 7, 7, s.channels_in)
    return torch.randn(shape, device=device, dtype=dtype), packed, s


def kernels_in(graph: torch.fx.GraphModule) -> list[str]:
    """Names of the kernels that a graph launches, in order."""
    from torch._higher_order_ops.triton_kernel_wrap import kernel_side_table

    return [
        kernel_side_table.get_kernel(node.kwargs["kernel_idx"]).fn.__name__
        for node in graph.graph.nodes
        if "triton_kernel_wrapper" in str(node.target)
    ]


def planned(op: str) -> list[str]:
    s, _ = compiled.shapes(op)[0]
    side = 32 if op == "stem" else 7
    launches = compiled.plan(s, torch.float16, 2, side, side, 80)
    return [launch.kernel.fn.__name__ for launch in launches]


def compiled_graphs(f, x: torch.Tensor) -> list[torch.fx.GraphModule]:
    """What a compiler backend receives after AOTAutograd, as Inductor would. Nothing is run."""
    seen = []

    def stop(graph, inputs):
        seen.append(graph)
        raise StopIteration

    def backend(graph, inputs):
        return aot_module_simplified(graph, inputs, fw_compiler=stop)

    torch._dynamo.reset()
    with torch.no_grad(), pytest.raises(Exception, match="StopIteration"):
        torch.compile(f, backend=backend, fullgraph=True)(x)
    return seen


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("op", OPS)
def test_a_compiler_backend_receives_the_kernels(op, dynamic):
    x, packed, s = arguments(op)

    line = s.line(0, torch.float16)

    def f(x):
        return torch_ops.call(x, packed, line, arch=80) + 1

    if dynamic:  # images, rows and columns
        for axis in (0, 2, 3) if op == "stem" else (0, 1, 2):
            torch._dynamo.mark_dynamic(x, axis)
    graphs = compiled_graphs(f, x)
    assert [kernels_in(graph) for graph in graphs] == [planned(op)]


@pytest.mark.parametrize("op", OPS)
def test_the_fake_is_shaped_as_the_op_says(op):
    for dtype in (torch.float32, torch.float16):
        x, packed, s = arguments(op, dtype)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            y = torch_ops.call(mode.from_tensor(x), packed, s.line(0, dtype), arch=80)
        assert y.shape == program.output_shape(s.line(), x.shape)
        assert y.dtype == dtype and y.is_contiguous()


@pytest.mark.parametrize("op", OPS)
def test_torch_keys_its_compiled_graphs_by_the_kernels(op):
    from torch._library.triton import get_triton_kernels_for_op

    known = {kernel.fn.__name__ for kernel in get_triton_kernels_for_op(f"evit_fast::triton_{op}")}
    assert set(planned(op)) <= known
