"""One op as one line of program text, and its weights as one stretch of the blob.

What a line may say (fields, ranges, how widths must divide) is the native library's grammar table;
nothing here repeats it: a `Shape` writes its line and asks.
"""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar, NamedTuple, TypeVar

import numpy as np
import torch

from evit_fast import _native

ShapeT = TypeVar("ShapeT", bound="LineShape")


@dataclasses.dataclass(frozen=True)
class LineShape:
    """Base of every op's Shape: its fields are the line's, in the grammar's order; `in_` is `in`.

    ValueError when made: a size that the grammar rules out.
    """

    op: ClassVar[str]

    def __post_init__(self) -> None:
        _native.op_bytes(self.line())

    def line(self, at: int = 0, dtype: torch.dtype = torch.float32) -> str:
        """The program line, e.g. `dw_ffn C=192 F=384 at=0`; `at` is the byte offset in the blob."""
        words = [self.op]
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            text = ",".join(map(str, value)) if isinstance(value, tuple) else str(value)
            words.append(f"{field.name.rstrip('_')}={text}")
        if dtype != torch.float32:
            words.append(f"dtype={dtype_name(dtype)}")
        return " ".join([*words, f"at={at}"])

    @classmethod
    def parse(cls: type[ShapeT], line: str) -> ShapeT:
        """The Shape that a line states. ValueError: the line is not a legal line of this op."""
        _native.op_bytes(line)
        name, values = words(line)
        if name != cls.op:
            raise ValueError(f"{cls.op}: expected a line of this op, got {line!r}")
        fields = [field.name for field in dataclasses.fields(cls)]
        is_list = {field["name"]: field["list"] for field in _native.grammar()[name]}
        read = {name: values[name.rstrip("_")] for name in fields}
        return cls(
            **{
                name: tuple(map(int, text.split(","))) if is_list[name.rstrip("_")] else int(text)
                for name, text in read.items()
            }
        )


def words(line: str) -> tuple[str, dict[str, str]]:
    """Name and fields of a verified line, as text."""
    name, *fields = line.split(" ")
    return name, dict(field.split("=", 1) for field in fields)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` for torch.float32: how program lines and the native library name a dtype."""
    return str(dtype).removeprefix("torch.")


def arrays(w: NamedTuple) -> dict[str, np.ndarray]:
    """Weights as the native packer wants them: section name -> float64, C-contiguous.

    A tuple of arrays `qkv` becomes qkv0, qkv1, ...; what is None is left out.
    """
    found: dict[str, Any] = {}
    for name, value in w._asdict().items():
        if isinstance(value, tuple):
            found.update({f"{name}{i}": item for i, item in enumerate(value)})
        elif value is not None:
            found[name] = value
    return {name: _float64(value) for name, value in found.items()}


def pack(line: str, w: NamedTuple, blob: torch.Tensor) -> None:
    """Writes one op's weights (torch or numpy) at the line's `at` of a uint8 CPU blob.

    ValueError names the array that is missing, unknown or of the wrong shape.
    """
    _native.pack(line, arrays(w), blob.numpy())


def run_line(x: torch.Tensor, w: NamedTuple, s: LineShape) -> torch.Tensor:
    """Packs w in x's dtype (uint8: float32) and runs the program of one line: one op alone."""
    import evit_fast.columns  # noqa: F401  (registers the torch op; imports the ops)

    line = s.line(0, x.dtype if x.is_floating_point() else torch.float32)
    blob = torch.zeros(_native.op_bytes(line), dtype=torch.uint8)
    pack(line, w, blob)
    return torch.ops.evit_fast.forward(x, line, blob.to(x.device))


def _float64(value: Any) -> np.ndarray:
    if isinstance(value, torch.Tensor):
        value = value.detach().to("cpu", torch.float64).numpy()
    return np.ascontiguousarray(value, dtype=np.float64)
