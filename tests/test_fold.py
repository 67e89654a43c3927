"""Folding whole models against eager in float64; every form of model; what cannot be folded."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from evit_fast import _native
from evit_fast.config import VARIANTS
from evit_fast.fold import build, fold
from evit_fast.model import EfficientVit, create_model
from evit_fast.program import parse, run_reference
from tests import timm_peer
from tests.close import assert_close
from tests.ops.eager import MEAN, STD, model
from tests.randomize import randomize

EXACT = 1e-11  # relative L2 at the logits in float64


def fused(m: nn.Module, x: Tensor, mean=MEAN, std=STD) -> Tensor:
    """What the folded float64 program of m gives, a map as NCHW."""
    program, blob = build(fold(m, mean, std), torch.float64)
    y = run_reference(x, program, blob)
    return y.permute(0, 3, 1, 2) if y.dim() == 4 else y


def small(**kwargs: object) -> EfficientVit:
    m = EfficientVit(VARIANTS["efficientvit_m0"], **{"num_classes": 10, **kwargs})
    return randomize(m, seed=7).double().eval()


def image(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64)


@pytest.mark.parametrize("size", [(224, 224), (160, 192), (33, 47), (1, 1)], ids=str)
@pytest.mark.parametrize("name", VARIANTS)
def test_equals_eager(name: str, size: tuple[int, int]):
    m, x = model(name), image(1, 3, *size)
    with torch.no_grad():
        assert_close(fused(m, x), m(x), EXACT)


@pytest.mark.parametrize("img_size", [64, 256, 384, (160, 240)], ids=str)
def test_window_follows_img_size(img_size: int | tuple[int, int]):
    m = small(img_size=img_size)
    x = image(1, 3, 224, 160)
    with torch.no_grad():
        assert_close(fused(m, x), m(x), EXACT)


def test_other_windows():
    m = create_model("m1", window=5, num_classes=4)
    m = randomize(m, seed=2).double().eval()
    x = image(1, 3, 224, 224)
    with torch.no_grad():
        assert_close(fused(m, x), m(x), EXACT)


@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientvit_m5"])
def test_equals_timm(name: str):
    m = randomize(timm_peer.create(name), seed=4).double().eval()
    x = image(1, 3, 224, 224)
    with torch.no_grad():
        assert_close(fused(m, x), m(x), EXACT)


def test_pixels_with_mean_and_std():
    m = small()
    mean, std = (0.9, 0.1, 0.5), (0.1, 0.7, 0.3)
    pixels = torch.randint(0, 256, (2, 3, 50, 65), dtype=torch.uint8)
    mean_, std_ = (torch.tensor(v, dtype=torch.float64)[:, None, None] for v in (mean, std))
    program, blob = build(fold(m, mean, std), torch.float64)
    got = run_reference(pixels, program, blob)
    assert got.dtype == torch.float32  # which is why the bound is not EXACT
    with torch.no_grad():
        assert_close(got, m((pixels.double() / 255 - mean_) / std_), 1e-6)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_image_channels(in_chans: int):
    m, x = small(in_chans=in_chans), image(1, in_chans, 64, 64)
    with torch.no_grad():
        assert_close(fused(m, x, mean=(0.5,), std=[0.25] * in_chans), m(x), EXACT)


def test_no_classes_pools():
    m, x = small(num_classes=0), image(2, 3, 64, 96)
    with torch.no_grad():
        y = fused(m, x)
        assert y.shape == (2, 192)
        assert_close(y, m(x), EXACT)


@pytest.mark.parametrize("classes", [10, 0])
def test_distillation(classes: int):
    m, x = small(num_classes=classes, distillation=True), image(2, 3, 64, 64)
    with torch.no_grad():
        assert_close(fused(m, x), m(x), EXACT)


@pytest.mark.parametrize("indices", [(0,), (0, 1), (0, 1, 2)], ids=str)
def test_features_only_ends_in_a_map(indices: tuple[int, ...]):
    m = create_model("m0", features_only=True, out_indices=indices)
    m = randomize(m, seed=9).double().eval()
    x = image(1, 3, 128, 96)
    with torch.no_grad():
        assert_close(fused(m, x), m(x)[-1], EXACT)


@pytest.mark.parametrize("source", ["ours", "timm"])
def test_pruned_ends_in_a_map(source: str):
    m = small() if source == "ours" else timm_peer.create("efficientvit_m0")
    if not hasattr(m, "prune_intermediate_layers"):
        pytest.skip("this timm cannot prune")
    m = randomize(m, seed=3).double().eval()
    m.prune_intermediate_layers([1])
    x = image(1, 3, 128, 128)
    with torch.no_grad():
        y = fused(m, x)
        assert y.shape == (1, 128, 4, 4)
        assert_close(y, m.forward_intermediates(x, [1], intermediates_only=True)[0], EXACT)


def test_unpooled_ends_in_a_map():
    m = small()
    m.reset_classifier(0, "")
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        assert_close(fused(m, x), m(x), EXACT)


def test_convolutions_that_are_folded_already():
    """ConvNorm replaced by one Conv2d with a bias, NormLinear by one Linear."""
    m, x = small(), image(1, 3, 64, 64)
    with torch.no_grad():
        want = m(x)

    def merge(parent: nn.Module) -> None:
        for name, child in parent.named_children():
            conv = getattr(child, "conv", None)
            if conv is None:
                merge(child)
                continue
            scale = child.bn.weight / (child.bn.running_var + child.bn.eps).sqrt()
            one = nn.Conv2d(
                conv.in_channels,
                conv.out_channels,
                conv.kernel_size,
                conv.stride,
                conv.padding,
                groups=conv.groups,
            ).double()
            one.weight.copy_(conv.weight * scale[:, None, None, None])
            one.bias.copy_(child.bn.bias - child.bn.running_mean * scale)
            setattr(parent, name, one)

    with torch.no_grad():
        merge(m)
        scale = m.head.bn.weight / (m.head.bn.running_var + m.head.bn.eps).sqrt()
        shift = m.head.bn.bias - m.head.bn.running_mean * scale
        one = nn.Linear(192, 10).double()
        one.weight.copy_(m.head.linear.weight * scale)
        one.bias.copy_(m.head.linear.bias + m.head.linear.weight @ shift)
        m.head = one
        assert_close(m(x), want, EXACT)
        assert_close(fused(m, x), want, EXACT)
        assert_close(m(x), want, EXACT)  # folding wrote into none of its float64 weights


def test_model_is_left_alone():
    m = small().train()
    before = copy.deepcopy(m.state_dict())
    fold(m, MEAN, STD)
    assert m.training
    after = m.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_half_precision_weights_are_folded_in_float64():
    m = small().bfloat16()
    wide = copy.deepcopy(m).double()
    for (_, a), (_, b) in zip(fold(m, MEAN, STD), fold(wide, MEAN, STD), strict=True):
        for x, y in zip(a, b, strict=True):
            if not isinstance(x, tuple):
                assert x.dtype == "float64" and (x == y).all()


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16], ids=str
)
def test_build_packs_ops_one_after_the_other(dtype: torch.dtype):
    folded = fold(model("efficientvit_m5"), MEAN, STD)
    program, blob = build(folded, dtype)
    ops = parse(program)
    assert len(ops) == len(folded) == 32
    assert [op.shape for op in ops] == [shape for shape, _ in folded]
    assert all(op.dtype == dtype for op in ops)
    ends = [op.at + _native.op_bytes(op.line) for op in ops]
    assert [op.at for op in ops] == [0, *ends[:-1]] and ends[-1] == blob.numel()
    assert blob.dtype == torch.uint8 and blob.data_ptr() % 64 == 0
    assert torch.equal(blob, build(folded, dtype)[1])
    assert ("dtype=" in program) == (dtype != torch.float32)


def test_program_text_of_m5():
    program, _ = build(fold(model("efficientvit_m5"), MEAN, STD))
    lines = [line.rpartition(" at=")[0] for line in program.split("\n")]
    assert lines[:6] == [
        "stem in=3 C=192",
        "dw_ffn C=192 F=384",
        "cga C=192 heads=3 dk=16 window=7 ks=7,5,3",
        "dw_ffn C=192 F=384",
        "dw_ffn C=192 F=384",
        "patch_merge C=192 F=768 R=192 CO=288",
    ]
    assert lines[-2:] == ["dw_ffn C=384 F=768", "classifier C=384 N=1000"]


def change(what: str) -> EfficientVit:
    """A model with one part that the fused ops do not have."""
    m = small()
    if what == "stem":
        m.patch_embed.relu2 = nn.GELU()
    elif what == "feed-forward":
        m.stages[1].blocks[0].ffn1.m.act = nn.Hardswish()
    elif what == "attention":
        m.stages[2].blocks[1].mixer.m.attn.proj[0] = nn.Identity()
    elif what == "squeeze":
        m.stages[1].downsample.patchmerge.se.act = nn.SiLU()
    elif what == "head":
        m.head = nn.Sequential(nn.Linear(192, 10))
    elif what == "pool":
        m.global_pool.pool_type = "max"
    return m


@pytest.mark.parametrize(
    "what,fact",
    [
        ("stem", "ReLU between the convolutions of the stem, but the model has GELU"),
        ("feed-forward", "ReLU in the feed-forward, but the model has Hardswish"),
        ("attention", "ReLU before the projection of the attention, but the model has Identity"),
        ("squeeze", "ReLU in the downsampling, but the model has SiLU"),
        ("head", "the model's head is Sequential"),
        ("pool", "global_pool='max'"),
    ],
)
def test_what_no_op_stands_for(what: str, fact: str):
    with pytest.raises(NotImplementedError, match=fact):
        fold(change(what), MEAN, STD)


@pytest.mark.parametrize(
    "mean,std,fact",
    [
        ((0.5, 0.5), STD, "mean has 2 values, but the model takes 3 image channels"),
        (MEAN, (0.2,) * 4, "std has 4 values"),
        (MEAN, (0.2, 0.0, 0.2), "std must be positive"),
        (MEAN, (0.2, float("nan"), 0.2), "std must be positive"),
    ],
)
def test_mean_and_std_must_fit(mean: tuple, std: tuple, fact: str):
    with pytest.raises(ValueError, match=fact):
        fold(small(), mean, std)
