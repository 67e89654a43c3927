"""Casts to bfloat16 in the interpreter are those of a card: see conftest.py."""

from __future__ import annotations

import torch
import triton
import triton.language as tl


@triton.jit
def _cast(y, x, COUNT: tl.constexpr):
    i = tl.arange(0, COUNT)
    tl.store(y + i, tl.load(x + i).to(tl.bfloat16))


def test_rounds_to_nearest_even():
    x = torch.randn(256) * torch.logspace(-38, 38, 256)
    x[:6] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, torch.inf, -torch.inf, torch.nan, 3.4e38])
    y = torch.empty(256, dtype=torch.bfloat16)
    _cast[(1,)](y, x, COUNT=256)
    assert torch.equal(y.isnan(), x.isnan())
    assert torch.equal(y.nan_to_num(7.0), x.to(torch.bfloat16).nan_to_num(7.0))
