"""torch.compile, torch.export and the checks that torch has for custom ops."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import evit_fast
from evit_fast.config import Config
from evit_fast.fast import FastEfficientVit
from evit_fast.model import EfficientVit, create_model
from tests.close import assert_close, relative_error
from tests.randomize import randomize

OP = torch.ops.evit_fast.forward.default
SHAPES = ((2, 3, 64, 96), (1, 3, 224, 224), (5, 3, 33, 70))


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


@pytest.fixture
def fast() -> FastEfficientVit:
    return evit_fast.accelerate(randomize(create_model("m0", num_classes=7), seed=1))


@pytest.fixture
def program(fast: FastEfficientVit, tmp_path):
    evit_fast.save(fast, tmp_path / "m.evit")
    return evit_fast.load(tmp_path / "m.evit")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


# ------------------------------------------------------------------ the op


@pytest.mark.parametrize("part", ["whole", "features", "stage", "head"])
def test_opcheck(part: str, fast: FastEfficientVit):
    folded = fast._folded
    x, text = {
        "whole": (images(2, 3, 64, 32), folded.program),
        "features": (torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8), folded.features),
        "stage": (images(2, 5, 6, 64), folded.stages[1]),
        "head": (images(2, 5, 6, 192).half(), folded.head),
    }[part]
    torch.library.opcheck(OP, (x, text, folded.blob))
    torch.library.opcheck(OP, (x, text, folded.blob, None, "reference", 1))


def test_opcheck_with_gradients(fast: FastEfficientVit):
    """All but the one check that calls backward, which must raise."""
    x = images(2, 3, 64, 32).requires_grad_()
    args = (x, fast._folded.program, fast._folded.blob, nn.Parameter(torch.zeros(1)))
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(OP, args, test_utils=checks)
    with pytest.raises(RuntimeError, match="no backward"):
        OP(*args).sum().backward()


# ------------------------------------------------------------------ torch.compile


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("dynamic", [None, True], ids=["auto", "dynamic"])
def test_compile(dynamic: bool | None, grad: bool, fast: FastEfficientVit):
    compiled = torch.compile(fast, fullgraph=True, dynamic=dynamic)
    with torch.set_grad_enabled(grad):
        for shape in SHAPES:
            x = images(*shape)
            y = compiled(x)
            assert torch.equal(y, fast(x)) and y.requires_grad is grad
        pixels = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
        assert torch.equal(compiled(pixels), fast(pixels))
    if grad:
        with pytest.raises(RuntimeError, match="no backward; call"):
            y.sum().backward()


def test_compile_once_for_all_sizes(fast: FastEfficientVit):
    graphs = []

    def backend(module: torch.fx.GraphModule, inputs: list) -> object:
        graphs.append(module)
        return module

    compiled = torch.compile(fast, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for shape in ((2, 3, 64, 96), (3, 3, 224, 192), (5, 3, 33, 70)):
            assert compiled(images(*shape)).shape == (shape[0], 7)
    assert len(graphs) == 1
    calls = [node for node in graphs[0].graph.nodes if node.op == "call_function"]
    assert sum(node.target is OP for node in calls) == 1


def test_compile_slices(fast: FastEfficientVit):
    class Uses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.backbone = fast

        def forward(self, x: Tensor) -> list[Tensor]:
            last, maps = self.backbone.forward_intermediates(x)
            y = self.backbone.forward_features(x)
            return [last, *maps, y, self.backbone.forward_head(y), self.backbone(2 * x) + 1]

    module = Uses().eval()
    compiled = torch.compile(module, fullgraph=True, dynamic=True)
    with torch.no_grad():
        for shape in SHAPES:
            x = images(*shape)
            for a, b in zip(compiled(x), module(x), strict=True):
                assert_close(a, b, 1e-6)


def test_compiled_graphs_see_refolds(fast: FastEfficientVit):
    """They skip the check of the counter; the methods that change weights fold for them."""
    compiled = torch.compile(fast, fullgraph=True)
    x = images(1, 3, 64, 64)
    with torch.no_grad():
        before = compiled(x)
        fast.head.linear.bias.add_(1)
        assert torch.equal(compiled(x), before)
        fast.refold()
        assert_close(compiled(x), before + 1)
        fast.load_state_dict(randomize(create_model("m0", num_classes=7), seed=2).state_dict())
        assert torch.equal(compiled(x), fast(x)) and relative_error(compiled(x), before) > 0.1
        before = compiled(x)
        fast.to(torch.bfloat16).float()
        assert torch.equal(compiled(x), fast(x)) and not torch.equal(compiled(x), before)
        before = compiled(x)
        fast.reset_classifier(7)
        assert torch.equal(compiled(x), fast(x)) and relative_error(compiled(x), before) > 1e-3
        before = compiled(x)
        fast.set_input_size(128)
        assert torch.equal(compiled(x), fast(x)) and not torch.equal(compiled(x), before)
        before = compiled(x)
    fast.train()
    fast(images(4, 3, 64, 64))
    fast.eval()
    with torch.no_grad():
        assert torch.equal(compiled(x), fast(x)) and relative_error(compiled(x), before) > 1e-3


def test_compiled_training_is_eager():
    small = Config("small", (64, 64), (1, 1), (4, 2), (5, 3, 3, 1))
    twin = randomize(EfficientVit(small, num_classes=7), seed=1)
    fast = evit_fast.accelerate(twin)
    x = images(4, 3, 64, 64)
    losses = []
    for m in (fast, twin):
        m.train()
        run = torch.compile(m, fullgraph=True, backend="aot_eager") if m is fast else m
        loss = run(x).square().mean()
        loss.backward()
        losses.append(loss.detach())
    assert_close(*losses, 1e-5)
    assert_close(fast.head.linear.weight.grad, twin.head.linear.weight.grad, 1e-4)
    fast.eval()
    assert_close(fast(x), twin.double().eval()(x.double()), 1e-4)


def test_compile_program(program: nn.Module):
    compiled = torch.compile(program, fullgraph=True, dynamic=True)
    for shape in SHAPES:
        x = images(*shape)
        assert torch.equal(compiled(x), program(x))


def test_bad_input_is_named_when_compiling(fast: FastEfficientVit):
    compiled = torch.compile(fast, fullgraph=True)
    with pytest.raises(Exception, match=r"expected x of shape \[B, 3, H, W\]"):
        compiled(images(1, 4, 64, 64))


# ------------------------------------------------------------------ torch.export


def free() -> dict[int, torch.export.Dim]:
    Dim = torch.export.Dim
    return {
        0: Dim("B", min=1, max=512),
        2: Dim("H", min=16, max=2048),
        3: Dim("W", min=16, max=2048),
    }


@pytest.mark.parametrize("strict", [False, True], ids=["traced", "strict"])
@pytest.mark.parametrize("kind", ["model", "program"])
def test_export(kind: str, strict: bool, fast: FastEfficientVit, program: nn.Module, tmp_path):
    module = fast if kind == "model" else program
    sizes = (free(),)
    exported = torch.export.export(
        module, (images(2, 3, 64, 96),), dynamic_shapes=sizes, strict=strict
    )
    nodes = [n for n in exported.graph.nodes if n.op == "call_function"]
    assert [n.target for n in nodes] == [OP] and len(nodes[0].args) == 3
    torch.export.save(exported, tmp_path / "m.pt2")
    for form in (exported.module(), torch.export.load(tmp_path / "m.pt2").module()):
        for shape in SHAPES:
            x = images(*shape)
            assert torch.equal(form(x), module(x))


def test_export_decomposes(fast: FastEfficientVit):
    """The op survives the passes of a deployment: functional form, core ATen only."""
    exported = torch.export.export(fast, (images(2, 3, 64, 96),), dynamic_shapes=(free(),))
    exported = exported.run_decompositions()
    x = images(1, 3, 224, 224)
    assert torch.equal(exported.module()(x), fast(x))


def test_who_observes_sees_the_op():
    """The way past the dispatcher is for when nobody looks: profilers, modes and traces see it."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(str(func))
            return func(*args, **(kwargs or {}))

    fast = evit_fast.accelerate(randomize(evit_fast.create_model("m0", num_classes=10), 0))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = fast(x)
        with torch.profiler.profile() as profile:
            assert torch.equal(fast(x), plain)
        assert any(e.key == "evit_fast::forward" for e in profile.key_averages())
        names: list[str] = []
        with Seen():
            assert torch.equal(fast(x), plain)
        assert any("evit_fast.forward" in name for name in names)
        traced = torch.jit.trace(fast, x, check_trace=False)
        assert "evit_fast::forward" in str(traced.inlined_graph)
