"""Grid, threads and shared memory of launches, as the constexpr functions of csrc/cuda state them.

NVRTC evaluates them: they become a table in a cubin, which is read from the file. Nothing runs.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from evit_fast import nvrtc
from evit_fast.cuda.kernels import Kernel
from evit_fast.cuda.sources import OPTIONS, texts

LAYOUT = struct.Struct("<qqiiii")  # LaunchShape and four bytes of padding
SYMBOL = "evit_shapes"


class LaunchShape(NamedTuple):
    blocks_x: int
    blocks_y: int
    threads: int
    shared_bytes: int


def compile_kernel(kernel: Kernel, arch: int) -> nvrtc.Cubin:
    return nvrtc.compile(kernel.source, f"{kernel.name}.cu", arch, OPTIONS, texts())


def launch_shapes(calls: Sequence[tuple[Kernel, int, int, int]]) -> list[LaunchShape]:
    """The shape of every (kernel, B, H, W)."""
    if not calls:
        return []
    lines = [
        f"{k.name}_launch({camel(k.op)}Sizes{{{', '.join(map(str, k.sizes))}}}, {k.family}, "
        f"{B}, {H}, {W}),"
        for k, B, H, W in calls
    ]
    includes = [f'#include "{op}.cuh"' for op in sorted({k.op for k, *_ in calls})]
    source = "\n".join(
        [
            *includes,
            "using namespace evit::cuda;",
            f'extern "C" __device__ LaunchShape {SYMBOL}[] = {{',
            *lines,
            "};",
            # What nothing reads is left out of the cubin.
            'extern "C" __global__ void read(LaunchShape* to, int i) {',
            f"  to[0] = {SYMBOL}[i];",
            "}",
        ]
    )
    cubin = nvrtc.compile(source, "launch_shapes.cu", 80, OPTIONS, texts())
    table = symbol_bytes(cubin.code, SYMBOL)
    return [LaunchShape(*row[:4]) for row in LAYOUT.iter_unpack(table)]


def camel(op: str) -> str:
    return "".join(word.capitalize() for word in op.split("_"))


@cache
def size_names(op: str) -> tuple[str, ...]:
    """Names of the fields of <Op>Sizes, in order; the last may be an array."""
    body = re.search(rf"struct {camel(op)}Sizes {{(.*?)}};", "".join(texts().values()), re.S)[1]
    body = re.sub(r"//.*", "", body)
    fields = ",".join(re.findall(r"int ([^;]*);", body))
    return tuple(re.findall(r"(\w+)(?:\[\w+\])?\s*(?:,|$)", fields))


def named_sizes(kernel: Kernel) -> dict[str, str]:
    """{field of <Op>Sizes: value}; an array's numbers with commas between."""
    names = size_names(kernel.op)
    *values, rest = [*kernel.sizes[: len(names) - 1], kernel.sizes[len(names) - 1 :]]
    return dict(zip(names, [*map(str, values), ",".join(map(str, rest))], strict=True))


def symbol_bytes(elf: bytes, name: str) -> bytes:
    """What a symbol of a 64-bit ELF file holds."""
    sections = elf_sections(elf)
    for kind, offset, size, link, _ in sections.values():
        if kind != 2:  # SHT_SYMTAB
            continue
        strings = list(sections.values())[link][1]
        for at in range(offset, offset + size, 24):
            text, _, _, section, value, length = struct.unpack_from("<IBBHQQ", elf, at)
            end = elf.index(b"\0", strings + text)
            if elf[strings + text : end].decode() == name:
                start = list(sections.values())[section][1] + value
                return elf[start : start + length]
    raise RuntimeError(f"cuda: the cubin has no symbol {name}")


def elf_sections(elf: bytes) -> dict[str, tuple[int, int, int, int, int]]:
    """(type, offset, size, link, info) of every section, by name, in order."""
    (at,) = struct.unpack_from("<Q", elf, 0x28)
    each, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    raw = [struct.unpack_from("<IIQQQQII", elf, at + i * each) for i in range(count)]
    strings = raw[names][4]
    found = {}
    for i, (text, kind, _, _, offset, size, link, info) in enumerate(raw):
        end = elf.index(b"\0", strings + text)
        key = elf[strings + text : end].decode() or f"#{i}"
        found[key if key not in found else f"{key}#{i}"] = (kind, offset, size, link, info)
    return found
