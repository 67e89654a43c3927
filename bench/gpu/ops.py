"""Each op alone, as a share of the nearest ceiling of the card, measured in the same process.

An op is a program of one line, 20 calls of it in one CUDA graph: the time holds no launch from the
host. Inputs and weights that fit half the L2 stay there between the calls, and are held against its
bandwidth; the others against the memory's.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from evit_fast.bench.cases import Case
from evit_fast.bench.gpu.card import (
    DTYPES,
    Ceilings,
    alternate,
    captured,
    measure_ceilings,
    timing,
)
from evit_fast.bench.gpu.results import Record
from evit_fast.bench.gpu.subjects import OneOp, Plan, Step, tokens
from evit_fast.ops import OPS

CALLS = 20  # of an op in one graph


def steps(plan: Plan) -> Iterator[Step]:
    yield Step("ops/ceilings", lambda: _ceiling_records(plan), 20)
    for dtype in plan.dtypes:
        for batch in plan.batches:
            for case in plan.ops():
                name = f"ops/{case.op}-{case.name}-{case.side}-{dtype}-{batch}"
                yield Step(name, lambda c=case, b=batch, d=dtype: time_op(plan, c, b, d), 10)


def ceilings(plan: Plan) -> Ceilings:
    if plan.ceilings is None:
        plan.ceilings = measure_ceilings(plan.card, plan.dtypes)
    return plan.ceilings


def _ceiling_records(plan: Plan) -> list[Record]:
    found = ceilings(plan)
    records = [
        Record("ops", "ceiling", f"{dtype} matrix product", dtype=dtype, gflops=round(rate / 1e9))
        for dtype, rate in found.flops.items()
    ]
    for name, rate in (("copy in memory", found.memory), ("copy in L2", found.cache)):
        records.append(Record("ops", "ceiling", name, gbs=round(rate / 1e9, 1)))
    return [*records, Record("ops", "ceiling", "one empty kernel", us=round(found.launch_us, 3))]


def time_op(plan: Plan, case: Case, batch: int, dtype: str) -> list[Record]:
    """One record per column."""
    card, kind, side = plan.card, DTYPES[dtype], case.side
    H = W = min(side, 4) if card.dry_run else side
    x = tokens(case, batch, H, W, kind).to(card.device)
    program, calls = OneOp(case, kind, card), 1 if card.dry_run else CALLS
    columns = plan.live()
    runs = {c: captured(card, lambda c=c: program(x, c), calls) for c in columns}
    times = alternate(card, runs, plan.rounds, plan.round_us) if runs else {}
    flops, nbytes = OPS[case.op].cost(case.shape, batch, H, W, kind)
    least_us, nearer = ceilings(plan).least_us(flops, nbytes, dtype)
    records = []
    for column, rounds in times.items():
        found = timing([us / calls for us in rounds], [us / calls for us in times[columns[0]]])
        records.append(Record(
            part="ops", item=case.op, check=f"batch {batch}", case=case.name, dtype=dtype,
            shape=f"{batch}x{H}x{W} {case.shape.line(dtype=kind)}", column=column,
            gflops=round(flops / found["us"] / 1e3, 1), gbs=round(nbytes / found["us"] / 1e3, 1),
            share=round(least_us / found["us"], 4), nearer=nearer, **found,
        ))  # fmt: skip
    del runs
    if not card.dry_run:
        torch.cuda.empty_cache()
    return records
