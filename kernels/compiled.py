"""What the compiler makes of every kernel, for cards that are not there.

    python -m evit_fast.kernels.compiled --op cga --arch 80,90 --dtype float16 [--write]

A `Launch` is compiled as a launch on a card would compile it: the same signature, constants,
alignments and options, so the same binary. Registers, stack, shared memory and instruction counts
are read from that binary. `compiled.csv` keeps the numbers of one Triton version; the compile tests
fail when they drift.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import importlib
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import compute_cache_key, create_function_from_signature

from evit_fast import compiled_table, tuned
from evit_fast.kernels.launches import INTERPRETED, TYPES, Launch
from evit_fast.model_ops import meta_maps, meta_space, meta_weights, shapes
from evit_fast.ops import OPS
from evit_fast.ops.line import LineShape, dtype_name

ARCHS = (80, 86, 89, 90, 100, 120)
DTYPES = tuple(TYPES)
# Shared memory that one block can have, bytes (CUDA C++ Programming Guide, compute capabilities).
SHARED_LIMIT = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SHARED_LIMIT = {arch: kib << 10 for arch, kib in SHARED_LIMIT.items()}
BATCHES = (1, 8, 64, 2048)  # every shape class that the number of images can lead to
TABLE = Path(__file__).with_suffix(".csv")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Matrix instructions of sm_80, 86, 89, 120 (HMMA), 90 (HGMMA), 100 (UTCHMMA); FFMA is none.
COUNTED = {"mma": r"(?:HMMA|HGMMA|UTC\w*MMA)", "ffma": "FFMA", "local": "(?:LDL|STL)"}


class Resources(NamedTuple):
    """What one compiled kernel uses. stack: bytes a thread; local: loads from and stores to that
    stack, spills among them; mma, ffma: instructions in the code, not executed ones; dots: matrix
    products in what the compiler was given.
    """

    registers: int
    stack: int
    shared_bytes: int
    mma: int
    ffma: int
    local: int
    dots: int
    seconds: float  # of compilation, near 0 when Triton's cache had it

    @property
    def spills(self) -> int:
        return self.local


class Special(NamedTuple):
    """One binary: the launch that needs it, and the first shape, map and batch that lead to it."""

    op: str
    shape: LineShape
    side: int  # of the input map
    batch: int
    step: int  # of the op's launches, from 0
    launch: Launch


@cache
def _backend(arch: int) -> Any:
    if INTERPRETED:
        raise RuntimeError("TRITON_INTERPRET=1 is set, and nothing can be compiled; unset it")
    return make_backend(GPUTarget("cuda", arch, 32))


@cache
def _binder(kernel: Any, arch: int) -> Any:
    return create_function_from_signature(kernel.signature, kernel.params, _backend(arch))


def _bind(launch: Launch, arch: int) -> tuple[dict, dict, list, dict]:
    """As JITFunction.run() does before it looks into its cache. Meta tensors have address 0 plus
    their offset, so they are as aligned as what torch allocates.
    """
    kernel, _, args, constexprs, config = launch
    options = {
        "num_warps": config.num_warps,
        "num_stages": config.num_stages,
        "debug": False,
        "instrumentation_mode": "",
    }
    given = {**constexprs, **config.tiles, **options}
    bound, special, rest = _binder(kernel, arch)(*args.values(), **given)
    return given, bound, special, rest


def cache_key(launch: Launch, arch: int) -> str:
    """Equal for two launches exactly where Triton compiles once for both."""
    _, _, special, options = _bind(launch, arch)
    return f"{launch.kernel.fn.__name__} {compute_cache_key({}, special, options)}"


def compile_launch(launch: Launch, arch: int) -> Resources:
    """Compiles for sm_<arch>, no card needed. Tensors may be on the meta device."""
    given, bound, special, rest = _bind(launch, arch)
    options, signature, constants, attrs = launch.kernel._pack_args(
        _backend(arch), given, bound, special, rest
    )
    start = time.perf_counter()
    built = triton.compile(
        ASTSource(launch.kernel, signature, constants, attrs),
        target=GPUTarget("cuda", arch, 32),
        options=options.__dict__,
    )
    return _resources(built, time.perf_counter() - start)


def _resources(built: Any, seconds: float) -> Resources:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(built.asm["cubin"])
        f.flush()
        usage = _tool("cuobjdump", "--dump-resource-usage", f.name)
        code = _tool("nvdisasm", "-c", f.name)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", usage).groups())
    count = {name: len(re.findall(rf"\b{op}\b", code)) for name, op in COUNTED.items()}
    dots = len(re.findall(r"\btt\.dot\b", built.asm["ttir"]))
    return Resources(registers, stack, built.metadata.shared, **count, dots=dots, seconds=seconds)


def _tool(name: str, *args: str) -> str:
    done = subprocess.run([TOOLS / name, *args], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name} {' '.join(args)}: {done.stderr.strip()}")
    return done.stdout


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
    """The launches of one call, on meta tensors. x_dtype: see meta_maps. options: deterministic,
    config. ValueError: the op does not run so.
    """
    kernels = importlib.import_module(f"evit_fast.kernels.{s.op}")
    if why := kernels.supports(s, dtype, arch):
        raise ValueError(why)
    packed = kernels.prepare(meta_weights(s, dtype), s, dtype)
    y, x = meta_maps(s, dtype, B, H, W, x_dtype)
    space = meta_space(kernels.scratch(s, dtype, B, H, W))
    with tuned.trial({}):  # committed rows, whatever was tuned on this machine
        return kernels.plan(y, x, packed, s, space, arch=arch, **options)


def every_launch(op: str, dtype: torch.dtype, arch: int) -> Iterator[Special]:
    """Every launch of M0 .. M5 at 224 pixels and at every batch of BATCHES, with its op's dtype
    inside and out; stems for uint8 pixels, classifiers without classes too. Many are one binary:
    see `binaries`.
    """
    wanted = shapes(op)
    if op == "classifier":
        wanted += [(dataclasses.replace(s, N=0), side) for s, side in wanted]
    for s, side in wanted:
        for B in BATCHES:
            for deterministic in (False, True):
                for x_dtype in (dtype, torch.uint8)[: 2 if op == "stem" else 1]:
                    launches = plan(
                        s, dtype, B, side, side, arch, x_dtype, deterministic=deterministic
                    )
                    for step, launch in enumerate(launches):
                        yield Special(op, s, side, B, step, launch)


@cache
def binaries(op: str, dtype: torch.dtype, arch: int) -> tuple[Special, ...]:
    """every_launch without those that Triton would not compile again."""
    found: dict[str, Special] = {}
    for special in every_launch(op, dtype, arch):
        found.setdefault(cache_key(special.launch, arch), special)
    return tuple(found.values())


KEY = ("op", "step", "kernel", "shape", "batch", "dtype", "arch", "tiles")
VALUES = ("registers", "shared_bytes", "mma")  # of a cell; the rest must be 0, see `faults`


def row_key(special: Special, dtype: torch.dtype, arch: int) -> tuple[str, ...]:
    """What names a row of the table: the fields of KEY as text."""
    op, s, side, batch, step, (kernel, _, args, _, config) = special
    shape = " ".join(s.line().split(" ")[1:-1]) + f" {side}x{side}"
    if any(t.dtype == torch.uint8 for t in args.values() if isinstance(t, torch.Tensor)):
        shape += " pixels"
    tiles = " ".join(f"{name}={value}" for name, value in config.tiles.items())
    tiles = f"{tiles} warps={config.num_warps} stages={config.num_stages}".strip()
    name = kernel.fn.__name__
    return op, str(step), name, shape, str(batch), dtype_name(dtype), str(arch), tiles


def row_values(r: Resources) -> tuple[str, ...]:
    return tuple(str(getattr(r, name)) for name in VALUES)


def read_table(path: Path = TABLE) -> tuple[str, compiled_table.Rows]:
    """(Triton version, {row key: values}) of a committed table; ("", {}) where there is none."""
    return compiled_table.read(path, KEY)


def write_table(
    rows: Mapping[tuple[str, ...], tuple[str, ...]], asked: set[tuple], path: Path = TABLE
) -> None:
    """Replaces the rows of every (op, dtype, arch) in `asked`, or all of another Triton version."""
    version, known = read_table(path)
    if version == triton.__version__:
        kept = {key: v for key, v in known.items() if (key[0], key[5], key[6]) not in asked}
        rows = {**kept, **rows}
    compiled_table.write(path, KEY, VALUES, f"triton {triton.__version__}", rows)


def _measure(op: str, dtype: torch.dtype, arch: int, i: int) -> tuple[tuple, Resources | str]:
    """One binary, in a worker: launches hold functions and are made again rather than sent."""
    special = binaries(op, dtype, arch)[i]
    key = row_key(special, dtype, arch)
    try:
        return key, compile_launch(special.launch, arch)
    except Exception as e:  # a kernel that does not compile is a finding; the others go on
        return key, f"{type(e).__name__}: {' '.join(str(e).split())[:300]}"


def measure(
    jobs: list[tuple[str, torch.dtype, int]], workers: int
) -> Iterator[tuple[tuple[str, ...], Resources | str]]:
    """(row key, Resources or why it does not compile) of every binary of (op, dtype, arch)."""
    wanted = [(*job, i) for job in jobs for i in range(len(binaries(*job)))]
    if workers == 1:
        yield from (_measure(*job) for job in wanted)
        return
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, context) as pool:
        running = [pool.submit(_measure, *job) for job in wanted]
        for done in concurrent.futures.as_completed(running):
            yield done.result()


def faults(key: tuple[str, ...], r: Resources) -> list[str]:
    """What no shipped kernel may do, in words."""
    limit, found = SHARED_LIMIT[int(key[6])], []
    if r.stack or r.local:
        found.append(f"{r.stack} bytes of stack, {r.local} local loads and stores")
    if r.shared_bytes > limit:
        found.append(f"{r.shared_bytes} bytes of shared memory, {limit} at most")
    if key[5] != "float32" and r.dots and not r.mma:
        found.append(f"{r.dots} matrix products without tensor cores")
    if key[5] == "float32" and r.mma:  # tensor cores know no float32: they round it to TF32
        found.append(f"{r.mma} matrix instructions, which round float32")
    return found


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--op", default=",".join(OPS), help="comma list (all)")
    parser.add_argument("--dtype", default=",".join(map(dtype_name, DTYPES)), help="list (all)")
    parser.add_argument("--arch", default=",".join(map(str, ARCHS)), help="comma list (all)")
    parser.add_argument("--write", action="store_true", help=f"write their rows of {TABLE.name}")
    parser.add_argument("-j", type=int, default=os.cpu_count(), help="processes (one per CPU)")
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
                f"{r.registers:>3} regs {r.stack:>4} stack {r.local:>4} local "
                f"{r.shared_bytes / 1024:>5.1f} KiB {r.mma:>4} mma {r.ffma:>5} ffma "
                f"{r.seconds:.1f} s"
            )
        name = "{} {} {}  {}  B={}  {} sm_{}  {}".format(*key)
        print(f"{name}  {numbers}{'  WRONG: ' + '; '.join(wrong) if wrong else ''}", flush=True)
    print(f"{len(rows)} kernels, {bad} wrong")
    if args.write:
        write_table(rows, {(op, dtype_name(dtype), str(arch)) for op, dtype, arch in jobs})
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
