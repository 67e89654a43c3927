"""What NVRTC makes of every CUDA kernel, for cards that are not there.

    python -m evit_fast.cuda.compiled --op cga --arch 70,90 --dtype float16 [--write]

Registers, stack and spills are what the compiler reports, threads and shared memory what the launch
asks for, blocks what of them an SM runs at once (occupancy.py). `compiled.csv` keeps the numbers of
one NVRTC; tests/cuda/test_compiled.py fails when they drift.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import importlib
import itertools
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError
from importlib.metadata import version as package_version
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from evit_fast import compiled_table, nvrtc
from evit_fast.config import VARIANTS, resolve
from evit_fast.cuda.kernels import KINDS, NUMBERS, Kernel, Launch, family
from evit_fast.cuda.launch_shapes import LaunchShape, compile_kernel, launch_shapes, named_sizes
from evit_fast.cuda.occupancy import CARDS, blocks_per_sm
from evit_fast.model_ops import meta_maps, meta_space, meta_weights, model_ops
from evit_fast.ops import OPS
from evit_fast.ops.line import LineShape, dtype_name
from evit_fast.ops.line import words as words_of

ARCHS = tuple(CARDS)
DTYPES = tuple(NUMBERS)
BATCHES = (1, 2048)  # at 224 pixels: few tokens, many
TABLE = Path(__file__).with_suffix(".csv")
KEY = ("op", "stage", "shape", "batch", "dtype", "arch", "config")
VALUES = ("registers", "shared_bytes", "threads", "blocks", "cubin_bytes")
KIND_NAMES = {str(kind): dtype_name(dtype) for dtype, kind in KINDS.items()}


class Resources(NamedTuple):
    """What one kernel takes. stack, spills: bytes a thread; blocks: on an SM at once."""

    registers: int
    stack: int
    spills: int
    shared_bytes: int
    threads: int
    blocks: int
    cubin_bytes: int
    seconds: float = 0.0  # of compilation


class Special(NamedTuple):
    """One binary, and the first shape, map and batch that lead to it."""

    kernel: Kernel
    shape: LineShape
    side: int  # of the input map
    batch: int


def column(op: str) -> ModuleType:
    """The module of an op in the CUDA column."""
    return importlib.import_module(f"evit_fast.cuda.{op}")


@cache
def packed(s: LineShape, dtype: torch.dtype, tiles: int) -> Any:
    return column(s.op).prepare(meta_weights(s, dtype), s, dtype, tiles)


def plan(
    s: LineShape,
    dtype: torch.dtype,
    B: int,
    H: int,
    W: int,
    arch: int,
    x_dtype: torch.dtype | None = None,
    **options: Any,
) -> list[Launch]:
    """The launches of one call, on meta tensors. x_dtype: see meta_maps. ValueError: the op does
    not run so.
    """
    op = column(s.op)
    if why := op.supports(s, dtype, arch):
        raise ValueError(why)
    y, x = meta_maps(s, dtype, B, H, W, x_dtype)
    space = meta_space(op.scratch(s, dtype, B, H, W))
    return op.plan(y, x, packed(s, dtype, family(arch, dtype)), s, space, arch=arch, **options)


def runs(dtype: torch.dtype, arch: int) -> bool:
    return dtype != torch.bfloat16 or arch >= 80


@cache
def binaries(
    op: str, dtype: torch.dtype, arch: int, models: tuple[str, ...] = tuple(VARIANTS)
) -> tuple[Special, ...]:
    """Every kernel of the models at 224 pixels and BATCHES, with its op's dtype inside and out;
    stems for uint8 pixels too.
    """
    found: dict[Kernel, Special] = {}
    shapes = [o for m in models for o in model_ops(resolve(m)) if o[0].op == op]
    x_dtypes = (dtype, torch.uint8)[: 2 if op == "stem" else 1]
    calls = itertools.product(dict.fromkeys(shapes), x_dtypes, (False, True), BATCHES)
    for (s, side), x_dtype, deterministic, B in calls:
        for launch in plan(s, dtype, B, side, side, arch, x_dtype, deterministic=deterministic):
            found.setdefault(launch.kernel, Special(launch.kernel, s, side, B))
    return tuple(found.values())


def row_key(special: Special, dtype: torch.dtype, arch: int) -> tuple[str, ...]:
    """What names a row of the table: the fields of KEY as text."""
    kernel, s, _, batch = special
    fields = words_of(s.line())[1]
    fields.pop("at")
    sizes = {name: v for name, v in named_sizes(kernel).items() if name not in fields}
    sizes |= {name: KIND_NAMES[v] for name, v in sizes.items() if name.endswith("_kind")}
    shape, config = (" ".join(f"{k}={v}" for k, v in d.items()) for d in (fields, sizes))
    return kernel.op, kernel.stage, shape, str(batch), dtype_name(dtype), str(arch), config


def row_values(r: Resources) -> tuple[str, ...]:
    return tuple(str(getattr(r, name)) for name in VALUES)


def read_table(path: Path = TABLE) -> tuple[str, compiled_table.Rows]:
    """(NVRTC's version, {row key: values}) of a committed table; ("", {}) where there is none."""
    return compiled_table.read(path, KEY)


def write_table(
    rows: Mapping[tuple[str, ...], tuple[str, ...]], asked: set[tuple], path: Path = TABLE
) -> None:
    """Replaces the rows of every (op, dtype, arch) in `asked`, or all of another NVRTC."""
    known_version, known = read_table(path)
    if known_version == version():
        kept = {key: v for key, v in known.items() if (key[0], key[4], key[5]) not in asked}
        rows = {**kept, **rows}
    compiled_table.write(path, KEY, VALUES, f"nvrtc {version()}", rows)


@cache
def version() -> str:
    """Of the NVRTC that compiles here: the wheel's "12.9.86", or "12.9" of another."""
    library = nvrtc.find(ARCHS[0])
    if "/nvidia/cuda_nvrtc/" in library.path:
        try:
            return package_version(nvrtc.WHEEL)
        except PackageNotFoundError:  # unpacked by hand
            pass
    return library.version


def compile_special(special: Special, arch: int, shape: LaunchShape) -> Resources:
    start = time.perf_counter()
    cubin = compile_kernel(special.kernel, arch)
    r = cubin.resources[special.kernel.name]
    shared_bytes = shape.shared_bytes + r.shared_bytes
    blocks = blocks_per_sm(arch, r.registers, shared_bytes, shape.threads)
    return Resources(
        r.registers, r.stack_bytes, r.spill_bytes, shared_bytes, shape.threads, blocks,
        len(cubin.code), time.perf_counter() - start,
    )  # fmt: skip


def measure(
    jobs: Iterable[tuple[str, torch.dtype, int]],
    workers: int,
    models: tuple[str, ...] = tuple(VARIANTS),
) -> Iterator[tuple[tuple[str, ...], Resources | str]]:
    """(row key, Resources or why it does not compile) of every binary of (op, dtype, arch), in
    threads: NVRTC takes them.
    """
    wanted = [
        (special, dtype, arch)
        for op, dtype, arch in jobs
        if runs(dtype, arch)
        for special in binaries(op, dtype, arch, models)
    ]
    shapes = launch_shapes([(b.kernel, b.batch, b.side, b.side) for b, _, _ in wanted])

    def one(i: int) -> tuple[tuple[str, ...], Resources | str]:
        special, dtype, arch = wanted[i]
        key = row_key(special, dtype, arch)
        try:
            return key, compile_special(special, arch, shapes[i])
        except nvrtc.CompileError as e:  # a finding; the others go on
            return key, str(e)

    with concurrent.futures.ThreadPoolExecutor(workers) as pool:
        running = [pool.submit(one, i) for i in range(len(wanted))]
        for done in concurrent.futures.as_completed(running):
            yield done.result()


def faults(key: tuple[str, ...], r: Resources) -> list[str]:
    """What no shipped kernel may do, in words."""
    limit, found = CARDS[int(key[KEY.index("arch")])].shared_limit, []
    if r.stack or r.spills:
        found.append(f"{r.stack} bytes of stack, {r.spills} bytes spilled")
    if r.shared_bytes > limit:
        found.append(f"{r.shared_bytes} bytes of shared memory, {limit} at most")
    elif not r.blocks:
        found.append(f"{r.threads} threads of {r.registers} registers fit on no SM")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", default=",".join(OPS), help="comma list (all)")
    parser.add_argument("--dtype", default=",".join(map(dtype_name, DTYPES)), help="list (all)")
    parser.add_argument("--arch", default=",".join(map(str, ARCHS)), help="comma list (all)")
    parser.add_argument("--write", action="store_true", help=f"write their rows of {TABLE.name}")
    parser.add_argument("-j", type=int, default=os.cpu_count(), help="threads (one per CPU)")
    args = parser.parse_args(argv)
    jobs = [
        (op, getattr(torch, dtype), int(arch))
        for op in args.op.split(",")
        for dtype in args.dtype.split(",")
        for arch in args.arch.split(",")
    ]
    rows, bad = {}, 0
    for key, r in measure(jobs, args.j):
        wrong = [r] if isinstance(r, str) else faults(key, r)
        bad += bool(wrong)
        numbers = ""
        if not isinstance(r, str):
            rows[key] = row_values(r)
            numbers = (
                f"{r.registers:>3} regs {r.stack:>4} stack {r.spills:>4} spills "
                f"{r.shared_bytes / 1024:>5.1f} KiB {r.threads:>4} threads {r.blocks:>2} blocks "
                f"{r.cubin_bytes:>6} bytes {r.seconds:.1f} s"
            )
        name = "{} {} {}  B={}  {} sm_{}  {}".format(*key)
        print(f"{name}  {numbers}{'  WRONG: ' + '; '.join(wrong) if wrong else ''}", flush=True)
    print(f"{len(rows)} kernels, {bad} wrong")
    if args.write and not bad:
        write_table(rows, {(op, dtype_name(dtype), str(arch)) for op, dtype, arch in jobs})
    elif args.write:
        print(f"{TABLE.name} is as it was: it holds only kernels without a fault")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
