"""Each Triton op as an op of torch into which torch.compile sees: `evit_fast::triton_cga`, ...

    triton_<op>(Tensor x, Tensor?[] packed, str line, bool deterministic=False, int arch=0)
        -> Tensor

x, y: as in `evit_fast/ops/<op>.py`, y in x's dtype (uint8: float32). packed: what the kernel file's
`prepare()` returned, as a list; line: the program line of the op, which says sizes and dtype. arch:
as two digits, 80; 0: the architecture of x's device. A compiled graph holds the kernels themselves,
where `evit_fast::forward` is one opaque node. Importing this module registers the ops.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch._library.triton import triton_ops_to_kernels
from triton.runtime.jit import JITFunction

from evit_fast import gpu, program
from evit_fast.kernels.launches import run
from evit_fast.ops import OPS

SCHEMA = "(Tensor x, Tensor?[] packed, str line, bool deterministic=False, int arch=0) -> Tensor"


def call(
    x: torch.Tensor,
    packed: Sequence[torch.Tensor | None],
    line: str,
    *,
    deterministic: bool = False,
    arch: int = 0,
) -> torch.Tensor:
    """The op of a program line on x.   packed: of `prepare(w, s, dtype)`."""
    return DEFINED[line.split(" ")[0]](x, list(packed), line, deterministic, arch)


def _run(
    kernels: ModuleType,
    x: torch.Tensor,
    packed: Sequence[torch.Tensor | None],
    line: str,
    deterministic: bool,
    arch: int,
) -> torch.Tensor:
    op = program.parse(line)[0]
    arch = arch or gpu.place(x.device).arch
    if why := kernels.supports(op.shape, op.dtype, arch):
        raise NotImplementedError(why)
    y_shape = program.output_shape(line, x.shape)
    if op.name != "stem":
        x = x.contiguous()
    B, H, W = (x.shape[0], *(x.shape[2:] if op.name == "stem" else x.shape[1:3]))
    y = x.new_empty(y_shape, dtype=x.dtype if x.is_floating_point() else torch.float32)
    nbytes = kernels.scratch(op.shape, op.dtype, B, H, W)
    space = x.new_empty(nbytes, dtype=torch.uint8) if nbytes else None
    launches = kernels.plan(
        y,
        x,
        kernels.Packed(*packed),
        op.shape,
        space,
        arch=arch,
        deterministic=deterministic,
    )
    run(launches, wrap=torch.library.wrap_triton)
    return y


def _define(name: str) -> Any:
    kernels = importlib.import_module(f"evit_fast.kernels.{name}")

    def op(
        x: torch.Tensor,
        packed: Sequence[torch.Tensor | None],
        line: str,
        deterministic: bool = False,
        arch: int = 0,
    ) -> torch.Tensor:
        return _run(kernels, x, packed, line, deterministic, arch)

    full = f"evit_fast::triton_{name}"
    defined = torch.library.triton_op(full, op, mutates_args=(), schema=SCHEMA)
    # torch keys its cache of compiled graphs by the kernels that it finds in the source of `op`,
    # and these are not there: a changed kernel would go on running as it was.
    triton_ops_to_kernels[full] = [k for k in vars(kernels).values() if isinstance(k, JITFunction)]
    return defined


DEFINED = {name: _define(name) for name in OPS}
