"""Counts the memory traffic of every op and shape; writes profiles/results/emulator-sectors.csv.

python -m tests.emulator.sectors [--models M0,M5] [--batch 16] [--arch 70,80] [--out FILE]
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Iterator
from pathlib import Path

import torch

from evit_fast.fragments import family
from evit_fast.ops import OPS
from tests.emulator.cases import plan
from tests.emulator.counting import count
from tests.native_build import ROOT
from tests.ops.eager import Case, cases

RESULT = ROOT / "profiles/results/emulator-sectors.csv"
DTYPE = torch.float16


def row(case: Case, batch: int, arch: int) -> dict[str, object]:
    """One op at its map of a 224 x 224 image. Bytes; `ratio` is distinct / cost.

    distinct: 32-byte sectors that a launch reads or writes, summed over launches: memory traffic if
    no cache outlives a launch. asked: sectors of every warp instruction, summed; `reread_*` is
    asked / distinct. conflict_free: share of shared accesses; turns: of the banks, over the fewest.
    """
    s, side = case.shape, case.side
    size = (batch, 3, side, side) if s.op == "stem" else (batch, side, side, s.channels_in)
    x = torch.zeros(size, dtype=DTYPE)
    p = plan(s, case.weights, x, arch, DTYPE, edge=0)
    traffic = count(p.launches, p.y, x, p.space)
    _, cost = OPS[s.op].cost(s, batch, side, side, DTYPE)
    found = {
        "op": s.op,
        "shape": case.name,
        "map": f"{side}x{side}",
        "batch": batch,
        "family": family(arch, DTYPE),
        "launches": len(p.launches),
        "cost": cost,
        "distinct": traffic.distinct(),
        "scratch": traffic.distinct() - traffic.distinct("scratch"),
        "ratio": f"{traffic.distinct() / cost:.3f}",
        "ratio_without_scratch": f"{traffic.distinct('scratch') / cost:.3f}",
        "asked": traffic.asked,
    }
    for kind in ("x", "weights", "scratch", "y"):
        b = traffic.kinds.get(kind)
        found[f"reread_{kind}"] = f"{b.asked / b.distinct:.2f}" if b and b.distinct else ""
    shared = traffic.shared
    found["conflict_free"] = f"{traffic.conflict_free:.3f}" if shared.instructions else ""
    turns = shared.wavefronts / max(1, shared.least_wavefronts)
    found["turns"] = f"{turns:.3f}" if shared.instructions else ""
    return found


def rows(models: list[str], batch: int, archs: list[int]) -> Iterator[dict[str, object]]:
    for op in OPS:
        for case in cases(op):
            if case.name.partition(".")[0] in models:
                for arch in archs:
                    yield row(case, batch, arch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default="M0,M1,M2,M3,M4,M5")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--arch", default="70,80")
    parser.add_argument("--out", type=Path, default=RESULT)
    a = parser.parse_args()
    with open(a.out, "w", newline="") as file:
        writer = None
        for found in rows(a.models.split(","), a.batch, [int(n) for n in a.arch.split(",")]):
            if writer is None:
                writer = csv.DictWriter(file, list(found), lineterminator="\n")
                writer.writeheader()
            writer.writerow(found)
            file.flush()
            print(*found.values(), flush=True)


if __name__ == "__main__":
    main()
