"""A V100 on paper: how long each launch should take on a card that is not at hand.

    python -m evit_fast.profiles.v100 [--model m0,m5] [--batch 2048] [--json]
    python -m evit_fast.profiles.v100 --count --write    # counts the machine code again

Every number is modelled, none is measured. A launch is a grid of equal blocks. What one block does
(v100_counts.py) divided by what an SM can do in a cycle gives a bound for each of its units; the
largest is the block's busy time. To it comes the time in which all warps wait, STALL cycles an
instruction of the longest warp, shared by the blocks that are on the SM at once. A launch takes as
long as its blocks in waves over 80 SMs, or as memory takes for its tensors, whichever is more.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from evit_fast.config import VARIANTS, resolve
from evit_fast.cuda.occupancy import blocks_per_sm
from evit_fast.model_ops import IMAGE
from evit_fast.ops import OPS
from evit_fast.profiles import v100_counts
from evit_fast.profiles.v100_counts import ARCH, DTYPE, Counts, model_shapes, shape_text

RESULTS = Path(__file__).parent / "results"
BATCH = 2048
# The paper's images per second on a V100 at batch 2048, float16 (arXiv 2305.07027, table 2).
PAPER = dict(zip(VARIANTS, (27644, 20093, 18218, 16644, 15914, 10621), strict=True))
GOAL = 3.0  # times the paper's


@dataclass(frozen=True)
class Card:
    """A V100 SXM2, and what is assumed of it. Rates are per cycle and SM unless said.

    clock_ghz     boost; the paper's cards may have run lower
    dram_gbs      of the card
    l2_bytes      what all SMs together draw, an SM's share; one alone gets 32 and more
    tensor        float16 multiply-adds: 125 TFLOP/s
    lanes         threads of the float32 pipe (15.7 TFLOP/s), and of the integer pipe
    xu            threads of the pipe for powers, reciprocals and float16 <-> float32
    shared_waves  passes of 128 bytes through shared memory or L1
    issue         instructions of warps
    stall         cycles a warp waits per instruction, where no other warp can step in. Three
                  kernels on a cycle-level model of an SM, two blocks at once: 24.3 k cycles for
                  cga's attention at C=288, 15.7 k for all of cga at C=64, 18.7 k for its projection
                  at C=288; with the counts of this table they give 2.3, 2.3 and 1.2
    launch_us     between two launches of a CUDA graph, of the card
    """

    clock_ghz: float = 1.53
    dram_gbs: float = 900.0
    l2_bytes: float = 22.0
    tensor: float = 512.0
    lanes: float = 64.0
    xu: float = 16.0
    shared_waves: float = 1.0
    issue: float = 4.0
    stall: float = 2.2
    launch_us: float = 2.0
    sms: int = 80


V100 = Card()
MMA_STEPS = 4  # HMMA instructions of one m8n8k4, which is 1024 multiply-adds of a warp


class Time(NamedTuple):
    """A launch's modelled time. bounds: microseconds that each unit alone would take, with
    "latency", the waiting that other blocks do not cover.
    """

    us: float
    bound: str
    bounds: dict[str, float]
    blocks_per_sm: int


def cycles(c: Counts, card: Card = V100) -> dict[str, float]:
    """Cycles of an SM for one block, by unit."""
    return {
        "tensor": c.hmma / MMA_STEPS * 1024 / card.tensor,
        "fp32": c.fma * 32 / card.lanes,
        "integer": c.alu * 32 / card.lanes,
        "conversion": c.xu * 32 / card.xu,
        "shared": (c.shared_waves + c.lines) / card.shared_waves,
        "issue": c.issued / card.issue,
        "l2": (c.distinct + c.stored) * 32 / card.l2_bytes,
    }


def time(c: Counts, card: Card = V100) -> Time:
    """What one launch takes. ValueError: a block does not fit on an SM."""
    most = blocks_per_sm(ARCH, c.registers, c.shared_bytes, c.threads)
    if not most:
        raise ValueError(f"v100: {c.threads} threads of {c.registers} registers fit on no SM")
    units = cycles(c, card)
    busy, wait = max(units.values()), card.stall * c.longest
    waves, rest = divmod(c.blocks, card.sms * most)
    last = -(-rest // card.sms)  # blocks of an SM in the wave that is not full
    turns = waves * most + last
    waits = waves + (last > 0)
    us = 1e-3 / card.clock_ghz
    bounds = {unit: turns * n * us for unit, n in units.items()}
    bounds["latency"] = waits * wait * us
    bounds["dram"] = c.dram_bytes / card.dram_gbs * 1e-3
    on_sms = (turns * busy + waits * wait) * us
    return Time(
        max(on_sms, bounds["dram"]) + card.launch_us, max(bounds, key=bounds.get), bounds, most
    )


class Row(NamedTuple):
    """One launch of a model, with the op's own least work (cost())."""

    model: str
    op: str
    stage: str
    shape: str
    side: int
    calls: int  # of this launch in the model
    us: float  # of one
    bound: str
    blocks: int
    blocks_per_sm: int
    gflop: float  # of the op, 0 for its later launches
    least_mb: float
    tensor_share: float  # of the tensor cores' rate


def model_rows(model: str, batch: int, counts: dict | None = None, card: Card = V100) -> list[Row]:
    """A row per different launch. RuntimeError: not counted yet."""
    counts = v100_counts.read() if counts is None else counts
    ops = model_shapes(model)
    rows = []
    for (s, side), calls in {o: ops.count(o) for o in ops}.items():
        flops, least = OPS[s.op].cost(s, batch, side, side, DTYPE)
        key = (s.op, shape_text(s), str(side))
        steps = sorted(
            (k for k in counts if k[:3] == key and k[4] == str(batch)), key=lambda k: int(k[3])
        )
        if not steps:
            raise RuntimeError(
                f"v100: {s.op} {key[1]} at batch {batch} is not counted: "
                "python -m evit_fast.profiles.v100 --count"
            )
        for i, step in enumerate(steps):
            stage, c = counts[step]
            t = time(c, card)
            multiplies = c.blocks * c.hmma / MMA_STEPS * 1024
            rate = card.tensor * card.sms * card.clock_ghz * 1e3  # multiply-adds a microsecond
            rows.append(
                Row(
                    resolve(model).name,
                    s.op,
                    stage,
                    key[1],
                    side,
                    calls,
                    t.us,
                    t.bound,
                    c.blocks,
                    t.blocks_per_sm,
                    flops / 1e9 * (i == 0),
                    least / 1e6 * (i == 0),
                    multiplies / t.us / rate,
                )
            )
    return rows


def total_us(rows: list[Row]) -> float:
    return sum(row.calls * row.us for row in rows)


def summary(model: str, batch: int, counts: dict | None = None, card: Card = V100) -> dict:
    """Modelled milliseconds and images per second of a model, the paper's, and where time goes."""
    rows = model_rows(model, batch, counts, card)
    us = total_us(rows)
    name = resolve(model).name
    by_op, by_bound = {}, {}
    for row in rows:
        by_op[row.op] = by_op.get(row.op, 0) + row.calls * row.us / us
        by_bound[row.bound] = by_bound.get(row.bound, 0) + row.calls * row.us / us
    images = batch / us * 1e6
    return {
        "model": name, "batch": batch, "label": "modelled", "ms": us / 1e3,
        "images_per_s": images, "paper_images_per_s": PAPER[name], "ratio": images / PAPER[name],
        "share_of_op": by_op, "share_of_bound": by_bound,
    }  # fmt: skip


ASSUMPTIONS = [f.name for f in dataclasses.fields(Card) if f.name != "sms"]


def sensitivity(
    model: str, batch: int, counts: dict | None = None, by: float = 0.25
) -> dict[str, tuple[float, float]]:
    """{assumption: change of the total when it is 25 % less, and 25 % more}."""
    counts = v100_counts.read() if counts is None else counts
    base = total_us(model_rows(model, batch, counts))
    changes = {}
    for name in ASSUMPTIONS:
        both = []
        for factor in (1 - by, 1 + by):
            card = dataclasses.replace(V100, **{name: getattr(V100, name) * factor})
            both.append(total_us(model_rows(model, batch, counts, card)) / base - 1)
        changes[name] = tuple(both)
    return changes


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def report(models: list[str], batch: int) -> str:
    """The page v100-modelled.md."""
    counts = v100_counts.read()
    sums = [summary(m, batch, counts) for m in models]
    parts = [
        "# A V100 on paper",
        f"Every time here is **modelled**; no card was at hand. {IMAGE}×{IMAGE} pixels, float16, "
        f"batch {batch}. `python -m evit_fast.profiles.v100` prints it, `profiles/v100.py` says "
        "how a time follows from the counts in `v100-counts.csv`, and each launch is a line of "
        "`v100-modelled.csv`.",
        "## Models",
        table(
            ["model", "ms (modelled)", "img/s (modelled)", "img/s (paper, measured)", "ratio",
             *OPS, "set by"],
            [
                [s["model"][-2:].upper(), f"{s['ms']:.2f}", f"{s['images_per_s']:,.0f}",
                 f"{s['paper_images_per_s']:,}", f"{s['ratio']:.2f}",
                 *(f"{100 * s['share_of_op'].get(op, 0):.0f} %" for op in OPS),
                 ", ".join(f"{b} {100 * v:.0f} %" for b, v in _largest(s["share_of_bound"], 3))]
                for s in sums
            ],
        ),
    ]  # fmt: skip
    short = [s["model"][-2:].upper() for s in sums if s["ratio"] < GOAL]
    parts.append(
        f"The design asks for {GOAL:g} times the paper's; "
        + (f"{', '.join(short)} would stay below." if short else "every model would have it.")
    )
    alone = [
        f"{s['model'][-2:].upper()} ({', '.join(names)})"
        for s in sums
        if (names := _decisive(s, sensitivity(s["model"], batch, counts)))
    ]
    if alone:
        parts.append(
            f"One assumption that is 25 % off takes these below {GOAL:g} times: {', '.join(alone)}."
        )
    parts += ["## Where the time goes", _costly(models, batch, counts)]
    parts += ["## Assumptions", _assumptions()]
    changes = {s["model"]: sensitivity(s["model"], batch, counts) for s in sums}
    parts += [
        "## Sensitivity",
        "Change of a model's total time when one assumption is 25 % less / 25 % more.",
        table(
            ["assumption", *(s["model"][-2:].upper() for s in sums)],
            [
                [f"`{name}`", *(_change(changes[s["model"]][name]) for s in sums)]
                for name in ASSUMPTIONS
            ],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _decisive(s: dict, changes: dict[str, tuple[float, float]]) -> list[str]:
    """Assumptions that alone, 25 % off, take a model that reaches the goal below it."""
    worst = {name: max(both) for name, both in changes.items()}
    return [f"`{n}`" for n, w in worst.items() if s["ratio"] >= GOAL > s["ratio"] / (1 + w)]


def _largest(shares: dict[str, float], n: int) -> list[tuple[str, float]]:
    return sorted(shares.items(), key=lambda item: -item[1])[:n]


def _change(both: tuple[float, float]) -> str:
    return " / ".join(f"{100 * change:+.1f} %" for change in both)


def _costly(models: list[str], batch: int, counts: dict, n: int = 6) -> str:
    lines = []
    for model in models:
        rows = model_rows(model, batch, counts)
        us = total_us(rows)
        for row in sorted(rows, key=lambda row: -row.calls * row.us)[:n]:
            lines.append(
                [row.model[-2:].upper(), f"{row.op} {row.stage}", f"{row.shape}, {row.side}²",
                 f"{row.calls} × {row.us:.0f}", f"{100 * row.calls * row.us / us:.0f} %",
                 row.bound, str(row.blocks_per_sm), f"{100 * row.tensor_share:.0f} %"]
            )  # fmt: skip
    header = ["model", "launch", "shape, map", "µs (modelled)", "share", "largest bound",
              "blocks/SM", "of tensor peak"]  # fmt: skip
    return f"The {n} launches that take most of each model.\n\n" + table(header, lines)


def _assumptions() -> str:
    text = Card.__doc__.split("\n\n", 1)[1]
    entries: list[str] = []
    for line in text.splitlines():
        name, _, rest = line.strip().partition(" ")
        if name in ASSUMPTIONS:
            entries.append(f"- `{name}` = {getattr(V100, name):g}: {rest.strip()}")
        elif line.strip():
            entries[-1] += " " + line.strip()
    more = [
        "- Counts: the machine code that NVRTC makes for sm_70, its integer part interpreted for "
        "three blocks of each grid (`profiles/volta.py`): exact instructions, addresses, bank "
        "conflicts and sectors of those blocks; every block is taken to be their mean.",
        "- L1 catches what a block reads twice: its distinct sectors come from L2, its stores go "
        "there. Blocks share nothing in L1.",
        "- Each launch reads and writes its tensors in DRAM once; nothing stays in the 6 MiB of "
        "L2 between two launches, weights of a launch do within it.",
        "- An access of 16 bytes goes through shared memory or L1 in passes of eight lanes; two "
        "passes that read the same bytes, as fragments of `mma.m8n8k4` make them, are not merged.",
        "- Units work at the same time, the largest sets the pace; `stall` comes on top. The "
        "cycle-level model it is from issues in the order of PTX, without ptxas's scheduling, "
        "which makes waiting look longer than it will be.",
        "- A multiply of `mma.m8n8k4` is four HMMA of two cycles each in a quarter of the SM.",
        "- The paper's figures are of float16 autocast on float32 images; here images are float16.",
    ]
    return "\n".join(entries + more)


def write(models: list[str], batch: int, folder: Path = RESULTS) -> None:
    (folder / "v100-modelled.md").write_text(report(models, batch))
    counts = v100_counts.read()
    with open(folder / "v100-modelled.csv", "w", newline="") as f:
        out = csv.writer(f, lineterminator="\n")
        out.writerow([*Row._fields, "label"])
        for model in models:
            for row in model_rows(model, batch, counts):
                values = (f"{v:.4g}" if isinstance(v, float) else v for v in row)
                out.writerow([*values, "modelled"])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default=",".join(VARIANTS), help="comma list (all)")
    parser.add_argument("--batch", type=int, default=BATCH)
    parser.add_argument("--json", action="store_true", help="sums as JSON")
    parser.add_argument("--count", action="store_true", help="count the machine code again")
    parser.add_argument("--write", action="store_true", help="results/v100-modelled.{csv,md}")
    args = parser.parse_args(argv)
    models = [resolve(m).name for m in args.model.split(",")]
    if args.count:
        v100_counts.update(models, args.batch)
    if args.json:
        print(json.dumps([summary(m, args.batch) for m in models], indent=2))
    else:
        print(report(models, args.batch))
    if args.write:
        write(models, args.batch)
    return 0


if __name__ == "__main__":
    sys.exit(main())
