"""A matrix product as a kernel file would hold it, small: for what is true of any kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from evit_fast.kernels.dot import dot
from evit_fast.kernels.launches import Config, Launch, cdiv
from evit_fast.kernels.relu import relu

SMALL, LARGE = Config({"BT": 16}, 4), Config({"BT": 64}, 4)


@triton.jit(do_not_specialize=["T"])
def product_kernel(y_ptr, x_ptr, w_ptr, T, C: tl.constexpr, WIDE: tl.constexpr, BT: tl.constexpr):
    """y = x @ w. x, y [T, C], w [C, C]."""
    offs_t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    offs_c = tl.arange(0, C)
    at = offs_t[:, None] * C + offs_c[None, :]  # [BT, C]
    mask_t = offs_t[:, None] < T
    x = tl.load(x_ptr + at, mask=mask_t, other=0.0)
    w = tl.load(w_ptr + offs_c[:, None] * C + offs_c[None, :])  # [C, C]
    y = dot(x, w, tl.zeros([BT, C], tl.float32), WIDE)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=mask_t)


@triton.jit
def careless_kernel(y_ptr, x_ptr, T, C: tl.constexpr):
    """Its size is specialised: another number of tokens compiles again."""
    offs_c = tl.arange(0, C)
    tl.store(y_ptr + offs_c, tl.load(x_ptr + offs_c) * T)


@triton.jit
def relu_kernel(y_ptr, x_ptr, C: tl.constexpr):
    offs_c = tl.arange(0, C)
    tl.store(y_ptr + offs_c, relu(tl.load(x_ptr + offs_c)))


def product(
    y: torch.Tensor, x: torch.Tensor, w: torch.Tensor, config: Config = SMALL, wide: bool = False
) -> Launch:
    T, C = x.shape
    args = {"y_ptr": y, "x_ptr": x, "w_ptr": w, "T": T}
    grid = (cdiv(T, config.tiles["BT"]),)
    return Launch(product_kernel, grid, args, {"C": C, "WIDE": wide}, config)


def on_meta(T: int, C: int, dtype: torch.dtype, config: Config = SMALL) -> Launch:
    x, w = (torch.empty(n, C, dtype=dtype, device="meta") for n in (T, C))
    return product(torch.empty_like(x), x, w, config)


def careless(T: int) -> Launch:
    x = torch.empty(64, device="meta")
    args = {"y_ptr": x, "x_ptr": x, "T": T}
    return Launch(careless_kernel, (1,), args, {"C": 64}, Config({}, 1))
