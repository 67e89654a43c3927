"""CUDA C++ or Triton: which of the two runs an op from sm_80 on, where both can.

A committed row names the faster one on a card, by architecture and op with its sizes and dtype
(batches 1 and 64 of 224 x 224 pixels, geometric mean of the times): never by batch, so that a
result does not depend on it. What `evit-fast tune` measured on this machine comes first. Below
sm_80 Triton has no tensor cores to use and CUDA runs everything.
"""

from __future__ import annotations

from collections.abc import Mapping

from evit_fast import program as programs
from evit_fast import tuned

BOTH_FROM = 80
DEFAULT = "triton"  # the column that was on a card first; no card has compared the two yet
# Architecture -> {"cga C=192 heads=3 dk=16 window=7 ks=7,5,3 dtype=float16": "cuda", ..}
MEASURED: Mapping[int, Mapping[str, str]] = {}


def sizes(op: programs.Op) -> str:
    """An op as the table names it: its line without the place of its weights."""
    return op.line[: op.line.rindex(" at=")]


def column(op: programs.Op, arch: int) -> str:
    """ "cuda" or "triton"."""
    return _choice(op, arch)[0]


def note(op: programs.Op, arch: int) -> str:
    """What explain() says of the choice; "" where it was measured on this architecture."""
    return _choice(op, arch)[1]


def _choice(op: programs.Op, arch: int) -> tuple[str, str]:
    if arch < BOTH_FROM:
        return "cuda", ""
    if found := tuned.row("cuda", op.name, arch, sizes(op)):
        return ("cuda" if found["cuda_ns"] < found["triton_ns"] else "triton"), ""
    rows = max((a for a in MEASURED if a <= arch and sizes(op) in MEASURED[a]), default=None)
    if rows is None:
        return DEFAULT, f"cuda and triton were not compared on sm_{arch}: evit-fast tune does"
    return MEASURED[rows][sizes(op)], "" if rows == arch else f"sm_{rows} chose for sm_{arch}"
