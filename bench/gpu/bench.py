"""Fast: whole models against their peers, at every batch."""

from __future__ import annotations

import gc
from collections.abc import Iterator

import torch

from evit_fast.bench.gpu import peers
from evit_fast.bench.gpu.card import DTYPES, WARM, alternate, timing
from evit_fast.bench.gpu.results import Record
from evit_fast.bench.gpu.subjects import Plan, Step, expected, fused, images, judge
from evit_fast.bench.models import cost

CHECKED = 2  # images of a batch that are compared with float64: the first ones


def steps(plan: Plan) -> Iterator[Step]:
    for group in peers.GROUPS:
        chosen = [name for name in group if name in plan.peers]
        if not chosen:
            continue
        for dtype in plan.dtypes:
            for model in plan.models:
                for batch in plan.batches:
                    name = f"bench/{model}-{plan.size}-{dtype}-{batch}-{'+'.join(chosen)}"
                    yield Step(
                        name,
                        lambda m=model, b=batch, d=dtype, c=chosen: time_model(plan, m, b, d, c),
                        peers.GUESS_S[group[0]],
                    )


def time_model(plan: Plan, model: str, batch: int, dtype: str, names: list[str]) -> list[Record]:
    """fused in every live column and the peers, in turn, after each has been checked."""
    kind, few = DTYPES[dtype], min(batch, CHECKED)
    common = dict(
        part="bench", item=model, check=f"batch {batch}", dtype=dtype,
        shape=f"{batch}x3x{plan.size}x{plan.size}",
    )  # fmt: skip
    x = images(batch, plan.size).to(plan.card.device, kind)
    want = expected(model, few, plan.size, dtype)
    plain = peers.build("eager", model, plan.size, plan.card, x[:few])()
    calls, records, errors = {}, [], {}
    for name in [*plan.live(), *names]:
        try:
            if name in plan.columns:
                call = peers.forward_of(fused(model, plan, name, dtype), x)
            else:
                call = peers.build(name, model, plan.size, plan.card, x)
            for _ in range(1 if plan.card.dry_run else WARM):
                got = call()  # the last one: what is captured first answers from the graph
            verdict = judge(got[:few], want, kind, plain)
            if not verdict.passed:
                raise ValueError(f"off by {verdict.error:.1e}, {verdict.bound:.0e} is allowed")
        except Exception as error:  # whatever a peer raises is its result
            note = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            failed = False if name in plan.columns else ""
            records.append(Record(**common, column=name, passed=failed, note=note))
            continue
        calls[name], errors[name] = call, verdict
    times = alternate(plan.card, calls, plan.rounds, plan.round_us) if calls else {}
    flops, nbytes = cost(model, batch, plan.size, dtype)
    first = next((times[name] for name in plan.live() if name in times), None)
    for name, rounds in times.items():
        found = timing(rounds, first)
        records.append(Record(
            **common, column=name, passed=True, error=errors[name].error,
            bound=errors[name].bound, images_per_s=round(batch / found["us"] * 1e6, 1),
            gflops=round(flops / found["us"] / 1e3, 1), gbs=round(nbytes / found["us"] / 1e3, 1),
            **found,
        ))  # fmt: skip
    del calls
    gc.collect()
    if not plan.card.dry_run:
        torch.cuda.empty_cache()
    return records
