"""What a block of every CUDA kernel does on a V100: v100-counts.csv, which the model reads.

NVRTC compiles for sm_70, nvdisasm shows the code, and volta.py runs three blocks of the grid
through it, at a quarter, a half and three quarters; the row holds their mean.
"""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch

from evit_fast.config import resolve
from evit_fast.cuda import compiled, sass
from evit_fast.cuda.kernels import Launch
from evit_fast.cuda.launch_shapes import compile_kernel, elf_sections, launch_shapes
from evit_fast.model_ops import IMAGE, model_ops
from evit_fast.ops.line import LineShape
from evit_fast.profiles.volta import Block, Machine, Tensor

ARCH, DTYPE = 70, torch.float16
TABLE = Path(__file__).parent / "results" / "v100-counts.csv"
SAMPLES = (0.25, 0.5, 0.75)
# Pipes of an SM by the first part of an instruction's name; what is in none of them only issues.
PIPES = {
    "hmma": ("HMMA",),
    "fma": ("FFMA", "FADD", "FMUL", "IMAD", "HADD2", "HMUL2", "HFMA2"),
    "alu": (
        "IADD3", "LOP3", "ISETP", "SHF", "LEA", "SEL", "FSEL", "FSETP", "FMNMX", "IMNMX", "PRMT",
        "MOV", "CS2R", "IABS", "PLOP3", "P2R", "R2P",
    ),
    "xu": ("MUFU", "F2F", "F2I", "I2F"),
}  # fmt: skip


class Counts(NamedTuple):
    """One launch. Per block, means over the samples: instructions of warps (`longest`: of the
    warp with most), 128-byte passes through shared memory and L1, 32-byte sectors.
    """

    blocks: int  # of the grid
    threads: int
    shared_bytes: int
    registers: int
    dram_bytes: int  # of the tensors that the launch reads and writes, each once
    issued: float
    longest: float
    hmma: float
    fma: float
    alu: float
    xu: float
    shared_waves: float
    least_waves: float
    lines: float
    sectors: float
    distinct: float
    stored: float


class Call(NamedTuple):
    """One launch of one op of a model."""

    op: str
    shape: str
    side: int  # of the op's input map
    step: int
    stage: str

    @property
    def key(self) -> tuple[str, ...]:
        return self.op, self.shape, str(self.side), str(self.step)


def model_shapes(model: str) -> list[tuple[LineShape, int]]:
    """The ops of a model, with the sides of their maps."""
    return list(model_ops(resolve(model)))


def shape_text(s: LineShape) -> str:
    return " ".join(s.line().split(" ")[1:-1])


def launches(s: LineShape, side: int, batch: int) -> list[Launch]:
    return compiled.plan(s, DTYPE, batch, side, side, ARCH)


def count(s: LineShape, side: int, batch: int) -> dict[tuple[str, ...], tuple[str, Counts]]:
    """{(op, shape, side, step): (stage, Counts)} of one op. RuntimeError: no nvdisasm for sm_70."""
    plan = launches(s, side, batch)
    grids = launch_shapes([(one.kernel, one.B, one.H, one.W) for one in plan])
    found = {}
    for step, (launch, grid) in enumerate(zip(plan, grids, strict=True)):
        name, words = launch.kernel.name, _words(launch, plan)
        cubin = compile_kernel(launch.kernel, ARCH)
        code = sass.disassemble(cubin.code, ARCH)
        machine = Machine(
            code, _constants(cubin.code, name), words, grid.threads, grid.shared_bytes
        )
        runs = [machine.run(int(grid.blocks_x * at), int(grid.blocks_y * at)) for at in SAMPLES]
        per_block = {field: _mean(getattr(r, field) for r in runs) for field in _SIMPLE}
        pipes = {pipe: _mean(_executed(r, names) for r in runs) for pipe, names in PIPES.items()}
        counts = Counts(
            blocks=grid.blocks_x * grid.blocks_y,
            threads=grid.threads,
            shared_bytes=grid.shared_bytes,
            registers=cubin.resources[name].registers,
            dram_bytes=sum(w.nbytes for w in words if isinstance(w, Tensor)),
            **per_block,
            **pipes,
        )
        found[Call(s.op, shape_text(s), side, step, launch.kernel.stage).key] = (
            launch.kernel.stage, counts,
        )  # fmt: skip
    return found


_SIMPLE = (
    "issued", "longest", "shared_waves", "least_waves", "lines", "sectors", "distinct", "stored",
)  # fmt: skip


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return round(sum(values) / len(values), 1)


def _executed(block: Block, names: tuple[str, ...]) -> int:
    return sum(n for name, n in block.executed.items() if name.split(".")[0] in names)


def _words(launch: Launch, plan: list[Launch]) -> list[Tensor | int]:
    """The launch's arguments; a tensor's bytes end where another of the op's starts in its memory
    (scratch is one allocation).
    """
    starts: dict[int, set[int]] = {}
    for one in plan:
        for w in one.words:
            if isinstance(w, torch.Tensor):
                starts.setdefault(_memory(w), set()).add(_start(w))
    words: list[Tensor | int] = []
    for i, w in enumerate(launch.words):
        if isinstance(w, torch.Tensor):
            later = [at - _start(w) for at in starts[_memory(w)] if at > _start(w)]
            words.append(Tensor((i + 1) << 36, min([w.numel() * w.itemsize, *later])))
        else:
            words.append(w)
    return words


def _memory(t: torch.Tensor) -> int:
    return t.untyped_storage()._cdata


def _start(t: torch.Tensor) -> int:
    return t.storage_offset() * t.itemsize


def _constants(cubin: bytes, kernel: str) -> dict[int, bytes]:
    """The compiler's own constant banks, by number; bank 0 are the arguments."""
    found = {}
    for section, (_, offset, size, _, _) in elf_sections(cubin).items():
        name, _, owner = section.removeprefix(".nv.constant").partition(".")
        if section.startswith(".nv.constant") and name != "0" and owner in ("", kernel):
            found[int(name)] = cubin[offset : offset + size]
    return found


# --- the table

KEY = ("op", "shape", "side", "step", "batch")


def read(path: Path = TABLE) -> dict[tuple[str, ...], tuple[str, Counts]]:
    """{(op, shape, side, step, batch): (stage, Counts)}; {} where there is no table."""
    if not path.exists():
        return {}
    with open(path, newline="") as f:
        rows = list(csv.DictReader(f))
    integers = Counts._fields[:5]
    return {
        tuple(row[k] for k in KEY): (
            row["stage"],
            Counts(**{k: int(row[k]) if k in integers else float(row[k]) for k in Counts._fields}),
        )
        for row in rows
    }


def write(rows: dict[tuple[str, ...], tuple[str, Counts]], path: Path = TABLE) -> None:
    with open(path, "w", newline="") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow([*KEY, "stage", *Counts._fields])
        for key in sorted(rows):
            stage, counts = rows[key]
            out.writerow([*key, stage, *counts])


def update(models: Iterable[str], batch: int, path: Path = TABLE) -> None:
    """Counts the launches of these models again."""
    rows = read(path)
    shapes = dict.fromkeys(o for m in models for o in model_shapes(m))
    fresh = {}
    for s, side in shapes:
        for key in [k for k in rows if k[:3] == (s.op, shape_text(s), str(side))]:
            if key[4] == str(batch):
                del rows[key]
        fresh |= {(*key, str(batch)): row for key, row in count(s, side, batch).items()}
    write(rows | fresh, path)


__all__ = ["ARCH", "IMAGE", "TABLE", "Call", "Counts", "count", "model_shapes", "read", "update"]
