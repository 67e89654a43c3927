"""What a user may choose about a run; checked once, the same for `accelerate` and `load`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from evit_fast import gpu, walker
from evit_fast.columns import BACKENDS, MAX_THREADS, Settings, choose

COMPUTE = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Options:
    """dtype: what the program computes in, None = the weights' own. threads: None follows torch at
    each call.
    """

    dtype: torch.dtype | None = None
    backend: str = "auto"
    strict: bool = False
    threads: int | None = None
    graphs: bool | None = None
    deterministic: bool = False
    calibration: Iterable[Any] | None = None

    def __post_init__(self) -> None:
        if self.backend not in BACKENDS:
            raise ValueError(
                f"backend: expected one of {', '.join(BACKENDS)}, got {self.backend!r}"
            )
        if self.dtype == torch.int8:
            if self.calibration is None:
                raise ValueError(
                    "dtype=torch.int8 needs calibration=, an iterable of batches of images"
                )
            raise NotImplementedError(
                "dtype=torch.int8: this version has no int8 kernels; use torch.float32"
            )
        if self.dtype is not None and self.dtype not in COMPUTE:
            names = ", ".join(str(d) for d in COMPUTE)
            raise ValueError(f"dtype: expected None or one of {names}, got {self.dtype!r}")
        if self.calibration is not None:
            raise ValueError("calibration= is for dtype=torch.int8 only; leave it out")
        whole = isinstance(self.threads, int) and not isinstance(self.threads, bool)
        if self.threads is not None and not (whole and 1 <= self.threads <= MAX_THREADS):
            raise ValueError(f"threads: expected None or 1 to {MAX_THREADS}, got {self.threads!r}")
        if self.graphs is not None and not isinstance(self.graphs, bool):
            raise ValueError(f"graphs: expected None, True or False, got {self.graphs!r}")

    @property
    def settings(self) -> Settings:
        """The last arguments of the op."""
        return Settings(self.backend, self.threads or 0, self.graphs, bool(self.deterministic))

    def prepare(self, program: str, blob: torch.Tensor) -> None:
        """Puts the weights where the program reads them.

        Raises where it cannot run on the blob's device as asked; with strict, where it or an op of
        it would fall back.
        """
        place = gpu.place(blob.device)
        column, why = choose(program, place, self.backend)
        if self.strict and why and self.backend != "reference":
            raise NotImplementedError(
                f"strict=True: only the reference column can run this here ({why}); "
                "use strict=False to accept it"
            )
        if self.graphs and (column not in ("triton", "cuda") or place.kind != "cuda"):
            raise NotImplementedError(
                f"graphs=True: CUDA graphs need a kernel column on a CUDA device, but the {column} "
                f"column runs this on {blob.device}; leave graphs at None"
            )
        if self.deterministic and place.kind != "cpu" and why:
            raise NotImplementedError(
                f"deterministic=True: only the reference column can run this here ({why}), which "
                f"promises no such thing on {blob.device}; use deterministic=False"
            )
        if column in ("triton", "cuda"):
            walker.upload(program, blob, place, self.backend)
