"""The walk of a program on a GPU, and its graphs, over a GPU that is not there (fake_gpu.py)."""

from __future__ import annotations

import copy
import os
import pickle
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

import evit_fast
from evit_fast import columns, gpu, graphs, walk, walker
from evit_fast import program as programs
from evit_fast.config import Config
from evit_fast.fast import FastEfficientVit
from evit_fast.model import EfficientVit
from tests.close import assert_close
from tests.fake_gpu import NAN, FakeStream, World, world
from tests.randomize import randomize

__all__ = ["world"]  # a fixture

SMALL = Config("small", (64, 64, 64), (1, 1, 1), (4, 2, 4), (5, 3, 3, 1))


def model(seed: int = 1) -> EfficientVit:
    return randomize(EfficientVit(SMALL, num_classes=5), seed=seed).eval()


def images(*shape: int, seed: int = 5) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def exact(m: torch.nn.Module, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(m).double().eval()(x.double())


X = images(2, 3, 64, 48)
OPS_OF_SMALL = 1 + 3 * 3 + 2 * 3 + 1


def table(fast: FastEfficientVit) -> graphs.Table:
    return walker._uploads[fast._folded.blob].graphs


# ------------------------------------------------------------------ a forward


def test_logits_at_every_call(world: World):
    m = model()
    fast = evit_fast.accelerate(m)
    want = exact(m, X)
    assert world.prepared == OPS_OF_SMALL and not world.launched, "uploaded when folded"
    counts = []
    for _ in range(4):
        assert_close(fast(X), want)
        counts.append((world.launched, world.runtime.captures))
    one = OPS_OF_SMALL
    assert counts == [(one, 0), (3 * one, 1), (3 * one, 1), (3 * one, 1)]
    assert world.prepared == OPS_OF_SMALL
    assert sum(entry[0] == "replay" for entry in world.runtime.log) == 3


@pytest.mark.parametrize("graphed", [False, True], ids=["raw", "graph"])
def test_outputs_are_the_callers(graphed: bool, world: World):
    m = model()
    fast = evit_fast.accelerate(m, graphs=graphed)
    inputs = [images(2, 3, 64, 48, seed=i) for i in range(4)]
    outputs = [fast(x) for x in inputs]
    for x, y in zip(inputs, outputs, strict=True):
        assert_close(y, exact(m, x))
    outputs[-1].fill_(NAN)
    assert_close(fast(inputs[0]), exact(m, inputs[0]))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.uint8])
def test_input_dtypes(dtype: torch.dtype, world: World):
    m = model()
    fast = evit_fast.accelerate(m)
    is_pixels = dtype == torch.uint8
    x = (40 * X + 128).clamp(0, 255).to(dtype) if is_pixels else X.to(dtype)
    want = evit_fast.accelerate(m, backend="reference")(x)
    for _ in range(3):
        y = fast(x)
        assert y.dtype == (torch.float32 if is_pixels else dtype)
        assert_close(y, want, {torch.float16: 3e-3, torch.bfloat16: 2e-2}.get(dtype, 1e-5))
        maps = fast.forward_intermediates(x)[1]
        assert {t.dtype for t in maps} == {y.dtype}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_maps_between_ops_have_the_dtype_of_the_op(dtype: torch.dtype, world: World):
    fast = evit_fast.accelerate(model(), dtype=dtype, graphs=False)
    assert fast(X).dtype == torch.float32
    stem, head = (world.kernels[name].launches[0] for name in ("stem", "classifier"))
    assert (stem.x.dtype, stem.y.dtype) == (torch.float32, dtype)
    assert (head.x.dtype, head.y.dtype) == (dtype, torch.float32)


def test_strides(world: World):
    m = model()
    fast = evit_fast.accelerate(m)
    want = exact(m, X)
    big = torch.full((4, 6, 128, 96), NAN)
    big[::2, 1::2, 1::2, ::2] = X
    forms = (
        X.contiguous(memory_format=torch.channels_last),
        big[::2, 1::2, 1::2, ::2],
        X.mT.contiguous().mT,
        torch._neg_view(-X),
    )
    for form in (*forms, *forms):
        assert_close(fast(form), want)
    assert world.runtime.captures == 1, "one graph for all strides"
    one = X[:1, :1, :1, :1].expand(2, 3, 64, 48)
    assert_close(fast(one), exact(m, one.contiguous()))
    x = images(1, 3, 128, 96)
    features, want = exact_features(m, x), exact(m, x)
    for y in (fast.forward_features(x), fast.forward_features(x)):
        assert_close(y, features)
        assert not y.contiguous().permute(0, 2, 3, 1).is_contiguous()
        assert_close(fast.forward_head(y.contiguous()), want)


def exact_features(m: EfficientVit, x: Tensor) -> Tensor:
    with torch.no_grad():
        return copy.deepcopy(m).double().forward_features(x.double())


def test_negated_views_on_a_cpu():
    fast = evit_fast.accelerate(model())
    with torch.no_grad():
        assert torch.equal(fast(torch._neg_view(-X)), fast(X))


def test_workspace(world: World):
    """Maps and scratch lie in one block, aligned, no larger than it must be."""
    fast = evit_fast.accelerate(model(), graphs=False)
    fast(X)
    launches = [entry for k in world.kernels.values() for entry in k.launches]
    result = world.kernels["classifier"].launches[0].y
    inside = [t for e in launches for t in (e.y, e.space) if t is not None and t is not result]
    assert len({t.untyped_storage().data_ptr() for t in inside}) == 1
    starts = [t.storage_offset() * t.element_size() for t in inside]
    assert all(start % walk.ALIGNMENT == 0 for start in starts)
    used = max(at + t.numel() * t.element_size() for at, t in zip(starts, inside, strict=True))
    assert used <= inside[0].untyped_storage().nbytes() <= used + walk.ALIGNMENT
    largest = max(e.y.numel() * e.y.element_size() for e in launches)
    assert used <= 2 * largest + 2 * 1024


def test_empty_batch(world: World):
    fast = evit_fast.accelerate(model(), graphs=True)
    for _ in range(3):
        assert fast(X[:0]).shape == (0, 5)
        assert fast.forward_features(X[:0]).shape == (0, 64, 1, 1)
    assert not world.launched and not world.runtime.captures


def test_modes_of_the_caller(world: World):
    """What is kept is made outside of them."""
    m = model()
    want = exact(m, X)
    with torch.inference_mode():
        fast = evit_fast.accelerate(m)
        for _ in range(3):
            assert fast(X).is_inference()
    with torch.device("meta"), torch.autocast("cpu", torch.bfloat16):
        for _ in range(3):
            assert_close(fast(X), want)
    with torch.enable_grad():
        fast.requires_grad_(False)
        assert fast(X).grad_fn is None
        y = fast(X.clone().requires_grad_())
        assert_close(y.detach(), want)
        with pytest.raises(RuntimeError, match="no backward"):
            y.sum().backward()
    assert_close(fast(X), want)


def test_compiled_and_checked(world: World):
    m = model()
    fast = evit_fast.accelerate(m)
    folded = fast._folded
    op = torch.ops.evit_fast.forward.default
    torch.library.opcheck(op, (X, folded.program, folded.blob))
    torch.library.opcheck(op, (X, folded.program, folded.blob, None, "triton", 0, True, True))
    compiled = torch.compile(fast, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        assert_close(compiled(X), exact(m, X))
    torch._dynamo.reset()


# ------------------------------------------------------------------ when there is a graph


@pytest.mark.parametrize(
    ("wanted", "batch", "captured"),
    [(None, 64, 1), (None, 65, 0), (True, 65, 1), (False, 1, 0)],
)
def test_default(wanted: bool | None, batch: int, captured: int, world: World):
    fast = evit_fast.accelerate(model(), graphs=wanted)
    x = images(batch, 3, 16, 16)
    for _ in range(3):
        fast(x)
    assert world.runtime.captures == captured


def test_a_graph_for_every_kind_of_call(world: World):
    m = model()
    fast = evit_fast.accelerate(m)
    folded = fast._folded
    kinds = [X, X[:1], X[:, :, :32], X[:, :, :, :32], X.half()]
    for _ in range(3):
        for x in kinds:
            assert_close(fast(x), exact(m, x), 1e-2 if x.dtype == torch.float16 else 1e-5)
        fast.forward_features(X)
        columns.forward(X, folded.program, folded.blob, None, "auto", 0, None, True)
    assert world.runtime.captures == len(kinds) + 2
    flags = [e.deterministic for e in world.kernels["stem"].launches]
    assert sum(flags) == 3, "the setting reaches the kernels"


def test_the_table_is_bounded(world: World):
    m = model()
    fast = evit_fast.accelerate(m)
    sizes = range(16, 16 + graphs.GRAPHS_KEPT + 3)
    for size in sizes:
        for _ in range(2):
            fast(X[:1, :, :size, :16])
    assert len(table(fast)) == graphs.GRAPHS_KEPT
    kept = weakref.ref(table(fast)._graphs[next(iter(table(fast)._graphs))]._space)
    before = world.runtime.captures
    fast(X[:1, :, : sizes[3], :16])  # the oldest that is left, used again
    assert world.runtime.captures == before
    for _ in range(2):
        fast(X[:1, :, :16, :32])
    world.forget()
    assert kept() is not None, "the last used went first"
    for size in range(16, 16 + graphs.GRAPHS_KEPT):
        for _ in range(2):
            fast(X[:1, :, :size, :40])
    world.forget()
    assert kept() is None, "an evicted graph holds memory"


def test_more_sizes_than_graphs(world: World):
    """In turn, so that each is evicted before it comes again: few captures, not one in two."""
    fast = evit_fast.accelerate(model())
    rounds = 12
    sizes = range(16, 16 + graphs.GRAPHS_KEPT + 1)
    for _ in range(rounds):
        for size in sizes:
            fast(X[:1, :, :size, :16])
    assert len(sizes) <= world.runtime.captures <= 3 * len(sizes)


# ------------------------------------------------------------------ captured by the user


@contextmanager
def user_captures(world: World) -> Iterator[None]:
    world.runtime.foreign = True
    try:
        yield
    finally:
        world.runtime.foreign = False


def test_the_user_captures(world: World):
    m = model()
    fast = evit_fast.accelerate(m)
    with user_captures(world), pytest.raises(RuntimeError, match="before the capture") as caught:
        fast(X)
    assert "[2, 3, 64, 48]" in str(caught.value) and "\n" not in str(caught.value)
    for _ in range(3):
        fast(X)
    replays = len([e for e in world.runtime.log if e[0] == "replay"])
    with user_captures(world):
        launched = world.launched
        assert_close(fast(X), exact(m, X))
        assert world.launched == launched + OPS_OF_SMALL, "not launched raw"
    assert len([e for e in world.runtime.log if e[0] == "replay"]) == replays


def test_the_user_captures_before_the_upload(world: World):
    m = model()
    fast = evit_fast.accelerate(m)
    fast(X)
    evit_fast.empty_cache()
    with user_captures(world), pytest.raises(RuntimeError, match="weights are not on the device"):
        fast(X)
    assert_close(fast(X), exact(m, X))


def test_weights_of_a_users_graph_live_on_with_the_blob(world: World):
    fast = evit_fast.accelerate(model())
    fast(X)
    upload = walker._uploads[fast._folded.blob]
    tensors = [weakref.ref(t) for t in walker._tensors(list(upload._weights.values()))]
    with user_captures(world):
        fast(X)
        fast(X)
    assert len(upload.pinned) == 1
    del upload
    evit_fast.empty_cache()
    fast(X)
    before = [t().clone() for t in tensors]
    fast._folded.blob.zero_()
    fast(X)
    world.forget()
    assert all(torch.equal(t(), want) for t, want in zip(tensors, before, strict=True))
    fast.refold()
    world.forget()
    assert not any(t() is not None for t in tensors)


# ------------------------------------------------------------------ never stale


def change_bias(fast: FastEfficientVit) -> None:
    fast.head.linear.bias.add_(1)


def load_others(fast: FastEfficientVit) -> None:
    fast.load_state_dict(model(2).state_dict())


def move(fast: FastEfficientVit) -> None:
    fast.bfloat16().float()


@pytest.mark.parametrize("change", [change_bias, load_others, move, FastEfficientVit.refold])
def test_refolding_drops_graphs_and_weights(change: Callable, world: World):
    m = model()
    fast = evit_fast.accelerate(m)
    for _ in range(3):
        fast(X)
    graph = next(iter(table(fast)._graphs.values()))
    gone = [weakref.ref(graph._space), weakref.ref(graph), weakref.ref(fast._folded.blob)]
    del graph
    change(fast)
    twin = model()
    twin.load_state_dict(fast.state_dict())
    for _ in range(3):
        assert_close(fast(X), exact(twin, X))
    world.forget()
    assert [ref() for ref in gone] == [None] * 3, "memory of the old weights is held"


def test_writing_to_the_blob(world: World, tmp_path):
    m, other = model(), model(2)
    for name, source in (("a", m), ("b", other)):
        evit_fast.save(evit_fast.accelerate(source, backend="reference"), tmp_path / name)
    program = evit_fast.load(tmp_path / "a")
    for _ in range(3):
        assert_close(program(X), exact(m, X))
    program.blob.copy_(evit_fast.load(tmp_path / "b").blob)
    for _ in range(3):
        assert_close(program(X), exact(other, X))
    assert len(walker._uploads[program.blob].graphs) == 1
    with torch.inference_mode():
        blob = program.blob.clone()
        for source in (other, m):  # writes that nobody counts
            for _ in range(3):
                y = columns.forward(X, program.program, blob)
                assert_close(y, exact(source, X))
            blob.copy_(evit_fast.load(tmp_path / "a").blob)


def test_copies(world: World, tmp_path):
    m = model()
    fast = evit_fast.accelerate(m)
    evit_fast.save(fast, tmp_path / "m.evit")
    program = evit_fast.load(tmp_path / "m.evit", graphs=True, deterministic=True)
    assert program.options.graphs is True and program.options.deterministic is True
    want = exact(m, X)
    for made in (fast, program):
        for _ in range(3):
            made(X)
        for twin in (copy.deepcopy(made), pickle.loads(pickle.dumps(made))):
            for _ in range(3):
                assert_close(twin(X), want)
    assert world.kernels["stem"].launches[-1].deterministic


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork(world: World):
    m = model()
    fast = evit_fast.accelerate(m)
    want = exact(m, X)
    for _ in range(3):
        fast(X)
    # As if another thread were inside: a child must not wait for it.
    upload = walker._uploads[fast._folded.blob]
    held = [walker._lock, graphs._capturing, upload._lock, upload.graphs.lock]
    held.append(next(iter(upload.graphs._graphs.values()))._lock)
    inside, done = threading.Event(), threading.Event()

    def hold() -> None:
        for lock in held:
            lock.acquire()
        inside.set()
        done.wait(60)
        for lock in held:
            lock.release()

    thread = threading.Thread(target=hold)
    thread.start()
    inside.wait(60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            threading.Timer(60, lambda: os._exit(2)).start()
            for _ in range(3):
                assert torch.equal(fast(X), fast(X))
            assert_close(fast(X), want)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(child, 0)[1]
    done.set()
    thread.join()
    assert os.waitstatus_to_exitcode(status) == 0
    assert_close(fast(X), want)


def test_uploaded_once(world: World):
    """Slices share the weights, and nobody else holds a copy of them."""
    fast = evit_fast.accelerate(model())
    for _ in range(2):
        fast.forward_intermediates(X)
        fast.forward_head(fast.forward_features(X))
        fast(X)
    assert world.prepared == OPS_OF_SMALL
    assert fast._folded.blob not in programs._unpacked
    assert len(walker._uploads[fast._folded.blob]._walks) == 1 + 1 + 3 + 1
    evit_fast.empty_cache()
    upload = walker._uploads[fast._folded.blob]
    assert not upload._weights and not upload._walks and not len(upload.graphs)


# ------------------------------------------------------------------ threads and streams


def test_streams(world: World):
    m = model()
    fast = evit_fast.accelerate(m)
    runtime = world.runtime
    other = FakeStream(runtime)
    with runtime.on(other):
        fast.refold()
    uploaded = runtime.log[runtime.log.index(("prepare", other)) :]
    assert uploaded == [*[("prepare", other)] * OPS_OF_SMALL, ("synchronize", other)]
    for _ in range(2):
        fast(X)
    graph = next(iter(table(fast)._graphs.values()))
    runtime.log.clear()
    for stream in (runtime.main, other, other, runtime.main):
        with runtime.on(stream):
            assert_close(fast(X), exact(m, X))
    main = runtime.main
    assert runtime.log == [
        ("replay", main), ("record", main),
        ("wait", other, main), ("replay", other), ("record", other),
        ("replay", other), ("record", other),
        ("wait", main, other), ("replay", main), ("record", main),
    ]  # fmt: skip
    weights = list(walker._tensors(list(walker._uploads[fast._folded.blob]._weights.values())))
    for tensor in (graph._x, graph._y, graph._space, *weights):
        for stream in (main, other):
            assert (tensor.data_ptr(), stream) in runtime.kept


def test_threads(world: World):
    """Many callers of one model, each with inputs of its own, in streams of their own."""
    m = model()
    fast = evit_fast.accelerate(m)
    inputs = [images(1 + i % 2, 3, 32, 32, seed=i) for i in range(8)]
    wants = [exact(m, x) for x in inputs]
    errors: list[BaseException] = []
    start = threading.Barrier(4)

    def work(first: int) -> None:
        try:
            start.wait(60)
            with torch.no_grad(), world.runtime.on(FakeStream(world.runtime)):
                for i in range(16):
                    at = (first + i) % len(inputs)
                    assert_close(fast(inputs[at]), wants[at])
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work, args=(2 * i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not errors, errors[0]
    assert world.runtime.captures == 2 and world.prepared == OPS_OF_SMALL


def test_the_cache_is_emptied_while_others_run(world: World):
    m = model()
    fast = evit_fast.accelerate(m)
    want = exact(m, X[:1, :, :16, :16])
    stop, errors = threading.Event(), []

    def work() -> None:
        try:
            with torch.no_grad():
                while not stop.is_set():
                    assert_close(fast(X[:1, :, :16, :16]), want)
        except BaseException as e:
            errors.append(e)

    threads = [threading.Thread(target=work) for _ in range(2)]
    for t in threads:
        t.start()
    for _ in range(20):
        evit_fast.empty_cache()
        change_nothing(fast)
    stop.set()
    for t in threads:
        t.join()
    assert not errors, errors[0]


def change_nothing(fast: FastEfficientVit) -> None:
    fast._folded.blob.add_(0)


# ------------------------------------------------------------------ what fails


def test_a_failed_capture_is_not_silent(world: World):
    m = model()
    fast = evit_fast.accelerate(m)
    must = evit_fast.accelerate(m, graphs=True)
    world.runtime.broken = "operation not permitted"
    fast(X)
    with pytest.warns(RuntimeWarning, match="no CUDA graph.*operation not permitted$"):
        assert_close(fast(X), exact(m, X))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert_close(fast(X), exact(m, X))
    assert world.runtime.captures == 1
    rows = evit_fast.explain(fast)
    assert all("operation not permitted" in row.reason for row in rows)
    must(X)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"graphs=True.*not permitted.*graphs=False$"):
            must(X)
    world.runtime.broken = ""
    evit_fast.empty_cache()
    for _ in range(3):
        assert_close(fast(X), exact(m, X))
    assert not any(row.reason for row in evit_fast.explain(fast))


def test_an_op_without_a_kernel(world: World):
    world.kernels["cga"].refuses = "triton: heads of 1000 channels are too wide"
    m = model()
    fast = evit_fast.accelerate(m)
    for _ in range(3):
        assert_close(fast(X), exact(m, X))
    assert world.runtime.captures == 1 and not world.kernels["cga"].launches
    for row in evit_fast.explain(fast):
        is_cga = row.op.startswith("cga ")
        assert row.column == ("reference" if is_cga else "triton")
        refused = f"{world.kernels['cga'].refuses}; {world.without_cuda}"
        assert row.reason == (refused if is_cga else "")
    for name in ("strict", "deterministic"):
        with pytest.raises(NotImplementedError, match=rf"{name}=True.*too wide"):
            evit_fast.accelerate(m, **{name: True})
    with pytest.raises(NotImplementedError, match=r"backend='triton'.*too wide"):
        evit_fast.accelerate(m, backend="triton")


@pytest.mark.parametrize(
    ("place", "match"),
    [
        (gpu.Place("cuda", 70), "sm_70 is too old"),
        (gpu.Place("cuda", 90, "triton is not installed"), "not installed"),
        (gpu.Place("hip"), "no column for hip"),
        (gpu.Place("mps"), "no column for mps"),
    ],
    ids=["sm_70", "no-triton", "hip", "mps"],
)
def test_places_without_a_column(place: gpu.Place, match: str, world: World):
    world.place = place
    m = model()
    fast = evit_fast.accelerate(m)
    assert_close(fast(X), exact(m, X))
    assert not world.launched
    row = evit_fast.explain(fast)[0]
    assert row.column == "reference" and match in row.reason
    for kwargs, says in (
        ({"backend": "triton"}, match),
        ({"backend": "cpu"}, "backend='cpu'"),
        ({"strict": True}, match),
        ({"graphs": True}, "graphs=True"),
        ({"deterministic": True}, match),
    ):
        with pytest.raises(NotImplementedError, match=says) as caught:
            evit_fast.accelerate(m, **kwargs)
        assert "\n" not in str(caught.value)


def test_float64_has_no_kernels(world: World):
    m = model()
    fast = evit_fast.accelerate(m, dtype=torch.float64)
    assert_close(fast(X.double()), exact(m, X), 1e-12)
    assert "float64" in evit_fast.explain(fast)[0].reason


def test_explain(world: World):
    m = model()
    rows = evit_fast.explain(evit_fast.accelerate(m, dtype=torch.float16, strict=True))
    assert len(rows) == OPS_OF_SMALL
    for row in rows:
        name = row.op.split()[0]
        more = ", sum_kernel" if name in ("cga", "patch_merge") else ""
        assert row.kernel == f"kernels/{name}.py: {name}_kernel{more}"
        assert row.column == "triton"
        assert (row.isa, row.dtype, row.reason) == ("sm_90", "float16", "")
    world.place = gpu.Place("cuda", 86)
    assert evit_fast.explain(evit_fast.accelerate(m))[0].reason == "rows of sm_80 serve sm_86"


def test_a_device_that_is_not_there(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("it is there")
    m = model()
    evit_fast.save(evit_fast.accelerate(m), tmp_path / "m.evit")
    for call in (
        lambda: evit_fast.accelerate(m, device="cuda"),
        lambda: evit_fast.load(tmp_path / "m.evit", device="cuda:0"),
    ):
        with pytest.raises(RuntimeError, match=r"^device='cuda.*no CUDA device here: .*cpu'") as e:
            call()
        assert "\n" not in str(e.value)


@pytest.mark.skipif(gpu.interpreted(), reason="the interpreter is on")
def test_triton_on_a_cpu_needs_the_interpreter():
    with pytest.raises(NotImplementedError, match="TRITON_INTERPRET=1"):
        evit_fast.accelerate(model(), backend="triton")
