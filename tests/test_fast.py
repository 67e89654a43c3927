"""accelerate, FastEfficientVit, Program, save, load and explain: what a user holds."""

from __future__ import annotations

import copy
import dataclasses
import json
import pickle
import subprocess
import sys

import pytest
import torch
from torch import Tensor, nn

import evit_fast
from evit_fast import _native, columns
from evit_fast.config import VARIANTS
from evit_fast.fast import FastEfficientVit, FastEfficientVitFeatures
from evit_fast.images import Preprocessing, normalise
from evit_fast.model import EfficientVit, create_model
from tests import official, timm_peer
from tests.close import FLOOR, assert_close, budget, relative_error
from tests.randomize import randomize

BACKENDS = ("reference", "cpu")
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def ours(name: str = "efficientvit_m0", **kwargs: object) -> nn.Module:
    return randomize(create_model(name, **kwargs), seed=1).eval()


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(5))


def exact(model: nn.Module, x: Tensor) -> Tensor:
    """Eager in float64."""
    with torch.no_grad():
        return copy.deepcopy(model).double().eval()(x.double())


def snapshot(model: nn.Module) -> dict:
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "ids": {k: (id(v), v.data_ptr()) for k, v in model.state_dict(keep_vars=True).items()},
        "flags": [p.requires_grad for p in model.parameters()],
        "training": [m.training for m in model.modules()],
        "classes": [(type(m), type(m._parameters)) for m in model.modules()],
        "hooks": [list(m._forward_hooks) for m in model.modules()],
    }


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(v, b["state"][k]) for k, v in a["state"].items()) and all(
        a[k] == b[k] for k in a if k != "state"
    )


@pytest.fixture(scope="module")
def m0() -> EfficientVit:
    """Not to be changed."""
    return ours()


@pytest.fixture(scope="module")
def fast0(m0: EfficientVit) -> FastEfficientVit:
    """Not to be changed."""
    return evit_fast.accelerate(m0)


# ------------------------------------------------------------------ from any model


@pytest.mark.parametrize(
    ("name", "backend"),
    [*((name, "cpu") for name in VARIANTS), ("efficientvit_m0", "reference")],
)
def test_logits_equal_eager(name: str, backend: str):
    model = ours(name)
    fast = evit_fast.accelerate(model, backend=backend)
    x = images(2, 3, 160, 224)
    want = exact(model, x)
    with torch.no_grad():
        error = relative_error(model(x), want)
        assert_close(fast(x), want, budget(torch.float32, error))


@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientvit_m5"])
def test_timm_model(name: str):
    model = randomize(timm_peer.create(name, num_classes=7), seed=2)
    for i, p in enumerate(model.parameters()):
        p.requires_grad_(i % 3 > 0)
    model.stages[0].register_forward_hook(lambda *_: pytest.fail("a hook was copied"))
    before, x = snapshot(model), images(2, 3, 224, 224)
    rng = torch.get_rng_state()
    fast = evit_fast.accelerate(model)
    assert torch.equal(rng, torch.get_rng_state())
    assert same(before, snapshot(model)) and model.training and not fast.training
    assert fast.state_dict().keys() == model.state_dict().keys()
    assert [p.requires_grad for p in fast.parameters()] == before["flags"]
    assert fast.config.name == name and fast.num_classes == 7
    fast.get_classifier().weight.data.zero_()
    assert same(before, snapshot(model)), "the copy shares memory with the original"
    fast = evit_fast.accelerate(model)
    model.stages[0]._forward_hooks.clear()
    assert_close(fast(x), exact(model, x))


def test_timm_features_only():
    for indices in ((0, 1, 2), (0, 2), (1,)):
        kwargs = {"features_only": True, "out_indices": indices}
        model = randomize(timm_peer.create("efficientvit_m1", **kwargs)).eval()
        fast = evit_fast.accelerate(model)
        x = images(2, 3, 128, 160)
        assert isinstance(fast, FastEfficientVitFeatures)
        assert fast.state_dict().keys() == model.state_dict().keys()
        got, want = fast(x), exact(model, x)
        assert len(got) == len(want) == len(indices)
        for a, b in zip(got, want, strict=True):
            assert_close(a, b)
        fast.train()
        assert fast(x)[-1].requires_grad


@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientvit_m4"])
@pytest.mark.parametrize("distillation", [False, True], ids=["one-head", "two-heads"])
def test_official_model(name: str, distillation: bool):
    model = randomize(official.EfficientViT(VARIANTS[name], 11, distillation)).eval()
    before = snapshot(model)
    fast = evit_fast.accelerate(model)
    assert same(before, snapshot(model)), "the original changed"
    x = images(2, 3, 224, 224)
    assert fast.distillation is distillation and fast.config == VARIANTS[name]
    assert_close(fast(x), exact(model, x))


def test_our_model_keeps_its_settings():
    model = ours(distillation=True, in_chans=1, img_size=96, window=5, num_classes=3)
    for m in model.modules():
        if isinstance(m, nn.modules.batchnorm._BatchNorm):
            m.eps, m.momentum = 3e-2, 0.3
    model.stages[1].blocks[0].ffn0.drop = 0.25
    fast = evit_fast.accelerate(model)
    x = images(2, 1, 96, 96)
    assert_close(fast(x), exact(model, x))
    assert fast.config.window == 5 and fast.img_size == 96 and fast.in_chans == 1
    assert fast.stages[1].blocks[0].ffn0.drop == 0.25 and fast.head.bn.momentum == 0.3
    model.set_input_size(224)
    fast.set_input_size(224)
    x = images(1, 1, 224, 224)
    assert_close(fast(x), exact(model, x))


def test_wrapped_and_accelerated_models(m0: EfficientVit, fast0: FastEfficientVit):
    x = images(1, 3, 64, 64)
    for model in (nn.DataParallel(m0), torch.compile(m0), fast0):
        assert torch.equal(evit_fast.accelerate(model)(x), fast0(x))


def test_training_is_the_eager_model(m0: EfficientVit):
    fast = evit_fast.accelerate(m0).train()
    twin = copy.deepcopy(m0).train()
    x = images(4, 3, 64, 64)
    torch.manual_seed(1)
    a = fast(x)
    torch.manual_seed(1)
    b = twin(x)
    assert torch.equal(a, b)
    a.square().sum().backward()
    b.square().sum().backward()
    for p, q in zip(fast.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
    for p, q in zip(fast.buffers(), twin.buffers(), strict=True):
        assert torch.equal(p, q)
    assert_close(fast.eval()(x), exact(twin, x))


# ------------------------------------------------------------------ the other forwards


def test_slices(m0: EfficientVit, fast0: FastEfficientVit):
    x = images(2, 3, 192, 224)
    m = copy.deepcopy(m0).double()
    with torch.no_grad():
        want = m.forward_features(x.double())
        got = fast0.forward_features(x)
        assert got.shape == want.shape and got.permute(0, 2, 3, 1).is_contiguous()
        assert_close(got, want)
        assert_close(fast0.forward_head(got), m.forward_head(want))
        assert_close(fast0.forward_head(got.contiguous()), m.forward_head(want))
        assert_close(fast0.forward_head(got, pre_logits=True), m.forward_head(want, True))
        last, maps = fast0.forward_intermediates(x)
        want_last, want_maps = m.forward_intermediates(x.double())
        for a, b in zip([last, *maps], [want_last, *want_maps], strict=True):
            assert_close(a, b)
        for kwargs in (
            {"indices": 1},
            {"indices": [0], "stop_early": True},
            {"indices": [0, -1], "intermediates_only": True},
        ):
            got = fast0.forward_intermediates(x, **kwargs)
            want = m.forward_intermediates(x.double(), **kwargs)
            if isinstance(got, tuple):
                got, want = [got[0], *got[1]], [want[0], *want[1]]
            for a, b in zip(got, want, strict=True):
                assert_close(a, b)
    with pytest.raises(ValueError, match="NCHW"):
        fast0.forward_intermediates(x, output_fmt="NLC")
    with pytest.raises(ValueError, match=r"forward_head.*192"):
        fast0.forward_head(x)


def test_without_classes(m0: EfficientVit):
    x = images(2, 3, 64, 64)
    fast, m = evit_fast.accelerate(m0), copy.deepcopy(m0)
    for args in ((0,), (0, ""), (5, "avg")):
        torch.manual_seed(3)
        m.reset_classifier(*args)
        torch.manual_seed(3)
        fast.reset_classifier(*args)
        assert_close(fast(x), exact(m, x), what=str(args))
    fast.prune_intermediate_layers([1])
    m.prune_intermediate_layers([1])
    assert_close(fast(x), exact(m, x))


def test_our_features_only():
    model = ours("m2", features_only=True, out_indices=(0, 2))
    fast = evit_fast.accelerate(model)
    x = images(2, 3, 128, 96)
    for a, b in zip(fast(x), exact(model, x), strict=True):
        assert_close(a, b)
    assert fast.feature_info.channels() == model.feature_info.channels()
    short = ours("m2", features_only=True, out_indices=(1,))
    assert evit_fast.accelerate(short).config == short.config == VARIANTS["efficientvit_m2"]


# ------------------------------------------------------------------ input and output


def test_strides(fast0: FastEfficientVit):
    x = images(2, 3, 70, 90)
    want = fast0(x)
    big = images(4, 6, 140, 180)
    big[1::2, ::2, ::2, 1::2] = x
    forms = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "slice": big[1::2, ::2, ::2, 1::2],
        "transposed": x.mT.contiguous().mT,
        "offset": torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape),
    }
    for name, form in forms.items():
        assert torch.equal(form, x), name
        assert torch.equal(fast0(form), want), name
    one = x[:1, :1, :1, :1].expand(2, 3, 64, 64)
    assert torch.equal(fast0(one), fast0(one.contiguous()))
    assert torch.equal(fast0(torch._neg_view(-x)), want)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_input_dtypes(dtype: torch.dtype, fast0: FastEfficientVit):
    x = images(2, 3, 64, 96).to(dtype)
    got = fast0(x)
    assert got.dtype == dtype
    assert torch.equal(got, fast0(x.float()).to(dtype))
    assert fast0.forward_features(x).dtype == dtype
    for a, b in zip(*(fast0.forward_intermediates(i)[1] for i in (x, x.float())), strict=True):
        assert torch.equal(a, b.to(dtype))


def test_pixels(m0: EfficientVit, fast0: FastEfficientVit):
    x = torch.randint(0, 256, (2, 3, 96, 70), dtype=torch.uint8)
    got = fast0(x)
    assert got.dtype == torch.float32
    assert_close(got, exact(m0, normalise(x, MEAN, STD)))
    assert torch.equal(fast0(x.contiguous(memory_format=torch.channels_last)), got)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_compute_dtypes_use_the_reference_column(dtype: torch.dtype, m0: EfficientVit):
    x = images(1, 3, 64, 64)
    fast = evit_fast.accelerate(m0, dtype=dtype)
    assert all(p.dtype == torch.float32 for p in fast.parameters())
    got = fast(x)
    assert got.dtype == torch.float32
    assert_close(got, exact(m0, x), max(FLOOR[dtype], FLOOR[torch.float32]))
    row = evit_fast.explain(fast)[0]
    assert row.column == "reference" and row.dtype in row.reason and "float32" in row.reason
    own = evit_fast.accelerate(copy.deepcopy(m0).to(dtype))
    assert evit_fast.explain(own)[0].dtype == row.dtype
    assert_close(own(x.to(dtype)), exact(m0, x), max(3 * FLOOR[dtype], FLOOR[torch.float32]))
    with pytest.raises(NotImplementedError, match=r"strict=True.*reference"):
        evit_fast.accelerate(m0, dtype=dtype, strict=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_settings_of_the_process_change_nothing(backend: str, m0: EfficientVit, tmp_path):
    x = images(1, 3, 64, 64)
    want = evit_fast.accelerate(m0, backend=backend)(x)
    evit_fast.empty_cache()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            fast = evit_fast.accelerate(m0, backend=backend)
            assert torch.equal(fast(x), want)
            evit_fast.save(fast, tmp_path / "m.evit")
            assert torch.equal(evit_fast.load(tmp_path / "m.evit", backend=backend)(x), want)
    finally:
        torch.set_default_dtype(torch.float32)
    with torch.inference_mode():
        fast = evit_fast.accelerate(m0, backend=backend)
    assert torch.equal(fast(x), want) and not fast.head.linear.weight.is_inference()
    fast.train()(images(4, 3, 64, 64)).sum().backward()


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_batch(backend: str, m0: EfficientVit):
    fast = evit_fast.accelerate(m0, backend=backend)
    assert fast(images(0, 3, 64, 64)).shape == (0, 1000)
    assert fast.forward_features(images(0, 3, 224, 224)).shape == (0, 192, 4, 4)
    assert fast(torch.zeros(0, 3, 5, 5, dtype=torch.uint8)).dtype == torch.float32


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(backend: str, m0: EfficientVit):
    fast = evit_fast.accelerate(m0, backend=backend)
    x = images(1, 3, 64, 64)
    want = fast(x)
    with torch.autocast("cpu", torch.bfloat16):
        got = fast(x)
    assert got.dtype == torch.float32 and torch.equal(got, want)


def test_one_by_one_pixel(m0: EfficientVit, fast0: FastEfficientVit):
    x = images(2, 3, 1, 1)
    assert_close(fast0(x), exact(m0, x))


BAD = {
    "rank": (lambda: torch.zeros(3, 64, 64), r"\[B, 3, H, W\], got \[3, 64, 64\]"),
    "channels": (lambda: torch.zeros(1, 4, 64, 64), r"\[B, 3, H, W\], got \[1, 4, 64, 64\]"),
    "no-rows": (lambda: torch.zeros(1, 3, 0, 64), "at least 1"),
    "int64": (lambda: torch.zeros(1, 3, 64, 64, dtype=torch.int64), "int64"),
    "bool": (lambda: torch.zeros(1, 3, 64, 64, dtype=torch.bool), "bool"),
    "complex": (lambda: torch.zeros(1, 3, 64, 64, dtype=torch.complex64), "complex64"),
    "sparse": (lambda: torch.zeros(1, 3, 64, 64).to_sparse(), "sparse"),
    "meta": (lambda: torch.zeros(1, 3, 64, 64, device="meta"), "meta"),
}


@pytest.mark.parametrize("grad", [False, True], ids=["no-grad", "grad"])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_sentence(case: str, grad: bool, fast0: FastEfficientVit):
    make, match = BAD[case]
    with torch.set_grad_enabled(grad), pytest.raises(ValueError, match=match) as caught:
        fast0(make())
    assert "\n" not in str(caught.value) and str(caught.value).startswith("evit_fast: ")


# ------------------------------------------------------------------ gradients


def test_backward_raises(m0: EfficientVit):
    fast = evit_fast.accelerate(m0)
    x = images(1, 3, 64, 64)
    for y in (fast(x), fast.forward_features(x), fast.forward_intermediates(x)[1][0]):
        assert y.grad_fn is not None
        with pytest.raises(RuntimeError, match=r"no backward; call \.train\(\) first") as caught:
            y.sum().backward()
        assert "\n" not in str(caught.value)
    with torch.no_grad():
        assert not fast(x).requires_grad
    with torch.inference_mode():
        assert fast(x).is_inference()
    fast.requires_grad_(False)
    assert not fast(x).requires_grad
    fast.head.linear.bias.requires_grad_(True)
    assert fast(x).requires_grad
    fast.requires_grad_(False)
    with pytest.raises(RuntimeError, match="no backward"):
        torch.autograd.grad(fast(x.requires_grad_()).sum(), x)


def test_unfrozen_after_folding(m0: EfficientVit):
    fast = evit_fast.accelerate(copy.deepcopy(m0).requires_grad_(False))
    x = images(1, 3, 64, 64)
    assert fast(x).grad_fn is None
    fast.stages[2].blocks[0].dw0.m.bn.weight.requires_grad_(True)
    assert fast(x).grad_fn is not None


# ------------------------------------------------------------------ arguments


WRONG = {
    "backend": ({"backend": "tpu"}, ValueError, "reference, cpu, triton, cuda"),
    "graphs-kind": ({"graphs": 1}, ValueError, "None, True or False"),
    "cuda": ({"backend": "cuda"}, NotImplementedError, "need a CUDA device"),
    "cpu-f16": ({"backend": "cpu", "dtype": torch.float16}, NotImplementedError, "float32 only"),
    "int8": ({"dtype": torch.int8}, ValueError, "calibration"),
    "int8-calibrated": (
        {"dtype": torch.int8, "calibration": [torch.zeros(1, 3, 64, 64)]},
        NotImplementedError,
        "int8",
    ),
    "calibration": ({"calibration": []}, ValueError, "int8 only"),
    "dtype": ({"dtype": torch.int32}, ValueError, "float32"),
    "threads": ({"threads": 0}, ValueError, "1 to 256"),
    "graphs": ({"graphs": True}, NotImplementedError, "CUDA"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str, m0: EfficientVit):
    kwargs, error, match = WRONG[case]
    with pytest.raises(error, match=match) as caught:
        evit_fast.accelerate(m0, **kwargs)
    assert "\n" not in str(caught.value)


def test_wrong_models(m0: EfficientVit, tmp_path):
    changed = copy.deepcopy(m0)
    changed.stages[0].blocks[0].ffn0.m.act = nn.Hardswish()
    extra = copy.deepcopy(m0)
    extra.head.register_parameter("scale", nn.Parameter(torch.ones(1)))
    pooled = timm_peer.create("efficientvit_m0", global_pool="avgmax", num_classes=0)
    for model, error, match in (
        (nn.Linear(3, 4), ValueError, "expected an EfficientViT.*got Linear"),
        (torch.zeros(3), ValueError, "got Tensor"),
        (copy.deepcopy(m0).to("meta"), ValueError, "meta device"),
        (changed, NotImplementedError, "Hardswish"),
        (extra, NotImplementedError, "head.scale"),
        (pooled, NotImplementedError, "global_pool"),
    ):
        with pytest.raises(error, match=match) as caught:
            evit_fast.accelerate(model)
        assert "\n" not in str(caught.value)
    for call in (evit_fast.explain, lambda m: evit_fast.save(m, tmp_path / "x.evit")):
        with pytest.raises(ValueError, match=r"accelerate\(model\) first"):
            call(m0)


def test_threads_follow_torch(m0: EfficientVit, monkeypatch: pytest.MonkeyPatch):
    seen = []

    class Model(_native.Model):
        def run(self, *args: object) -> None:
            seen.append(args[-1])
            super().run(*args)

    columns.empty_cache()
    monkeypatch.setattr(_native, "Model", Model)
    fast, two = evit_fast.accelerate(m0), evit_fast.accelerate(m0, threads=2)
    x = images(2, 3, 64, 64)
    a = fast(x)
    torch.set_num_threads(3)
    b, c = fast(x), two(x)
    columns.empty_cache()
    assert seen == [1, 3, 2]
    assert torch.equal(a, b) and torch.equal(a, c)


# ------------------------------------------------------------------ explain, save, load


def test_explain(fast0: FastEfficientVit, m0: EfficientVit):
    rows = evit_fast.explain(fast0)
    table = str(rows).splitlines()
    assert len(rows) == len(table) - 1 == fast0._folded.program.count("\n") + 1
    assert [row.op for row in rows] == fast0._folded.program.split("\n")
    assert {row.column for row in rows} == {"cpu"} and {row.dtype for row in rows} == {"float32"}
    assert table[0].split() == [field.name for field in dataclasses.fields(rows[0])]
    assert (
        len(
            {line.index(row.column, len(row.op)) for line, row in zip(table[1:], rows, strict=True)}
        )
        == 1
    )
    row = evit_fast.explain(evit_fast.accelerate(m0, backend="reference"))[0]
    assert row.column == "reference" and "asked for" in row.reason
    with pytest.raises(ValueError, match="training"):
        evit_fast.explain(evit_fast.accelerate(m0).train())


def test_explain_names_the_cap(fast0: FastEfficientVit):
    best, used = _native.isas()[-1], _native.isa()
    assert evit_fast.explain(fast0)[0].isa == used
    _native.set_max_isa("scalar")
    try:
        row = evit_fast.explain(fast0)[0]
    finally:
        _native.set_max_isa(used)
    assert row.isa == "scalar" and row.reason == f"capped below {best} by EVIT_FAST_MAX_ISA"


def test_save_and_load(m0: EfficientVit, fast0: FastEfficientVit, tmp_path):
    path = tmp_path / "m0.evit"
    evit_fast.save(fast0, path, classes=[f"class {i}" for i in range(1000)])
    program = evit_fast.load(path)
    x = images(2, 3, 96, 64)
    assert torch.equal(program(x), fast0(x).detach())
    assert torch.equal(program.features(x), fast0.forward_features(x).detach())
    assert (
        str(program.explain()) == str(evit_fast.explain(fast0)) == str(evit_fast.explain(program))
    )
    assert program.metadata["num_classes"] == "1000"
    assert program.metadata["model"] == "efficientvit_m0"
    assert json.loads(program.metadata["classes"])[7] == "class 7"
    assert Preprocessing.from_json(program.metadata["preprocessing"]) == Preprocessing()
    program.save(tmp_path / "again.evit")
    assert (tmp_path / "again.evit").read_bytes() == path.read_bytes()
    for twin in (copy.deepcopy(program), pickle.loads(pickle.dumps(program)), program.half()):
        assert torch.equal(twin(x), fast0(x).detach())
    assert not program(x).requires_grad
    with pytest.raises(RuntimeError, match="no backward"):
        program(x.requires_grad_()).sum().backward()
    with pytest.raises(ValueError, match="2 class names for 1000"):
        evit_fast.save(fast0, path, classes=["a", "b"])


def test_program_keeps_its_limits(fast0: FastEfficientVit, tmp_path):
    evit_fast.save(fast0, tmp_path / "m.evit")
    program = evit_fast.load(tmp_path / "m.evit", threads=1, backend="cpu", strict=True)
    assert not program.training and program.eval() is program and program.train(False) is program
    for call in (
        program.train,
        program.state_dict,
        lambda: program.load_state_dict({}),
        lambda: program.reset_classifier(3),
    ):
        with pytest.raises(NotImplementedError, match="folded and cannot be recovered") as caught:
            call()
        assert "\n" not in str(caught.value)
    with pytest.raises(NotImplementedError, match="need a CUDA device"):
        evit_fast.load(tmp_path / "m.evit", backend="cuda")
    assert evit_fast.explain(evit_fast.load(tmp_path / "m.evit", backend="reference"))[0].reason


def test_save_features_and_training_models(m0: EfficientVit, tmp_path):
    x = images(1, 3, 64, 64)
    features = evit_fast.accelerate(ours(features_only=True, out_indices=(0, 1)))
    evit_fast.save(features, tmp_path / "f.evit")
    assert torch.equal(evit_fast.load(tmp_path / "f.evit")(x), features(x)[-1].detach())
    training = evit_fast.accelerate(m0).train()
    evit_fast.save(training, tmp_path / "t.evit")
    assert training.training
    assert torch.equal(evit_fast.load(tmp_path / "t.evit")(x), training.eval()(x).detach())
    half = evit_fast.accelerate(m0, dtype=torch.float16)
    evit_fast.save(half, tmp_path / "h.evit")
    assert torch.equal(evit_fast.load(tmp_path / "h.evit")(x), half(x).detach())
    with pytest.raises(NotImplementedError, match="strict=True"):
        evit_fast.load(tmp_path / "h.evit", strict=True)


def test_metadata_holds_the_preprocessing_of_timm(tmp_path):
    model = timm_peer.create("efficientvit_m0", pretrained_cfg_overlay={"mean": (0.5, 0.4, 0.3)})
    randomize(model).eval()
    fast = evit_fast.accelerate(model)
    evit_fast.save(fast, tmp_path / "m.evit")
    found = json.loads(evit_fast.load(tmp_path / "m.evit").metadata["preprocessing"])
    assert found["mean"] == [0.5, 0.4, 0.3]
    x = torch.randint(0, 256, (1, 3, 64, 64), dtype=torch.uint8)
    assert_close(fast(x), exact(model, normalise(x, (0.5, 0.4, 0.3), STD)))


# ------------------------------------------------------------------ the package


def test_import_is_silent_and_light():
    code = (
        "import torch, sys; before = set(sys.modules); import evit_fast; evit_fast.accelerate;"
        "heavy = {'timm', 'triton', 'torch._dynamo', 'PIL', 'onnx', 'huggingface_hub', 'tqdm'};"
        "print(sorted(heavy & (set(sys.modules) - before)), evit_fast.__version__)"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True
    )
    assert run.returncode == 0 and run.stderr == ""
    assert run.stdout.strip() == f"[] {evit_fast.__version__}"


def test_names():
    for name in evit_fast.__all__:
        assert getattr(evit_fast, name) is not None and name in dir(evit_fast)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = evit_fast.nothing
