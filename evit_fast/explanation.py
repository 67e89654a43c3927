"""Which kernel runs each op, and what rules out a faster one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

from torch import nn

from evit_fast import _native, columns, gpu, walker
from evit_fast import program as programs
from evit_fast.fast import Fused
from evit_fast.ops.line import dtype_name
from evit_fast.saved import Program


@dataclass(frozen=True)
class Row:
    """One line of a program. reason: what rules out a faster kernel; empty where there is none."""

    op: str
    column: str
    kernel: str
    isa: str  # instruction set or architecture
    dtype: str  # in which it computes
    reason: str


@dataclass(frozen=True)
class Explanation:
    """One row per op; str() is the table."""

    rows: tuple[Row, ...]

    def __iter__(self) -> Iterator[Row]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Row:
        return self.rows[index]

    def __str__(self) -> str:
        names = [field.name for field in fields(Row)]
        table = [names, *([getattr(row, name) for name in names] for row in self.rows)]
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ("  ".join(t.ljust(w) for t, w in zip(r, widths, strict=True)) for r in table)
        return "\n".join(line.rstrip() for line in lines)


def explain(model: nn.Module) -> Explanation:
    """What runs `model`, an accelerated one or a Program. ValueError: neither, or one that is
    training.
    """
    if isinstance(model, Program):
        program, blob = model.program, model.blob
    elif isinstance(model, Fused):
        if model.training:
            raise ValueError(
                "explain: the model is in training mode, where the eager modules run; call .eval()"
            )
        folded = model._fresh()
        program, blob = folded.program, folded.blob
    else:
        raise ValueError(
            f"explain: expected an accelerated model or a program, got {type(model).__name__}; "
            "call evit_fast.accelerate(model) first"
        )
    place = gpu.place(blob.device)
    column, why = columns.choose(program, place, model.options.backend)
    ops = programs.parse(program)
    backend = model.options.backend
    if column in ("triton", "cuda") or (place.kind == "cuda" and backend != "reference"):
        notes = walker.failures(blob)
        chosen = walker.columns(program, place, backend)
        rows = (_gpu_row(op, c, place, notes) for op, c in zip(ops, chosen, strict=True))
        return Explanation(tuple(rows))
    if column == "reference":
        return Explanation(tuple(_reference_row(op, why) for op in ops))
    why = why or _isa_reason()
    return Explanation(
        tuple(
            Row(op.line, column, found["kernel"], found["isa"], found["dtype"], why)
            for op, found in zip(ops, _native.describe(program), strict=True)
        )
    )


def _reference_row(op: programs.Op, why: str) -> Row:
    return Row(
        op.line,
        "reference",
        f"evit_fast/ops/{op.name}.py",
        "PyTorch's own",
        dtype_name(op.dtype),
        why,
    )


def _gpu_row(op: programs.Op, column: walker.Column, place: gpu.Place, notes: list[str]) -> Row:
    if column.name == "reference":
        return _reference_row(op, column.reason)
    file, says = f"csrc/cuda/{op.name}.cuh", [column.reason, walker.undecided(op, place)]
    if column.name == "triton":
        file = f"kernels/{op.name}.py"
        rows = walker.kernel(op.name).CONFIGS.arch(place.arch)
        says.append(f"rows of sm_{rows} serve sm_{place.arch}" if rows != place.arch else "")
    return Row(
        op.line,
        column.name,
        f"{file}: " + ", ".join(walker.kernels_of(op, column.name, place.arch)),
        "interpreter" if place.interpreted else f"sm_{place.arch}",
        dtype_name(op.dtype),
        "; ".join(filter(None, [*says, *notes])),
    )


def _isa_reason() -> str:
    """Why the instruction set in use is not a higher one."""
    used, supported = _native.isa(), _native.isas()
    if used != supported[-1]:
        return f"capped below {supported[-1]} by EVIT_FAST_MAX_ISA"
    return "" if used == "avx512" else f"{used} is the highest instruction set of this processor"
