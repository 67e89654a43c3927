"""The CUDA column over a driver that is not there: from a model's weights through the walker, the
cubin cache and the native launcher to kernels that the emulator runs (fake_driver.py).
"""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch

import evit_fast
from evit_fast import _native, columns, cubins, gpu, preferred, tuned, walker
from evit_fast import program as programs
from evit_fast.cuda import column, modules
from evit_fast.cuda.kernels import Kernel
from evit_fast.cuda.sources import headers, texts, unit
from evit_fast.ops import OPS
from tests.close import assert_close
from tests.fake_driver import Card, card
from tests.fake_gpu import FakeStream, clear_choices, world
from tests.test_walker import X, exact, images, model

__all__ = ["card", "world"]  # fixtures

TOLERANCE = {torch.float16: 3e-3, torch.bfloat16: 2e-2}
BOTH = 6e-3  # between two columns, each of which may be 3e-3 off


def block(dtype: torch.dtype = torch.float16) -> tuple[str, torch.Tensor]:
    """The first block of the small model: dw_ffn, cga, dw_ffn."""
    fast = evit_fast.accelerate(model(), dtype=dtype, backend="reference")
    return programs.slice_(fast._folded.program, 1, 4), fast._folded.blob


def tokens(B: int = 2, H: int = 4, W: int = 3, seed: int = 1) -> torch.Tensor:
    return images(B, H, W, 64, seed=seed) / 4  # larger ones make the softmax a switch


def forward(x: torch.Tensor, program: str, blob: torch.Tensor, **settings) -> torch.Tensor:
    return columns.forward(x, program, blob, None, *columns.Settings(**settings))


# ------------------------------------------------------------------ right


@pytest.mark.parametrize(
    ("arch", "dtype"),
    [(70, torch.float16), (80, torch.bfloat16)],
    ids=["sm_70-f16", "sm_80-bf16"],
)
def test_a_whole_model(arch: int, dtype: torch.dtype, card: Card):
    card.place = gpu.Place("cuda", arch, "triton is not installed")
    m = model()
    fast = evit_fast.accelerate(m, dtype=dtype)
    assert not card.compiler.compiled, "compiled at the first call, not before"
    want = exact(m, X)
    for _ in range(3):
        assert_close(fast(X), want, 2 * TOLERANCE[dtype])
    assert card.runtime.captures == (1 if _all_native(fast) else 0)
    rows = evit_fast.explain(fast)
    here = {op for op in OPS if not _kernel_is_missing(op)}
    assert {row.op.split()[0] for row in rows if row.column == "cuda"} == here
    assert {kernel.rsplit("_", 1)[0] for kernel in card.driver.kernels} == here


def _all_native(fast: evit_fast.FastEfficientVit) -> bool:
    return {row.column for row in evit_fast.explain(fast)} == {"cuda"}


def test_pixels_and_strides(card: Card):
    """Inputs of one shape that differ in dtype or strides, in turns."""
    m = model()
    fast = evit_fast.accelerate(m, dtype=torch.float16, graphs=False)
    reference = evit_fast.accelerate(m, dtype=torch.float16, backend="reference")
    pixels = (40 * X + 128).clamp(0, 255).byte()
    big = torch.zeros(2, 6, 64, 96)
    big[:, ::2, :, 1::2] = X
    forms = (X, X.contiguous(memory_format=torch.channels_last), big[:, ::2, :, 1::2], pixels)
    for form in (*forms, *forms):
        assert_close(fast(form), reference(form), BOTH)


def test_a_launch_points_at_nothing_but_weights_and_maps(card: Card, monkeypatch):
    """What a plan makes for itself would be gone at the next run."""
    seen = []
    assemble = column.assemble
    monkeypatch.setattr(column, "assemble", lambda *a: seen.append((a[0], a[1:4])) or assemble(*a))
    fast = evit_fast.accelerate(model(), dtype=torch.float16, graphs=False)
    fast(X)
    weights = list(walker._tensors(list(walker._uploads[fast._folded.blob]._weights.values())))
    for launches, maps in seen:
        known = {t.untyped_storage().data_ptr() for t in (*weights, *maps)}
        tensors = [t for one in launches for t in one.words if isinstance(t, torch.Tensor)]
        assert tensors and all(t.untyped_storage().data_ptr() in known for t in tensors)


def _kernel_is_missing(op: str) -> bool:
    try:
        walker.cuda_kernel(op, 70)
    except ModuleNotFoundError:
        return True
    return False


def test_a_row_of_ops_is_one_native_call(card: Card, monkeypatch):
    program, blob = block()
    calls = []
    assemble = column.assemble
    monkeypatch.setattr(column, "assemble", lambda *a: calls.append(1) or assemble(*a))
    x = tokens()
    want = forward(x, program, blob, backend="reference")
    for _ in range(3):
        assert_close(forward(x, program, blob, graphs=False), want, BOTH)
    assert len(calls) == 1, "prepared once"
    assert len(card.driver.kernels) == 3 * len(set_of_one(card.driver.kernels, 3))


def set_of_one(kernels: list[str], times: int) -> list[str]:
    """The launches of one forward of `times` equal ones."""
    one = kernels[: len(kernels) // times]
    assert kernels == one * times
    return one


def test_outputs_and_inputs_lie_where_they_will(card: Card):
    """Prepared once, right at any address, in any of the input's dtypes, from any thread."""
    program, blob = block()
    kept = []
    for seed in range(3):
        for dtype in (torch.float32, torch.float16):
            x = tokens(seed=seed).to(dtype)
            y = forward(x, program, blob, graphs=False)
            assert y.dtype == dtype
            assert_close(y, forward(x, program, blob, backend="reference"), BOTH)
            kept.append((x, y))  # so that the next ones lie elsewhere


def test_deterministic_gives_the_same_bits_alone_and_in_a_batch(card: Card):
    program, blob = block()
    x = tokens(3)
    one = [forward(t[None], program, blob, graphs=False, deterministic=True) for t in x]
    y = forward(x, program, blob, graphs=False, deterministic=True)
    assert torch.equal(torch.cat(one), y)


# ------------------------------------------------------------------ compiling


def test_another_size_compiles_nothing(card: Card):
    program, blob = block()
    forward(tokens(), program, blob, graphs=False)
    compiled = len(card.compiler.compiled)
    assert compiled and len(set(card.compiler.compiled)) < compiled, "few and many tokens"
    for B, H, W in ((1, 7, 5), (3, 14, 14), (2, 33, 20)):
        x = tokens(B, H, W)
        want = forward(x, program, blob, backend="reference")
        assert_close(forward(x, program, blob, graphs=False), want, BOTH)
    assert len(card.compiler.compiled) == compiled


def test_another_process_compiles_nothing(card: Card):
    program, blob = block()
    y = forward(tokens(), program, blob, graphs=False)
    compiled = len(card.compiler.compiled)
    modules.forget()
    walker.empty_cache()
    assert torch.equal(forward(tokens(), program, blob, graphs=False), y)
    assert len(card.compiler.compiled) == compiled
    assert len(list(cubins.default().folder.glob("*.cubin"))) == compiled


def test_a_filled_cache_needs_no_nvrtc(card: Card, monkeypatch):
    program, blob = block()
    forward(tokens(), program, blob, graphs=False)

    def none(arch: object = None) -> None:
        raise RuntimeError("nvrtc: no NVRTC was found: pip install it")

    monkeypatch.setattr(cubins.nvrtc, "find", none)
    modules.forget()
    clear_choices()
    walker.empty_cache()
    forward(tokens(), program, blob, graphs=False, backend="cuda")
    monkeypatch.setenv("EVIT_FAST_CACHE", os.environ["EVIT_FAST_CACHE"] + "-empty")
    modules.forget()
    clear_choices()
    row = evit_fast.explain(evit_fast.accelerate(model(), dtype=torch.float16))[1]
    assert row.column == "reference" and "no NVRTC was found" in row.reason
    with pytest.raises(NotImplementedError, match="backend='cuda': nvrtc: no NVRTC was found"):
        forward(tokens(), program, blob, backend="cuda")


def test_an_edit_of_one_op_leaves_the_others_entries_alone():
    ffn = unit(Kernel("dw_ffn", "ffn", (64, 128, 64, 4, 1, 1, 1), torch.float16, 70), 70)
    assert {"dw_ffn.cuh", "tile_sm70.cuh", "types.cuh"} <= set(ffn.headers), "types: through others"
    assert not {"cga.cuh", "tile_sm80.cuh"} & set(ffn.headers)
    assert headers('#include "no.such"\n') == {}


# ------------------------------------------------------------------ the launcher


def test_every_launch_function_is_in_the_table():
    import re

    found = re.findall(
        r"LaunchShape\s+(\w+)_launch\([^)]*?, int( family)?, i64", "\n".join(texts().values())
    )
    assert sorted(name for name, _ in found) == sorted(_native.cuda_kernels()) and len(found) >= 4


def test_the_embedded_sources_are_the_files():
    root = Path(__file__).parents[1] / "csrc/cuda"
    assert texts() == {path.name: path.read_text() for path in root.glob("*.cuh")}


def test_launch_shape():
    ffn = (64, 128, 64, 4, 1, 1, 1)
    shape = _native.cuda_launch_shape("dw_ffn_ffn", ffn, 70, 2, 7, 7)
    assert (shape["blocks_x"], shape["blocks_y"], shape["threads"]) == (2, 1, 128)
    assert shape["shared_bytes"] == 64 * 72 * 2 * 3
    with pytest.raises(RuntimeError, match="knows no kernel nothing"):
        _native.cuda_launch_shape("nothing", ffn, 70, 2, 7, 7)
    with pytest.raises(RuntimeError, match="has 7 sizes, got 8"):
        _native.cuda_launch_shape("dw_ffn_ffn", (*ffn, 1), 70, 2, 7, 7)


def test_launches_go_to_the_current_stream(card: Card):
    program, blob = block()
    stream = FakeStream(card.runtime)
    with card.runtime.on(stream):
        forward(tokens(), program, blob, graphs=False)
    assert {words[-1] for words in card.driver.launches} == {str(id(stream))}


def test_shared_memory_above_48_kib_is_asked_for(card: Card):
    program = "dw_ffn C=384 F=768 dtype=float16 at=0"
    blob = torch.zeros(_native.op_bytes(program), dtype=torch.uint8)
    x = torch.zeros(64, 5, 4, 384)
    y = forward(x, program, blob, graphs=False, deterministic=True)
    assert torch.equal(y, x.to(y.dtype) * 0)
    assert max(int(words[4]) for words in card.driver.launches) < 48 * 1024
    assert card.driver.calls("cuFuncSetAttribute") == 0
    function = modules.function(
        Kernel("dw_ffn", "ffn", (384, 768, 32, 8, 1, 0, 0), torch.float16, 70), 70, 0
    )
    launches = _native.CudaLaunches(modules.context(0))
    sizes = (384, 768, 64, 8, 1, 0, 0)  # of another kernel: only its shared memory matters here
    launches.add(function, "dw_ffn_ffn", sizes, 70, [0], [0], 1, 1, 1)
    launches.add(function, "dw_ffn_ffn", sizes, 70, [0], [0], 1, 1, 1)
    assert card.driver.calls("cuFuncSetAttribute") == 1


@pytest.mark.parametrize(
    ("entry", "status", "says"),
    [
        (
            "cuLaunchKernel",
            700,
            r"the launch of dw_ffn_ffn \(\d x \d blocks of .*an illegal memory access.*700",
        ),
        ("cuModuleLoadData", 209, "loading dw_ffn_ffn failed"),
        ("cuModuleGetFunction", 500, "finding dw_ffn_ffn failed"),
        ("cuDevicePrimaryCtxRetain", 2, "making a context on device 0 failed"),
        ("cuInit", 100, "starting the NVIDIA driver failed"),
        ("cuCtxPushCurrent_v2", 201, "entering a context failed"),
    ],
)
def test_a_failure_is_one_sentence(entry: str, status: int, says: str, card: Card):
    program, blob = block()
    want = forward(tokens(), program, blob, graphs=False)
    modules.forget()
    walker.empty_cache()
    card.driver.fail(entry, status)
    with pytest.raises(RuntimeError, match=f"^cuda: .*{says}") as e:
        forward(tokens(), program, blob, graphs=False)
    assert "\n" not in str(e.value)
    assert torch.equal(forward(tokens(), program, blob, graphs=False), want), "nothing is broken"


def test_too_many_blocks_are_one_sentence(card: Card):
    launches = _native.CudaLaunches(0)
    with pytest.raises(RuntimeError, match=r"would take \d+ x 1 blocks.*use a smaller batch"):
        launches.add(0, "dw_ffn_ffn", (64, 128, 16, 4, 1, 1, 1), 70, [], [], 2**31, 14, 14)
    with pytest.raises(RuntimeError, match="65 arguments"):
        launches.add(0, "dw_ffn_ffn", (64, 128, 16, 4, 1, 1, 1), 70, [0] * 65, [0] * 65, 1, 1, 1)
    with pytest.raises(RuntimeError, match="base 4"):
        launches.add(0, "dw_ffn_ffn", (64, 128, 16, 4, 1, 1, 1), 70, [0], [4], 1, 1, 1)
    assert len(launches) == 0


def test_a_driver_that_is_not_one(card: Card, tmp_path):
    with pytest.raises(RuntimeError, match=r"^cuda: no NVIDIA driver \(.*absent.so\)"):
        _native.cuda_driver(str(tmp_path / "absent.so"))
    libm = next(Path("/").glob("lib/*/libm.so.6"), None)
    if libm:
        with pytest.raises(RuntimeError, match=r"^cuda: the NVIDIA driver has no cuInit"):
            _native.cuda_driver(str(libm))
    assert _native.cuda_driver() == 12080, "the other one is still there"


# ------------------------------------------------------------------ graphs


def test_a_forward_is_captured(card: Card):
    program, blob = block()
    inputs = [tokens(seed=seed) for seed in range(4)]
    for x in inputs:
        y = forward(x, program, blob, graphs=True)
        assert_close(y, forward(x, program, blob, backend="reference"), BOTH)
    assert card.runtime.captures == 1
    assert len(card.driver.kernels) == 3 * len(set_of_one(card.driver.kernels, 3))


def test_a_capture_of_the_users_loads_nothing(card: Card):
    program, blob = block()
    x = tokens()
    forward(x, program, blob, graphs=False)
    modules._functions.clear()
    (walk,) = walker._uploads[blob]._walks.values()
    walk._prepared.clear()
    loads = card.driver.calls("cuModuleLoadData")
    card.runtime.foreign = True
    with pytest.raises(RuntimeError, match=r"captured .* but dw_ffn_ffn is not on the device yet"):
        forward(x, program, blob)
    assert card.driver.calls("cuModuleLoadData") == loads


# ------------------------------------------------------------------ which column


def test_columns_of_a_card(card: Card):
    line = "cga C=64 heads=4 dk=16 window=7 ks=5,5,5,5 dtype=float16 at=0"

    def chosen(arch: int, backend: str = "auto", missing: str = "") -> tuple[str, str]:
        return walker.columns(line, gpu.Place("cuda", arch, missing), backend)[0]

    assert chosen(70) == chosen(75) == ("cuda", "")
    assert chosen(90) == ("triton", "")
    assert chosen(90, "cuda") == ("cuda", "")
    assert chosen(90, missing="triton is not installed") == ("cuda", "triton is not installed")
    assert chosen(70, "triton") == ("reference", "triton: sm_70 is too old")
    card.kernels["cga"].refuses = "triton: too wide"
    assert chosen(90, missing="") == chosen(90)
    clear_choices()
    assert chosen(90) == ("cuda", "triton: too wide")


def test_explain_says_that_nobody_compared(card: Card):
    card.place = gpu.Place("cuda", 90)
    fast = evit_fast.accelerate(model(), dtype=torch.float16, strict=True)
    rows = {row.op.split()[0]: row for row in evit_fast.explain(fast)}
    assert rows["cga"].column == "triton"
    assert rows["cga"].reason == "cuda and triton were not compared on sm_90: evit-fast tune does"


def test_a_measured_row_decides(card: Card, monkeypatch, tmp_path):
    op = programs.parse("cga C=64 heads=4 dk=16 window=7 ks=5,5,5,5 dtype=float16 at=64")[0]
    name = "cga C=64 heads=4 dk=16 window=7 ks=5,5,5,5 dtype=float16"
    assert preferred.sizes(op) == name
    monkeypatch.setattr(preferred, "MEASURED", {86: {name: "cuda"}})
    assert preferred.column(op, 80) == "triton"
    assert preferred.column(op, 86) == preferred.column(op, 90) == "cuda"
    assert preferred.note(op, 86) == "" and preferred.note(op, 90) == "sm_86 chose for sm_90"
    monkeypatch.delenv("EVIT_FAST_TUNED")
    tuned._found.cache_clear()
    for ns, want in (((5, 6), "cuda"), ((6, 5), "triton")):
        row = {"tiles": {}, "cuda_ns": ns[0], "triton_ns": ns[1]}
        tuned.remember({("cuda", "cga", 90, name): row})
        assert preferred.column(op, 90) == want and preferred.note(op, 90) == ""
    tuned._found.cache_clear()


def test_explain_names_the_kernels(card: Card):
    fast = evit_fast.accelerate(model(), dtype=torch.float16)
    row = evit_fast.explain(fast)[1]
    assert row.op.startswith("dw_ffn ") and row.column == "cuda"
    assert row.kernel.startswith("csrc/cuda/dw_ffn.cuh: dw_ffn_ffn")
    assert (row.isa, row.dtype, row.reason) == ("sm_70", "float16", "")


def test_bfloat16_needs_sm_80(card: Card):
    fast = evit_fast.accelerate(model(), dtype=torch.bfloat16)
    row = evit_fast.explain(fast)[1]
    assert row.column == "reference" and "bfloat16 needs sm_80" in row.reason
    program, blob = block(torch.bfloat16)
    with pytest.raises(NotImplementedError, match="backend='cuda': cuda: bfloat16 needs sm_80"):
        forward(tokens(), program, blob, backend="cuda")


def test_both_columns_over_one_blob(card: Card):
    card.place = gpu.Place("cuda", 90)
    program, blob = block()
    x = tokens()
    want = forward(x, program, blob, backend="reference")
    for backend in ("cuda", "triton", "cuda"):
        before = len(card.driver.kernels)
        assert_close(forward(x, program, blob, backend=backend, graphs=False), want, BOTH)
        assert (len(card.driver.kernels) > before) == (backend == "cuda")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_child_loads_its_own(card: Card):
    program, blob = block()
    want = forward(tokens(), program, blob, graphs=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        child = os.fork()
    if child == 0:
        code = 1
        try:
            known = len(modules._functions) + len(modules._contexts)
            same = torch.equal(forward(tokens(), program, blob, graphs=False), want)
            code = 0 if known == 0 and same and modules._functions else 1
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
