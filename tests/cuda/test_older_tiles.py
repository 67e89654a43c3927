"""A later card runs the tiles of sm_70 and sm_75, and so verifies them (make gpu, --tiles 70)."""

from __future__ import annotations

import pytest
import torch

from evit_fast import fragments
from evit_fast.cuda import compiled
from evit_fast.cuda.launch_shapes import compile_kernel
from evit_fast.model_ops import shapes

ARCH = 90


@pytest.fixture(params=fragments.FAMILIES[:-1])
def tiles(request, monkeypatch):
    monkeypatch.setattr(fragments, "_newest", fragments.FAMILIES[-1])
    fragments.use_tiles(request.param)
    return request.param


def test_only_float16_takes_older_tiles(tiles):
    assert fragments.family(ARCH, torch.float16) == tiles
    assert fragments.family(ARCH, torch.bfloat16) == 80
    assert fragments.family(ARCH, torch.float32) == 0
    assert fragments.family(70, torch.float16) == 70


@pytest.mark.parametrize("op", ["stem", "dw_ffn", "cga", "patch_merge", "classifier"])
def test_a_later_card_compiles_them(op, tiles):
    s, side = shapes(op)[0]
    for launch in compiled.plan(s, torch.float16, 256, side, side, ARCH):
        assert launch.kernel.family == tiles
        assert launch.kernel.name in compile_kernel(launch.kernel, ARCH).resources
