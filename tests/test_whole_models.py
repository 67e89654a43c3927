"""Whole models as one native call: every variant, instruction set and size against float64.

Also the same bits for an image alone or in a batch and for any number of threads.
"""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from evit_fast.config import VARIANTS
from evit_fast.fold import build, fold
from evit_fast.model import EfficientVit
from tests.close import assert_close, budget, relative_error
from tests.ops.columns import ISAS, instruction_set, run
from tests.ops.eager import MEAN, STD
from tests.randomize import randomize

NAMES = tuple(VARIANTS)
SIZES = ((224, 224), (208, 208), (256, 256), (160, 192), (384, 384))


@lru_cache(maxsize=2)
def model(name: str, seed: int = 1) -> tuple[EfficientVit, EfficientVit, str, Tensor]:
    """float32 eager, float64 eager, program, blob."""
    single = randomize(EfficientVit(VARIANTS[name]), seed).eval()
    double = EfficientVit(VARIANTS[name]).double().eval()
    double.load_state_dict(single.state_dict())
    return single, double, *build(fold(single, MEAN, STD))


@lru_cache(maxsize=4)
@torch.no_grad()
def expected(name: str, B: int, H: int, W: int) -> tuple[Tensor, Tensor, float]:
    """Input, float64 logits, the error of eager float32."""
    single, double, _, _ = model(name)
    x = torch.randn(B, 3, H, W, generator=torch.Generator().manual_seed(H * 1000 + W))
    want = double(x.double())
    return x, want, relative_error(single(x), want)


def check(name: str, isa: str, B: int, H: int, W: int) -> None:
    x, want, eager = expected(name, B, H, W)
    _, _, program, blob = model(name)
    with instruction_set(isa):
        y = run(program, blob, x)
        assert_close(
            y, want, budget(torch.float32, eager), f"{name} {isa} {B}x{H}x{W} (eager {eager:.1e})"
        )
        if isa == ISAS[-1] or (H, W) == SIZES[0]:
            for threads in (2, 5):
                assert torch.equal(run(program, blob, x, threads), y), (
                    f"{threads} threads: other bits"
                )
            assert torch.equal(run(program, blob, x[-1:]), y[-1:]), "an image alone has other bits"


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("H,W", SIZES, ids=lambda v: str(v))
@pytest.mark.parametrize("name", NAMES)
def test_logits(name: str, H: int, W: int, isa: str):
    check(name, isa, 3 if H <= 224 else 1, H, W)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("H,W", [(1, 1), (17, 33), (64, 64), (225, 223), (32, 480)])
@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientvit_m5"])
def test_any_size(name: str, H: int, W: int, isa: str):
    check(name, isa, 2, H, W)


@pytest.mark.parametrize("B", [0, 2, 15, 16, 17, 33])
def test_batches_have_the_bits_of_single_images(B: int):
    _, _, program, blob = model("efficientvit_m0")
    x = torch.randn(B, 3, 224, 224)
    for threads in (1, 3, 8):
        y = run(program, blob, x, threads)
        assert y.shape == (B, 1000)
        for i in range(0, B, 7):
            assert torch.equal(run(program, blob, x[i : i + 1]), y[i : i + 1])


@pytest.mark.parametrize("isa", ISAS)
def test_pixels(isa: str):
    single, double, program, blob = model("efficientvit_m1")
    x = torch.randint(0, 256, (2, 3, 160, 192), dtype=torch.uint8)
    mean, std = (torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (MEAN, STD))
    normal = (x.double() / 255 - mean) / std
    with torch.no_grad():
        want = double(normal)
        eager = relative_error(single(normal.float()), want)
    views = {
        "nchw": x,
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "flipped": x.flip(3).flip(3),
        "cropped": torch.nn.functional.pad(x, (3, 5, 2, 1))[:, :, 2:-1, 3:-5],
    }
    with instruction_set(isa):
        outputs = {k: run(program, blob, v) for k, v in views.items()}
    for kind, y in outputs.items():
        assert_close(y, want, budget(torch.float32, eager), f"uint8 {kind}")
        assert torch.equal(y, outputs["nchw"]), f"{kind}: other bits than nchw"


def test_an_ill_conditioned_network():
    """Scores of several hundred: eager float32 is off by over 1e-5, fused may be by twice that."""
    single, double = (EfficientVit(VARIANTS["efficientvit_m2"]).eval() for _ in range(2))
    randomize(single, 0)
    with torch.no_grad():
        for name, m in single.named_modules():
            if name.endswith(".bn") and (".qkvs." in name or ".dws." in name):
                m.weight.mul_(12)
    double.load_state_dict(single.state_dict())
    double.double()
    program, blob = build(fold(single, MEAN, STD))
    x = torch.randn(2, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        want = double(x.double())
        eager = relative_error(single(x), want)
    got = run(program, blob, x)
    print(f"eager {eager:.2e}, fused {relative_error(got, want):.2e}")
    assert eager > 1e-5, "the network is not ill-conditioned any more"
    assert_close(got, want, budget(torch.float32, eager), "ill-conditioned")
