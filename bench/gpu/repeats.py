"""The same bits: through CUDA graphs, a thousand times, and for an image alone or in a batch."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch

from evit_fast.bench.gpu.card import DTYPES, captured
from evit_fast.bench.gpu.results import Record
from evit_fast.bench.gpu.subjects import Plan, Step, fused, images

BATCH = 8
BATCHES = (3, 8, 64)  # that an image stands in


def graph_steps(plan: Plan) -> Iterator[Step]:
    return _steps(plan, "graphs", check_graphs)


def repeat_steps(plan: Plan) -> Iterator[Step]:
    return _steps(plan, "repeats", check_repeats)


def _steps(plan: Plan, part: str, check: Callable[..., list[Record]]) -> Iterator[Step]:
    for dtype in plan.dtypes:
        for model in plan.models:
            name = f"{part}/{model}-{plan.size}-{dtype}-{plan.repeats}"
            yield Step(name, lambda m=model, d=dtype: check(plan, m, d), 30)


class _Checks:
    """Records of one model in one column."""

    def __init__(self, part: str, model: str, plan: Plan, column: str, dtype: str) -> None:
        shape = f"{plan.size}x{plan.size}"
        self.common = dict(part=part, item=model, shape=shape, dtype=dtype, column=column)
        self.records: list[Record] = []

    def say(self, check: str, passed: bool, note: str = "") -> None:
        self.records.append(Record(**self.common, check=check, passed=passed, note=note))


def _x(plan: Plan, dtype: str, batch: int, size: int | None = None) -> torch.Tensor:
    return images(batch, size or plan.size).to(plan.card.device, DTYPES[dtype])


@torch.inference_mode()
def check_graphs(plan: Plan, model: str, dtype: str) -> list[Record]:
    """Without a card there are no graphs: what is left runs twice without them, and says so."""
    dry = plan.card.dry_run
    batch = 1 if dry else BATCH
    x, other = _x(plan, dtype, batch), _x(plan, dtype, batch).flip(2).contiguous()
    small = _x(plan, dtype, 1, plan.size // 2)
    records = []
    for column in plan.live():
        checks = _Checks("graphs", model, plan, column, dtype)
        raw = fused(model, plan, column, dtype, graphs=False)
        graph = fused(model, plan, column, dtype, graphs=None if dry else True)
        want, want_other, want_small = raw(x), raw(other), raw(small)
        note = "no graphs without a card" if dry else ""
        # The first call of a size launches, the second captures, the later ones replay.
        for call in ("launched",) if dry else ("launched", "captured", "replayed"):
            checks.say(f"raw == graph, {call}", torch.equal(graph(x), want), note)
            checks.say(f"raw == graph, {call}, small", torch.equal(graph(small), want_small), note)
        first = graph(x)
        second = graph(other)
        fresh = torch.equal(first, want) and first.data_ptr() != second.data_ptr()
        checks.say("outputs are fresh", fresh and torch.equal(second, want_other), note)
        if not dry:
            for name, m in (("raw", raw), ("graph", graph)):
                ys: list[torch.Tensor] = []
                captured(plan.card, lambda m=m, ys=ys: ys.append(m(x)), 1)()
                plan.card.sync()
                checks.say(f"captured by the caller, {name}", torch.equal(ys[-1], want))
        records += checks.records
    return records


@torch.inference_mode()
def check_repeats(plan: Plan, model: str, dtype: str) -> list[Record]:
    records = []
    dry = plan.card.dry_run
    for column in plan.live():
        checks = _Checks("repeats", model, plan, column, dtype)
        fast = fused(model, plan, column, dtype)
        x = _x(plan, dtype, 1 if dry else BATCH)
        first = fast(x).clone()
        differ = torch.zeros((), dtype=torch.bool, device=x.device)
        for _ in range(plan.repeats - 1):
            differ |= (fast(x) != first).any()  # no wait between the calls
        same = not differ.item() and bool(first.isfinite().all())
        checks.say("repeats are bit-equal", same, f"{plan.repeats} repeats")
        fixed = fused(model, plan, column, dtype, deterministic=True)
        batches = (2,) if dry else BATCHES
        x = _x(plan, dtype, max(batches))
        alone = fixed(x[-1:])
        wrong = [n for n in batches if not torch.equal(fixed(x[-n:])[-1:], alone)]
        note = f"in batches of {', '.join(map(str, batches))}"
        if wrong:
            note += f"; other bits in {', '.join(map(str, wrong))}"
        checks.say("deterministic: alone == in a batch", not wrong, note)
        records += checks.records
    return records
