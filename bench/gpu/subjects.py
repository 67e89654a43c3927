"""What the parts run: the fused columns there are, an op or a model in them, and the bounds."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from evit_fast import _native, accelerate, columns, gpu
from evit_fast.bench import runner
from evit_fast.bench.cases import Case, cases
from evit_fast.bench.gpu.card import DTYPES, Card, Ceilings
from evit_fast.bench.gpu.results import Record
from evit_fast.bench.weights import randomize
from evit_fast.model import create_model
from evit_fast.ops import OPS
from evit_fast.ops.line import pack

COLUMNS = ("triton", "cuda")
# Relative L2 error that a dtype may always have; else twice that of plain PyTorch in it.
FLOOR = {torch.float32: 1e-5, torch.float16: 3e-3, torch.bfloat16: 2e-2}
SEED = 0
DRAWN = 64  # images, or token maps: to draw thousands would take longer than to measure


class Step(NamedTuple):
    """run() gives the records of one step; guess_s: how long the first of its kind may take."""

    name: str
    run: Callable[[], list[Record]]
    guess_s: float


@dataclass
class Plan:
    """What was asked for. size: of the images; the dry run has small ones."""

    card: Card
    models: list[str]
    dtypes: list[str]
    batches: list[int]
    peers: list[str]
    repeats: int
    rounds: int
    round_us: float
    size: int
    columns: dict[str, str] = field(default_factory=dict)  # name -> why not; empty: it runs
    ceilings: Ceilings | None = None  # measured once in a process, when first needed

    def live(self) -> list[str]:
        return [name for name, why in self.columns.items() if not why]

    def ops(self) -> Iterator[Case]:
        """Every different shape of the five ops in the models; the dry run: one of each op."""
        for op in OPS:
            found = cases(op, self.models)
            yield from found[:1] if self.card.dry_run else found


def available(card: Card, dtype: str) -> dict[str, str]:
    """Column -> why it cannot run here, empty where it can."""
    line = cases("dw_ffn", ["efficientvit_m0"])[0].shape.line(dtype=DTYPES[dtype])
    found = {}
    for name in COLUMNS:
        try:
            columns.choose(line, gpu.place(card.device), name)
            found[name] = ""
        except NotImplementedError as error:
            found[name] = str(error)
    return found


class OneOp:
    """A program of one line in a column, its weights on the card."""

    def __init__(self, case: Case, dtype: torch.dtype, card: Card) -> None:
        self.dtype = dtype
        self.line = case.shape.line(dtype=dtype)
        self.blob = torch.zeros(_native.op_bytes(self.line), dtype=torch.uint8)
        pack(self.line, case.weights, self.blob)
        self.blob = self.blob.to(card.device)

    def __call__(self, x: torch.Tensor, column: str) -> torch.Tensor:
        """Raw launches. x: NCHW for the stem, else NHWC."""
        settings = columns.Settings(column, graphs=False)
        with torch.inference_mode():
            return columns.forward(x, self.line, self.blob, None, *settings)


def tokens(case: Case, B: int, H: int, W: int, dtype: torch.dtype) -> torch.Tensor:
    """Random input of a case on the CPU, rounded to dtype: NCHW for the stem, else NHWC. Beyond
    DRAWN maps they repeat.
    """
    g, n = torch.Generator().manual_seed(SEED), min(B, DRAWN)
    C = case.shape.channels_in
    size = (n, C, H, W) if case.op == "stem" else (n, H, W, C)
    return torch.randn(size, generator=g).to(dtype).repeat(-(-B // n), 1, 1, 1)[:B]


@lru_cache(maxsize=2)
def eager(model: str, size: int) -> nn.Module:
    """Random weights, float32, on the CPU; not to be changed."""
    return randomize(create_model(model, img_size=size), SEED).eval()


@lru_cache(maxsize=2)
def _drawn(size: int) -> torch.Tensor:
    return runner.images(DRAWN, size, SEED)


def images(batch: int, size: int) -> torch.Tensor:
    """float32 on the CPU, any two batches begin with the same images. Beyond DRAWN they repeat."""
    return _drawn(size).repeat(-(-batch // DRAWN), 1, 1, 1)[:batch]


@lru_cache(maxsize=8)
def expected(model: str, batch: int, size: int, dtype: str) -> np.ndarray:
    """float64 logits of images(batch), rounded to dtype, by the eager model on the CPU."""
    import copy

    wide = copy.deepcopy(eager(model, size)).double()
    with torch.inference_mode():
        return wide(images(batch, size).to(DTYPES[dtype]).double()).numpy()


def fused(model: str, plan: Plan, column: str, dtype: str, **options: Any) -> nn.Module:
    """The accelerated model; options: graphs, deterministic."""
    return accelerate(
        eager(model, plan.size), device=plan.card.device, dtype=DTYPES[dtype], backend=column,
        strict=True, **options,
    )  # fmt: skip


class Verdict(NamedTuple):
    """error: relative L2; worst: largest error over the largest value."""

    error: float
    worst: float
    bound: float

    @property
    def share(self) -> float:
        """Of what is allowed."""
        return max(self.error, self.worst / 20) / self.bound

    @property
    def passed(self) -> bool:
        finite = self.error < float("inf")  # the bound may not be, where PyTorch overflows
        return finite and self.error <= self.bound and self.worst <= 20 * self.bound


def judge(got: Any, want: Any, dtype: torch.dtype, plain: Any) -> Verdict:
    """got against float64; plain: PyTorch's own result in dtype, whose error sets the bound."""
    error, worst = _errors(got, want)
    return Verdict(error, worst, max(2 * _errors(plain, want)[0], FLOOR[dtype]))


def _errors(got: Any, want: Any) -> tuple[float, float]:
    """(relative L2 error, largest error over the largest value); inf where got is not finite."""
    got, want = (
        a.double().cpu().numpy() if isinstance(a, torch.Tensor) else np.asarray(a, np.float64)
        for a in (got, want)
    )  # fmt: skip
    if got.shape != want.shape or not np.isfinite(got).all():
        return float("inf"), float("inf")
    off = got - want
    largest = max(float(np.abs(want).max()), 1e-300)
    norm = max(float(np.linalg.norm(want)), 1e-300)
    return float(np.linalg.norm(off)) / norm, float(np.abs(off).max()) / largest
