"""The second half of `evit-fast tune`: CUDA C++ against Triton, per op and sizes, on this card."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from evit_fast.cli.tune import Case

BETWEEN_COLUMNS = 2  # times the rounding of one: each may be off in its own direction


class Choice(NamedTuple):
    """One op with its sizes in both columns: geometric means over the batches. refused: why CUDA is
    out; "" where it was measured.
    """

    op: str
    sizes: str
    cuda_us: float
    triton_us: float
    refused: str

    def __str__(self) -> str:
        if self.refused:
            return f"{self.sizes}: triton ({self.refused})"
        faster = "cuda" if self.cuda_us < self.triton_us else "triton"
        return f"{self.sizes}: {faster} (cuda {self.cuda_us:.1f}, triton {self.triton_us:.1f} us)"

    @property
    def row(self) -> dict[str, Any] | None:
        """For tuned.remember, None where there is nothing to remember."""
        if self.refused:
            return None
        times = {"cuda_ns": self.cuda_us, "triton_ns": self.triton_us}
        return {"tiles": {}, **{name: round(1000 * us) for name, us in times.items()}}


def compare(cases: Sequence[Case], card: Any, bound: float) -> Iterator[Choice]:
    """Both columns with the rows that forwards use now. bound: of the relative distance that
    rounding explains; card: see tune.search.
    """
    groups: dict[tuple[str, str], list[Case]] = {}
    for case in cases:
        if case.sizes:
            groups.setdefault((case.op, case.sizes), []).append(case)
    for (op, sizes), group in groups.items():
        refused = next((case.without_cuda for case in group if case.without_cuda), "")
        logs: list[list[float]] = []
        for case in group if not refused else ():
            try:
                logs.append([math.log(us) for us in _times_us(case, card, bound)])
            except Exception as e:  # a kernel that does not compile or run
                refused = f"{type(e).__name__}: {' '.join(str(e).split())[:120]}"
                break
        means = [math.exp(statistics.fmean(of)) for of in zip(*logs, strict=True)] or [0.0, 0.0]
        yield Choice(op, sizes, *means, refused)


def _times_us(case: Case, card: Any, bound: float) -> list[float]:
    """[cuda, triton]. ValueError: they differ by more than rounding explains."""
    from evit_fast.cli.tune import _distance

    triton, cuda = case.plan(), case.cuda()
    distance = _distance(card.output(cuda, case.y), card.output(triton, case.y))
    if not distance <= BETWEEN_COLUMNS * bound:
        raise ValueError(f"its result differs from triton's by {distance:.1g}")
    return card.times_us([cuda, triton])


def rows(choices: Sequence[Choice], arch: int) -> Mapping[tuple[str, str, int, str], Any]:
    """For tuned.remember."""
    return {("cuda", c.op, arch, c.sizes): c.row for c in choices}
