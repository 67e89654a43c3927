"""The eager model against timm's: names, logits, gradients, and everything else a user calls.

Float64, so that only a difference in meaning can show: equal models agree to 1e-12, and the bound
of 1e-10 is far below the effect of any single weight (`randomize.py`).
"""

from __future__ import annotations

import copy
import dataclasses
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from evit_fast.config import VARIANTS, resolve
from evit_fast.layers import bias_index
from evit_fast.model import EfficientVit, create_model

from . import timm_peer
from .close import assert_close, budget, relative_error
from .randomize import randomize

REL = 1e-10
# Gradients in training pass through statistics of a few values, which amplify rounding a lot.
REL_TRAINING = 1e-8
MODELS = tuple(VARIANTS)
SIZES = {"224": (224, 224), "208": (208, 208), "256": (256, 256), "160x192": (160, 192)}
SIZES["384"] = (384, 384)
OLD_TIMM = "EVIT_FAST_OLD_TIMM"


def ids(name: object) -> str | None:
    return name.removeprefix("efficientvit_").upper() if isinstance(name, str) else None


def images(batch: int, height: int, width: int, dtype: torch.dtype = torch.float64):
    g = torch.Generator().manual_seed(height * 1000 + width)
    return torch.randn(batch, 3, height, width, generator=g, dtype=torch.float64).to(dtype)


def pair(name: str, built_for: int | tuple[int, int] = 224) -> tuple[EfficientVit, torch.nn.Module]:
    """Our model and timm's with the same random weights, in float64 and evaluation mode."""
    peer = randomize(timm_peer.create(name, img_size=built_for)).double().eval()
    ours = create_model(name, img_size=built_for).double().eval()
    ours.load_state_dict(peer.state_dict())
    return ours, peer


def small() -> EfficientVit:
    return randomize(create_model("m0", num_classes=7)).eval()


def check_gradients(ours, peer, x: torch.Tensor, rel: float = REL) -> None:
    """Logits, and gradients of a random projection of them to the input and every parameter."""
    x_ours, x_peer = x.clone().requires_grad_(), x.clone().requires_grad_()
    y_ours, y_peer = ours(x_ours), peer(x_peer)
    assert_close(y_ours, y_peer, REL, "logits")
    g = torch.Generator().manual_seed(1)
    direction = torch.randn(y_peer.shape, generator=g, dtype=y_peer.dtype)
    names = [name for name, _ in ours.named_parameters()]
    assert names == [name for name, _ in peer.named_parameters()]
    got = torch.autograd.grad(y_ours, [x_ours, *ours.parameters()], direction)
    want = torch.autograd.grad(y_peer, [x_peer, *peer.parameters()], direction)
    whole = torch.stack([b.norm() for b in want]).norm()
    for name, a, b in zip(["input", *names], got, want, strict=True):
        if name.endswith("bn.bias") and b.norm() < 1e-12 * whole:
            # A constant that every later batch norm subtracts again: zero but for rounding.
            assert a.norm() < 1e-12 * whole, f"gradient of {name}"
        else:
            assert_close(a, b, rel, f"gradient of {name}")


@pytest.mark.parametrize("batch", [1, 3], ids=["b1", "b3"])
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", MODELS, ids=ids)
def test_equals_timm(name: str, size: str, batch: int) -> None:
    """One image: evaluation, by a model built for 224, so that other sizes pad to its windows.

    Three images: evaluation and training, by a model built for the size, with that size's windows;
    training at 208 alone, where maps are padded, when timm is an old one.
    """
    height, width = SIZES[size]
    if not timm_peer.takes_any_size() and height != width:
        pytest.skip("this version of timm takes square images only")
    if batch == 1 and timm_peer.takes_any_size():
        built_for: int | tuple[int, int] = 224
    else:
        built_for = height if height == width else (height, width)
    ours, peer = pair(name, built_for)
    x = images(batch, height, width)
    if batch == 1:
        check_gradients(ours, peer, x)
        return
    with torch.no_grad():
        assert_close(ours(x), peer(x), REL, "logits")
    if not timm_peer.takes_any_size() and size != "208":
        return
    ours.train(), peer.train()
    check_gradients(ours, peer, x, REL_TRAINING)
    state = peer.state_dict()
    for key, value in ours.state_dict().items():
        assert_close(value, state[key], REL, key)  # running statistics moved alike


@pytest.mark.parametrize("names", [("M0", "M1", "M2", "M3"), ("M4", "M5")], ids="-".join)
def test_equals_timm_of_one_size(names: tuple[str, ...]) -> None:
    """The same comparison with a timm from before it took any size, in a process of its own."""
    folder = os.environ.get(OLD_TIMM)
    if not folder:
        pytest.skip(f"{OLD_TIMM} names no folder with an old timm")
    select = f"test_equals_timm and not one_size and ({' or '.join(names)})"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", select]
    command += ["--import-mode=importlib", __file__]
    env = dict(os.environ, EVIT_FAST_TIMM_PATH=str(Path(folder).resolve()))
    env.pop("PYTEST_XDIST_WORKER", None)
    root = Path(__file__).resolve().parents[1]
    run = subprocess.run(command, cwd=root, env=env, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    passed = f"{8 * len(names)} passed, {2 * len(names)} skipped"
    assert passed in run.stdout, run.stdout[-500:]


def test_a_wrong_bias_would_show() -> None:
    """The bound tells a forgotten attention bias apart: the weights make every branch count."""
    ours, peer = pair("efficientvit_m0")
    x = images(1, 224, 224)
    for block in (b for stage in ours.stages for b in stage.blocks):
        biases = block.mixer.m.attn.attention_biases
        kept = biases.detach().clone()
        with torch.no_grad():
            biases.zero_()
            moved = relative_error(ours(x), peer(x))
            biases.copy_(kept)
        assert moved > 1e-3


@pytest.mark.parametrize("name", MODELS, ids=ids)
def test_has_timms_attributes(name: str) -> None:
    ours, peer = create_model(name), timm_peer.create(name)
    assert list(ours.state_dict()) == list(peer.state_dict())
    assert [n for n, _ in ours.named_buffers()] == [n for n, _ in peer.named_buffers()]
    for attribute in ("feature_info", "num_features", "head_hidden_size", "num_classes"):
        assert getattr(ours, attribute) == getattr(peer, attribute), attribute
    for attribute in ("img_size", "drop_rate", "grad_checkpointing", "in_chans"):
        if hasattr(peer, attribute):
            assert getattr(ours, attribute) == getattr(peer, attribute), attribute
    assert ours.no_weight_decay() == peer.no_weight_decay()
    for coarse in (False, True):
        assert ours.group_matcher(coarse) == peer.group_matcher(coarse)
    cfg = dict(peer.default_cfg, fixed_input_size=False)
    assert {k: v for k, v in ours.default_cfg.items() if k in cfg} == cfg
    assert ours.pretrained_cfg is ours.default_cfg
    attn, peer_attn = ours.stages[2].blocks[0].mixer.m.attn, peer.stages[2].blocks[0].mixer.m.attn
    assert torch.equal(attn.attention_bias_idxs, peer_attn.attention_bias_idxs)
    assert ours.get_classifier().weight.shape == peer.get_classifier().weight.shape


def test_default_initialisation_has_timms_scale() -> None:
    ours, peer = create_model("m1"), timm_peer.create("efficientvit_m1")
    for (key, a), b in zip(ours.state_dict().items(), peer.state_dict().values(), strict=True):
        if a.numel() > 1000:
            assert abs(float(a.std() / b.std()) - 1) < 0.2, key
        elif "bn" in key or "bias" in key:
            assert a.dtype == b.dtype
            assert bool((a == 0).all()) == bool((b == 0).all()), key


@pytest.mark.parametrize("out_indices", [(0, 1, 2), (1,), (0, 2), (-1,), 2], ids=str)
def test_features_only_equals_timm(out_indices) -> None:
    peer = timm_peer.create("efficientvit_m0", features_only=True, out_indices=out_indices)
    randomize(peer).eval()
    ours = create_model("m0", features_only=True, out_indices=out_indices).eval()
    assert list(ours.state_dict()) == list(peer.state_dict())
    assert list(ours) == list(peer)
    ours.load_state_dict(peer.state_dict())
    for part in ("channels", "reduction", "module_name"):
        assert getattr(ours.feature_info, part)() == getattr(peer.feature_info, part)()
    x = images(2, 200, 150, torch.float32) if timm_peer.takes_any_size() else images(2, 224, 224)
    x = x.float()
    got, want = ours(x), peer(x)
    assert isinstance(got, list) and len(got) == len(want)
    for i, (a, b) in enumerate(zip(got, want, strict=True)):
        assert_close(a, b, what=f"map {i}")
    assert list(ours.patch_embed._modules) == list(create_model("m0").patch_embed._modules)


@pytest.mark.parametrize("indices", [None, 1, 2, [0, 2], [-2]], ids=str)
@pytest.mark.parametrize("stop_early", [False, True])
def test_forward_intermediates_equals_timm(indices, stop_early) -> None:
    ours, peer = pair("efficientvit_m0")
    x = images(1, 96, 96) if timm_peer.takes_any_size() else images(1, 224, 224)
    last, maps = ours.forward_intermediates(x, indices, stop_early=stop_early)
    peer_last, peer_maps = peer.forward_intermediates(x, indices, stop_early=stop_early)
    assert_close(last, peer_last, REL)
    only = ours.forward_intermediates(x, indices, stop_early=stop_early, intermediates_only=True)
    for a, b, c in zip(maps, peer_maps, only, strict=True):
        assert_close(a, b, REL)
        assert_close(c, b, REL)
    with pytest.raises(ValueError, match="NCHW"):
        ours.forward_intermediates(x, output_fmt="NHWC")
    with pytest.raises(ValueError, match="out of range"):
        ours.forward_intermediates(x, [3])


@pytest.mark.parametrize("indices", [1, [0], [1]], ids=str)
def test_pruned_model_equals_timm(indices) -> None:
    ours, peer = pair("efficientvit_m0")
    assert ours.prune_intermediate_layers(indices) == peer.prune_intermediate_layers(indices)
    assert list(ours.state_dict()) == list(peer.state_dict())
    x = images(1, 224, 224)
    assert_close(ours(x), peer(x), REL)
    if timm_peer.takes_any_size():
        assert ours.num_features == peer.num_features


def test_head_equals_timm() -> None:
    ours, peer = pair("efficientvit_m0")
    x = images(2, 224, 224)
    features = ours.forward_features(x)
    assert_close(features, peer.forward_features(x), REL)
    for pre_logits in (False, True):
        assert_close(
            ours.forward_head(features, pre_logits=pre_logits),
            peer.forward_head(features, pre_logits=pre_logits),
            REL,
        )
    for classes, pool in ((10, None), (0, None), (5, "avg"), (0, "")):
        ours.reset_classifier(classes, pool), peer.reset_classifier(classes, pool)
        assert ours.num_classes == classes and not ours.head.training
        assert ours.patch_embed.conv1.conv.weight.dtype == features.dtype
        if classes:
            assert ours.head.linear.weight.dtype == torch.float64
            ours.load_state_dict(peer.double().eval().state_dict())
            assert ours.get_classifier() is ours.head.linear
        else:
            assert isinstance(ours.get_classifier(), torch.nn.Identity)
        assert_close(ours(x), peer(x), REL, f"{classes} classes, pool {pool}")
    with pytest.raises(ValueError, match="needs pooled features"):
        ours.reset_classifier(3)
    with pytest.raises(ValueError, match="'max'"):
        ours.reset_classifier(3, "max")


@pytest.mark.parametrize("size", [224, 384, 112, 64, (160, 192), 16], ids=str)
def test_set_input_size_equals_timm(size) -> None:
    if not timm_peer.takes_any_size():
        pytest.skip("this version of timm has no set_input_size")
    ours, peer = pair("efficientvit_m2")
    ours.set_input_size(size), peer.set_input_size(size)
    assert ours.img_size == peer.img_size
    for key, value in peer.state_dict().items():
        assert_close(ours.state_dict()[key], value, 1e-6, key)  # timm resizes in float32
    ours.load_state_dict(peer.state_dict())
    built = create_model("m2", img_size=size).double().eval()
    built.load_state_dict(peer.state_dict())
    x = images(1, 90, 120)
    want = peer(x)
    assert_close(ours(x), want, REL)
    assert_close(built(x), want, REL)


@pytest.mark.parametrize("window", [1, 3, 10])
def test_other_windows_equal_timm(window: int) -> None:
    peer = timm_peer.create("efficientvit_m0", window_size=[window] * 3)
    randomize(peer).double().eval()
    ours = create_model("m0", window=window).double().eval()
    ours.load_state_dict(peer.state_dict())
    x = images(1, 224, 224)
    if timm_peer.takes_any_size():
        assert_close(ours(x), peer(x), REL)


def test_in_chans_and_small_and_empty_inputs() -> None:
    model = randomize(create_model("m0", in_chans=1, num_classes=3)).eval()
    for batch, height, width in ((0, 224, 224), (2, 1, 1), (1, 7, 300), (0, 100, 33)):
        assert model(torch.zeros(batch, 1, height, width)).shape == (batch, 3)


def test_train_and_eval_return_the_module() -> None:
    for module in create_model("m0").modules():
        assert module.train() is module
        assert module.eval() is module


def test_no_bias_outlives_a_load() -> None:
    """timm 1.0.31 keeps gathered biases of the weights from before: its logits stay wrong."""
    x = images(1, 224, 224, torch.float32)
    first, second = small(), randomize(create_model("m0", num_classes=7), seed=1).eval()
    first(x)
    first.load_state_dict(second.state_dict())
    assert torch.equal(first(x), second(x))
    with torch.no_grad():
        first.stages[0].blocks[0].mixer.m.attn.attention_biases.add_(1.0).mul_(-2)
    assert relative_error(first(x), second(x)) > 1e-4
    assert torch.equal(copy.deepcopy(first)(x), first(x))
    assert torch.equal(pickle.loads(pickle.dumps(first))(x), first(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "f16"])
def test_half_precision(dtype: torch.dtype) -> None:
    model = small()
    x = images(2, 160, 192)
    want = copy.deepcopy(model).double()(x)
    model.to(dtype)
    got = model(x.to(dtype))
    assert got.dtype == dtype
    assert_close(got, want, budget(dtype), f"{dtype}")
    model.train()
    model(x.to(dtype)).float().square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_from_the_meta_device() -> None:
    want = small()
    x = images(1, 100, 100, torch.float32)
    for assign in (False, True):
        with torch.device("meta"):
            model = create_model("m0", num_classes=7).eval()
        if not assign:
            model.to_empty(device="cpu")
        model.load_state_dict(want.state_dict(), assign=assign)
        assert torch.equal(model(x), want(x))


def test_gradient_checkpointing_changes_nothing() -> None:
    x = images(2, 64, 64)
    for plain in (small().double(), create_model("m0", features_only=True).double()):
        randomize(plain).train()
        checkpointed = copy.deepcopy(plain)
        checkpointed.set_grad_checkpointing()
        grads = []
        for model in (plain, checkpointed):
            y = model(x)
            torch.cat([m.flatten() for m in (y if isinstance(y, list) else [y])]).sum().backward()
            grads.append([p.grad for p in model.parameters()])
        for a, b in zip(*grads, strict=True):
            assert torch.equal(a, b)


def test_two_heads() -> None:
    model = randomize(create_model("m0", num_classes=5, distillation=True))
    x = images(3, 64, 64, torch.float32)
    y, y_dist = model.train()(x)
    assert y.shape == y_dist.shape == (3, 5) and relative_error(y, y_dist) > 0.1
    (y.sum() + y_dist.sum()).backward()
    model.eval()
    pooled = model.forward_head(model.forward_features(x), pre_logits=True)
    assert_close(model(x), (model.head(pooled) + model.head_dist(pooled)) / 2, 1e-6)
    assert model.get_classifier() == (model.head.linear, model.head_dist.linear)
    model.reset_classifier(3)
    assert model(x).shape == (3, 3) and model.head_dist.linear.out_features == 3
    model.reset_classifier(0)
    assert_close(model(x), pooled, 1e-6)


def test_stochastic_depth_keeps_the_mean() -> None:
    residual = small().stages[0].blocks[0].dw0.double()
    x = images(1, 8, 8)[:, :1].expand(4000, 64, 8, 8)
    residual.m.eval()
    want = residual(x[:1])
    residual.drop, residual.training = 0.25, True
    got = residual(x)
    skipped = (got - x).abs().amax((1, 2, 3)) == 0
    assert 0.2 < skipped.double().mean() < 0.3
    kept = got[~skipped]
    assert_close(kept, (x[:1] + (want - x[:1]) / 0.75).expand_as(kept), 1e-12)


def test_compiles_and_exports() -> None:
    """Without a graph break, and export with any batch; the size pads every stage's map."""
    config = dataclasses.replace(VARIANTS["efficientvit_m0"], depth=(1, 1, 1))
    model = randomize(EfficientVit(config, num_classes=7)).eval()
    example, x = (images(batch, 160, 200, torch.float32) for batch in (2, 3))
    batch = torch.export.Dim("batch", min=2, max=64)
    exported = torch.export.export(model, (example,), dynamic_shapes=({0: batch},)).module()
    assert_close(exported(x), model(x), 1e-6)
    compiled = torch.compile(model, fullgraph=True, backend="eager", dynamic=False)
    assert_close(compiled(x), model(x), 1e-6)


def test_bias_index_by_definition() -> None:
    index = bias_index(5)
    for i in range(25):
        for j in range(25):
            dy, dx = abs(i // 5 - j // 5), abs(i % 5 - j % 5)
            assert index[i, j] == dy * 5 + dx


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: create_model("m6"), "unknown model 'm6'.*m0, m1"),
        (lambda: create_model("efficientvit_b1"), "MIT's network"),
        (lambda: create_model("m0", img_size=15), "at least 16"),
        (lambda: create_model("m0", img_size=(224, 8)), "at least 16"),
        (lambda: create_model("m0", window=0), "window is 0"),
        (lambda: create_model("m0", num_classes=-1), "num_classes is -1"),
        (lambda: create_model("m0", features_only=True, out_indices=(0, 3)), "out of range"),
        (lambda: create_model("m0", features_only=True, out_indices=(0, 0)), "distinct"),
        (lambda: create_model("m0", features_only=True, out_indices=4), "there are 3"),
        (lambda: create_model("m0", pretrained=True, checkpoint="x.pth"), "drop one"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_wrong_arguments_say_what_to_do(make, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()


def test_names_of_a_variant() -> None:
    for name in ("m5", "M5", "efficientvit_m5", "EfficientViT_M5"):
        assert resolve(name) is VARIANTS["efficientvit_m5"]
    assert {c.name: c for c in VARIANTS.values()} == VARIANTS
