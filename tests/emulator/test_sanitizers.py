"""Small cases of every op under ThreadSanitizer, and under AddressSanitizer with UBSan."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from evit_fast.ops import OPS, cga, classifier, dw_ffn, patch_merge, stem
from evit_fast.ops.line import LineShape
from tests.emulator.cases import TARGETS, Run, check, plan, reference
from tests.emulator.sanitize.running import run_apart
from tests.ops.test_cga import random_weights

# By op: a shape that compiles fast, and an input with two images and ragged sides.
SMALL: dict[str, tuple[LineShape, tuple[int, ...]]] = {
    "stem": (stem.Shape(3, 64), (2, 3, 17, 33)),
    "dw_ffn": (dw_ffn.Shape(32, 96), (2, 3, 5, 32)),
    "cga": (cga.Shape(32, 2, 16, 3, (3, 1)), (2, 4, 5, 32)),
    "patch_merge": (patch_merge.Shape(32, 64, 16, 48), (2, 3, 5, 32)),
    "classifier": (classifier.Shape(32, 40), (2, 3, 5, 32)),
}
BUILT = [op for op in OPS if find_spec(f"evit_fast.cuda.{op}")]


class Small(NamedTuple):
    s: LineShape
    w: NamedTuple
    x: Tensor


@cache
def small(op: str) -> Small:
    s, size = SMALL[op]
    return Small(s, weights(s), torch.randn(size, generator=torch.Generator().manual_seed(1)))


def dims(s: LineShape) -> dict[str, tuple[int, ...]]:
    """The weights of an op without heads, by field."""
    if isinstance(s, dw_ffn.Shape):
        return {"dw": (s.C, 3, 3), "dw_bias": (s.C,), "w1": (s.F, s.C), "b1": (s.F,),
                "w2": (s.C, s.F), "b2": (s.C,)}  # fmt: skip
    if isinstance(s, patch_merge.Shape):
        return {"w1": (s.F, s.C), "b1": (s.F,), "dw": (s.F, 3, 3), "dw_bias": (s.F,),
                "se1": (s.R, s.F), "se1_bias": (s.R,), "se2": (s.F, s.R), "se2_bias": (s.F,),
                "w3": (s.CO, s.F), "b3": (s.CO,)}  # fmt: skip
    if isinstance(s, classifier.Shape):
        return {"w": (s.N, s.C), "bias": (s.N,)}
    w = s.widths
    found = {f"conv{i}": (w[i], w[i - 1], 3, 3) for i in (1, 2, 3, 4)}
    found |= {f"bias{i}": (w[i],) for i in (1, 2, 3, 4)}
    return found | {"conv1_u8": found["conv1"], "bias1_u8": found["bias1"], "pad_u8": (s.in_,)}


def weights(s: LineShape) -> NamedTuple:
    """Random, float64; sums of order one."""
    if isinstance(s, cga.Shape):
        return random_weights(s)
    g = torch.Generator().manual_seed(2)

    def array(*size: int) -> Tensor:
        return torch.randn(size, generator=g).double() / max(1, torch.Size(size[1:]).numel()) ** 0.5

    return OPS[s.op].Weights(**{name: array(*size) for name, size in dims(s).items()})


def targets() -> list:
    usual = ("sm_80-f16",)
    return [
        pytest.param(*target, id=name, marks=() if name in usual else pytest.mark.full)
        for name, target in TARGETS.items()
    ]


@pytest.mark.parametrize("build", ["tsan", "asan"])
@pytest.mark.parametrize(("arch", "dtype"), targets())
@pytest.mark.parametrize("op", BUILT)
def test_shipped_kernels_are_clean(op: str, arch: int, dtype: torch.dtype, build: str):
    s, w, x = small(op)
    x = x.to(dtype)
    for deterministic in (False, True):
        p = plan(s, w, x, arch, dtype, deterministic=deterministic, edge=0)
        outcome = run_apart(p.launches, build, "shuffled")
        assert outcome.said == "clean", outcome.report
        check(Run(p.y, reference(s, w, x), s, w, x, dtype))
