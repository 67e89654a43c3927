"""The program: text, one line per op. Parsing, slicing, shapes, and running it in plain PyTorch.

A program holds no batch, height or width. A contiguous run of its lines is a program too, over the
same blob.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from evit_fast import _native
from evit_fast.ops import OPS
from evit_fast.ops.line import LineShape, words

ANY_BLOB = -1  # length of a blob that is not there yet: the native check skips it


@dataclass(frozen=True)
class Op:
    """One line. `at`: byte offset of its weights in the blob; `dtype`: how they are stored."""

    name: str
    shape: LineShape
    dtype: torch.dtype
    at: int
    line: str


@lru_cache(maxsize=256)
def parse(program: str) -> tuple[Op, ...]:
    """The ops of a program. ValueError: one sentence with the line and the fact."""
    _native.verify(program, ANY_BLOB)
    return tuple(_op(line) for line in program.split("\n"))


def slice_(program: str, start: int, stop: int | None = None) -> str:
    """Lines start..stop (Python's rules) as a program over the same blob. ValueError: none left."""
    lines = program.split("\n")[start:stop]
    if not lines:
        raise ValueError(f"program: lines {start}..{stop} are empty; expected at least one line")
    return "\n".join(lines)


def walk(program: str, x_shape: Sequence[int]) -> Iterator[tuple[Op, tuple, tuple]]:
    """(op, shape of its input, shape of its output) for each line.

    x_shape: NCHW when the program starts with the stem, else NHWC; its entries may be symbolic.
    Shapes after the first are NHWC, the classifier's output is [B, N] or [B, C].
    ValueError: the shape does not fit the program.
    """
    ops = parse(program)
    planar = ops[0].name == "stem"
    order = "[B, C, H, W]" if planar else "[B, H, W, C]"
    if len(x_shape) != 4:
        raise ValueError(f"{ops[0].name}: expected x {order}, but it has {len(x_shape)} dimensions")
    channels, wanted = x_shape[1 if planar else 3], ops[0].shape.channels_in
    if channels != wanted:
        raise ValueError(f"{ops[0].name}: expected x {order} with C={wanted}, but C={channels}")
    shape = tuple(x_shape)
    for op in ops:
        H, W = shape[2:4] if op.name == "stem" else shape[1:3]
        if H < 1 or W < 1:
            raise ValueError(f"{op.name}: expected a map of at least 1x1, but x is {H}x{W}")
        out = (shape[0], *OPS[op.name].out_hw(H, W), op.shape.channels_out)
        yield op, shape, out
        shape = out


def output_shape(program: str, x_shape: Sequence[int]) -> tuple:
    """Shape of the output: NHWC, or [B, N] (N=0: [B, C]) after a classifier. See walk()."""
    *_, (_, _, out) = walk(program, x_shape)
    return out


def unpack(op: Op, blob: torch.Tensor, keep: bool = True) -> NamedTuple:
    """The op's Weights in their natural layout, on the blob's device, in the dtypes of the file.

    A permuted copy; with `keep` it lives until the blob dies or is written to. blob: uint8 [bytes],
    contiguous.
    """
    if not keep or blob.is_inference():  # inference: no version counter would show a later write
        return _unpack(op, blob)
    version, known = _unpacked.get(blob, (None, None))
    if version != blob._version:
        known = {}
        _unpacked[blob] = (blob._version, known)
    if op.line not in known:
        known[op.line] = _unpack(op, blob)
    return known[op.line]


def map_arrays(weights: NamedTuple, fn: Callable[[Any], Any]) -> NamedTuple:
    """fn of every array of an op's Weights; None stays."""

    def each(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(fn, value))
        return None if value is None else fn(value)

    return type(weights)(*map(each, weights))


@torch.no_grad()
def run_reference(x: torch.Tensor, program: str, blob: torch.Tensor) -> torch.Tensor:
    """Runs a program by the ops' references, any device. Autocast changes nothing.

    x: NCHW for the stem (uint8 pixels or normalised floats), else NHWC. Returns contiguous NHWC or
    [B, N], in x's dtype (uint8: float32). Between ops the map has the op's dtype; inside one,
    arithmetic is float32 (float64 in a float64 program).
    ValueError: x, program and blob do not fit together.
    """
    _check_x(program, blob, x)
    output_shape(program, x.shape)
    out_dtype = x.dtype if x.is_floating_point() else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        for op in parse(program):
            wide = torch.promote_types(op.dtype, torch.float32)
            if x.is_floating_point():
                x = x.to(op.dtype).to(wide)
            weights = map_arrays(unpack(op, blob), lambda t, wide=wide: t.to(wide))
            x = OPS[op.name].reference(x, weights, op.shape).to(op.dtype)
        return x.to(out_dtype).contiguous()


_unpacked = WeakTensorKeyDictionary()  # blob -> (its version, {line: Weights})


def _op(line: str) -> Op:
    name, fields = words(line)
    dtype = getattr(torch, fields.get("dtype", "float32"))
    return Op(name, OPS[name].parse(line), dtype, int(fields["at"]), line)


@lru_cache(maxsize=256)
def _verify(program: str, blob_bytes: int) -> None:
    _native.verify(program, blob_bytes)


def check_blob(program: str, blob: torch.Tensor) -> None:
    """ValueError: the blob cannot hold the weights of the program."""
    if blob.dtype != torch.uint8 or blob.dim() != 1 or not blob.is_contiguous():
        shape = tuple(blob.shape)
        raise ValueError(f"expected a contiguous blob of uint8 [bytes], got {blob.dtype} {shape}")
    _verify(program, blob.numel())


def _check_x(program: str, blob: torch.Tensor, x: torch.Tensor) -> None:
    check_blob(program, blob)
    if blob.device != x.device:
        raise ValueError(f"x is on {x.device}, the weights on {blob.device}; move one of them")
    stem_first = program.startswith("stem ")
    if not x.is_floating_point() and not (stem_first and x.dtype == torch.uint8):
        wanted = "floating point or uint8 pixels" if stem_first else "floating point"
        raise ValueError(f"expected x of {wanted}, but it is {x.dtype}; convert it first")


def _unpack(op: Op, blob: torch.Tensor) -> NamedTuple:
    sections = {}
    for section in _native.layout(op.line):
        start = op.at + section["offset"]
        flat = blob[start : start + section["bytes"]].view(getattr(torch, section["dtype"]))
        natural = _NATURAL[section["kind"]](flat, *section["dims"])  # often a view of the blob
        sections[section["name"]] = natural.clone(memory_format=torch.contiguous_format)
    weights = OPS[op.name].Weights
    fields = {}
    for name in weights._fields:
        if name in sections:
            fields[name] = sections[name]
        elif f"{name}0" in sections:
            fields[name] = tuple(sections[f"{name}{i}"] for i in range(op.shape.heads))
    return weights(**fields)


def _rows(flat: torch.Tensor, n: int, width: int) -> torch.Tensor:
    """[n/width][K][width], n rounded up -> [n, K]."""
    return flat.view(-(-n // width), -1, width).mT.flatten(0, 1)[:n]


def _planar(flat: torch.Tensor, o: int, i: int, kh: int, kw: int, width: int = 16) -> torch.Tensor:
    """Columns (dy, channel, dx) -> OIHW."""
    return _rows(flat, o, width).view(o, kh, i, kw).transpose(1, 2)


# How each kind of section is packed, undone: (flat elements, natural dims) -> natural array.
_NATURAL = {
    "panel": lambda flat, n, k: _rows(flat, n, 16),
    "conv_planar": _planar,
    "conv_nhwc": lambda flat, o, i, kh, kw: (
        _rows(flat, o, 16).view(o, kh, kw, i).permute(0, 3, 1, 2)  # columns (dy, dx, channel)
    ),
    "conv_first": lambda flat, o, i, kh, kw: _planar(flat, o, i, kh, kw, width=8),
    "depthwise": lambda flat, c, kh, kw: _rows(flat, c, 16).view(c, kh, kw),
    "vector": lambda flat, n: flat[:n],
    "scores": lambda flat, s, _: flat.view(s, -1)[:, :s].T,
}
