"""Kernels compiled by several processes at once, into Triton's cache on disk.

One process compiles one kernel after the other, a few seconds each: ten minutes of a card's time
for all shapes and dtypes, while its other processors wait.
"""

from __future__ import annotations

import multiprocessing
import time
from concurrent.futures import ProcessPoolExecutor

from evit_fast.bench.cases import cases
from evit_fast.bench.gpu.card import DTYPES, here
from evit_fast.bench.gpu.subjects import OneOp, Plan, tokens

BATCHES = (1, 256)  # of a few and of many tiles: each has its own row of the tables


def compile_ops(plan: Plan, jobs: int) -> str:
    """Runs every op of the plan once in `jobs` processes; says how long that took. What fails here
    fails again in its step, which is where it counts.
    """
    start, column = time.monotonic(), plan.live()[0]
    work = [
        (plan.models, case.op, number, dtype, column)
        for op in dict.fromkeys(case.op for case in plan.ops())
        for number, case in enumerate(c for c in plan.ops() if c.op == op)
        for dtype in plan.dtypes
    ]
    # Not forked: a child could not use the card that this process has initialised.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(jobs, mp_context=context) as pool:
        problems = [problem for problem in pool.map(_compile, work) if problem]
    spent = time.monotonic() - start
    text = f"compiled {len(work)} ops in {spent:.0f} s by {jobs} processes"
    return f"{text}; {len(problems)} failed: {problems[0]}" if problems else text


def _compile(item: tuple[list[str], str, int, str, str]) -> str:
    """In a process of its own: one op at one dtype. Empty, or what went wrong."""
    models, op, number, dtype, column = item
    case, card = cases(op, models)[number], here()
    side = 8 if card.dry_run else case.side
    try:
        program = OneOp(case, DTYPES[dtype], card)
        for batch in BATCHES[: 1 if card.dry_run else None]:
            program(tokens(case, batch, side, side, DTYPES[dtype]).to(card.device), column)
        card.sync()
    except Exception as error:
        return f"{op}-{case.name}-{dtype}: {type(error).__name__}: {error}".splitlines()[0]
    return ""
