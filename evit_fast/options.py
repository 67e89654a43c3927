"""What a user may choose about a run; checked once, the same for `accelerate` and `load`."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch

from evit_fast.columns import BACKENDS, MAX_THREADS, choose

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
        if self.graphs:
            raise NotImplementedError(
                "graphs=True: CUDA graphs need a CUDA column, which this version does not have; "
                "leave graphs at None"
            )

    def check(self, program: str, device: torch.device) -> None:
        """Raises where the program cannot run on the device as asked; with strict, where it would
        fall back.
        """
        column, why = choose(program, device.type, self.backend)
        if self.strict and column == "reference" and self.backend != "reference":
            raise NotImplementedError(
                f"strict=True: only the reference column can run this here ({why}); "
                "use strict=False to accept it"
            )
