"""What the kernel files share on the host: a launch as data, and the tables of tiles.

An op's `plan()` says which kernels to launch, on what grid and with which arguments, and touches no
device: `run()` launches it, the compile tests compile it for cards that are not there.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl

from evit_fast import tuned

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as triton reads it: once, at import
MIN_ARCH = 80  # below, tl.dot has no tensor cores: it becomes FMAs that spill

TYPES = {torch.float16: tl.float16, torch.bfloat16: tl.bfloat16, torch.float32: tl.float32}


class Config(NamedTuple):
    """Tiles of one kernel (its own constexprs), warps of one program, stages of its pipelines."""

    tiles: Mapping[str, int]
    num_warps: int
    num_stages: int = 2


class Launch(NamedTuple):
    """One kernel launch. args: tensors and runtime integers, by argument name, in the kernel's
    order; constexprs: the rest of its arguments, without the tiles of `config`.
    """

    kernel: Any  # triton's JITFunction
    grid: tuple[int, ...]
    args: Mapping[str, torch.Tensor | int]
    constexprs: Mapping[str, Any]
    config: Config


class Table:
    """Rows of tiles per architecture and shape class. An architecture without rows uses the nearest
    lower one; a class without a row is an error, not a default. op: whose rows `evit-fast tune` may
    have replaced on this machine.
    """

    def __init__(self, rows: Mapping[int, Mapping[Any, Config]], op: str = "") -> None:
        self.rows, self.op = rows, op
        classes = set().union(*rows.values())
        for arch, found in rows.items():
            if missing := classes - set(found):
                raise ValueError(f"sm_{arch} has no row for {sorted(missing)}; write one")

    def arch(self, arch: int) -> int:
        """The architecture whose rows serve `arch`."""
        return max(a for a in self.rows if a <= arch)

    def row(self, arch: int, key: Any) -> Config:
        """The row tuned on this machine, else the committed one. KeyError: no such shape class."""
        committed = self.rows[self.arch(arch)][key]
        found = tuned.row("triton", self.op, arch, key)
        if found and found.keys() == committed._asdict().keys():
            found = Config(**found)
            return found if found.tiles.keys() == committed.tiles.keys() else committed
        return committed


def run(launches: list[Launch], wrap: Any = lambda kernel: kernel) -> None:
    """Launches them in order on the current stream. `wrap`: torch.library.wrap_triton inside a
    torch.library.triton_op.
    """
    for kernel, grid, args, constexprs, config in launches:
        wrap(kernel)[grid](
            *args.values(),
            **constexprs,
            **config.tiles,
            num_warps=config.num_warps,
            num_stages=config.num_stages,
        )


def launcher(plan: Callable[..., list[Launch]]) -> Callable[..., None]:
    """An op's `launch`: takes what its `plan` takes, and launches that on the current stream."""

    def launch(*args: Any, **options: Any) -> None:
        run(plan(*args, **options))

    return launch


def refusal(dtype: torch.dtype, arch: int) -> str | None:
    """Why no Triton kernel runs in this dtype on this architecture; None where they do."""
    if arch < MIN_ARCH:
        return (
            f"triton: sm_{arch} has no tensor cores that Triton can use, sm_{MIN_ARCH} and newer do"
        )
    if dtype not in TYPES:
        names = ", ".join(str(t).removeprefix("torch.") for t in TYPES)
        return f"triton: the kernels compute in {names}, this op in {str(dtype)[6:]}"
    return None


def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def parts(n: int) -> tuple[int, int]:
    """A width as two powers of two of at least 16, the second 0 where one is enough: 48 = 32 + 16,
    112 = 64 + 64 with the last 16 masked. Padding 80 to 128 instead would cost registers and time.
    """
    first = 1 << (n.bit_length() - 1)
    return (first, 0) if n == first else (first, max(16, triton.next_power_of_2(n - first)))
