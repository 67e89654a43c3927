"""Right: every kernel at every block shape, and every model, against float64.

The float64 side runs on the CPU, so that one fault of a card cannot be on both sides.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from evit_fast.bench.cases import Case
from evit_fast.bench.gpu.card import DTYPES
from evit_fast.bench.gpu.results import Record
from evit_fast.bench.gpu.subjects import (
    OneOp,
    Plan,
    Step,
    Verdict,
    eager,
    expected,
    fused,
    images,
    judge,
    tokens,
)
from evit_fast.ops import OPS
from evit_fast.program import map_arrays

BATCH = 2
MANY = 256  # images: the tiles of a large batch are others
RAGGED = ((13, 9), (1, 1))  # tokens
RAGGED_IMAGES = ((75, 50), (1, 1))
RAGGED_SMALL = ((8, 5), (1, 1))


def steps(plan: Plan) -> Iterator[Step]:
    for dtype in plan.dtypes:
        for case in plan.ops():
            name = f"numerics/{case.op}-{case.name}-{case.side}-{dtype}"
            yield Step(name, lambda c=case, d=dtype: check_op(plan, c, d), 20)
    for dtype in plan.dtypes:
        for model in plan.models:
            name = f"numerics/{model}-{plan.size}-{dtype}"
            yield Step(name, lambda m=model, d=dtype: check_model(plan, m, d), 60)


def maps(plan: Plan, case: Case) -> tuple[tuple[int, int], ...]:
    """The map of the model at 224, and ragged ones; small ones where the interpreter runs them."""
    if plan.card.dry_run:
        return RAGGED_SMALL
    return ((case.side, case.side), *(RAGGED_IMAGES if case.op == "stem" else RAGGED))


def check_op(plan: Plan, case: Case, dtype: str) -> list[Record]:
    """Records per column: the worst of all maps at batch 1 and 2; a large batch; NaN."""
    op, s, kind = OPS[case.op], case.shape, DTYPES[dtype]
    program = OneOp(case, kind, plan.card)
    weights = map_arrays(case.weights, lambda a: torch.from_numpy(a.copy()))
    rounded = map_arrays(weights, lambda t: t.to(plan.card.device, kind))
    found: dict[str, list[tuple[Verdict, str]]] = {column: [] for column in plan.live()}
    for H, W in maps(plan, case):
        x = tokens(case, BATCH, H, W, kind)
        want = op.reference(x.double(), weights, s)
        x = x.to(plan.card.device)
        with torch.inference_mode():
            plain = op.reference(x, rounded, s)
        for column, verdicts in found.items():
            both, alone = program(x, column), program(x[:1], column)
            verdicts.append((judge(both, want, kind, plain), f"{BATCH}x{H}x{W}"))
            verdicts.append((judge(alone, want[:1], kind, plain[:1]), f"1x{H}x{W}"))
    many, nan = _many(plan, case, program, weights, rounded), _nan(plan, case, rounded, kind)
    records = []
    for column, verdicts in found.items():
        worst, shape = max(verdicts, key=lambda pair: pair[0].share)
        common = dict(
            part="numerics", item=case.op, case=case.name, dtype=dtype, column=column,
            shape=f"{case.side}: {s.line(dtype=kind)}",
        )  # fmt: skip
        records.append(Record(
            **common, check="float64", passed=all(verdict.passed for verdict, _ in verdicts),
            error=worst.error, bound=worst.bound,
            note=f"worst of {len(verdicts)} maps and batches: {shape}",
        ))  # fmt: skip
        verdict, same = many(column)
        records.append(Record(
            **common, check="float64, large batch", passed=verdict.passed and same,
            error=verdict.error, bound=verdict.bound,
            note="" if same else "copies of an image have different bits",
        ))  # fmt: skip
        x, where = nan
        same = torch.equal(program(x, column).isnan(), where)
        records.append(Record(**common, check="NaN where the reference has it", passed=same))
    return records


def _many(
    plan: Plan, case: Case, program: OneOp, weights: Any, rounded: Any
) -> Callable[[str], tuple[Verdict, bool]]:
    """column -> (two images of a large batch against float64, the others are copies to the bit)."""
    dry = plan.card.dry_run
    H, W = maps(plan, case)[-1 if dry else 0]
    pair, times = tokens(case, 2, H, W, program.dtype), 2 if dry else MANY // 2
    op, x = OPS[case.op], pair.to(plan.card.device)
    want = op.reference(pair.double(), weights, case.shape)
    with torch.inference_mode():
        plain = op.reference(x, rounded, case.shape)
    x = x.repeat(times, *[1] * (x.dim() - 1))

    def check(column: str) -> tuple[Verdict, bool]:
        y = program(x, column)
        same = torch.equal(y, y[:2].repeat(times, *[1] * (y.dim() - 1)))
        return judge(y[:2], want, program.dtype, plain), same

    return check


def _nan(
    plan: Plan, case: Case, rounded: Any, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two images with one NaN in the first, and where the result has NaN: not in the second."""
    H, W = maps(plan, case)[-2]
    x = tokens(case, BATCH, H, W, dtype).to(plan.card.device)
    x[(0, 0, H // 2, W // 2) if case.op == "stem" else (0, H // 2, W // 2, 0)] = float("nan")
    with torch.inference_mode():
        return x, OPS[case.op].reference(x, rounded, case.shape).isnan()


def check_model(plan: Plan, model: str, dtype: str) -> list[Record]:
    """Logits of normalised floats and of pixels at batch 2."""
    kind, records = DTYPES[dtype], []
    plain_model = _plain(model, plan, kind)
    config = eager(model, plan.size).config
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (config.mean, config.std))
    floats = images(BATCH, plan.size)
    pixels = ((floats * std + mean) * 255).round().clamp(0, 255).to(torch.uint8)
    normalised = (pixels.double() / 255 - mean.double()) / std.double()
    want_floats = expected(model, BATCH, plan.size, dtype)
    with torch.inference_mode():
        want_pixels = _double(model, plan)(normalised)
        plain_floats = plain_model(floats.to(plan.card.device, kind))
        plain_pixels = plain_model(normalised.to(plan.card.device, kind))
    for column in plan.live():
        fast = fused(model, plan, column, dtype)
        for check, x, want, plain in (
            ("float64", floats.to(kind), want_floats, plain_floats),
            ("float64, from pixels", pixels, want_pixels, plain_pixels),
        ):
            with torch.inference_mode():
                verdict = judge(fast(x.to(plan.card.device)), want, kind, plain)
            records.append(Record(
                part="numerics", item=model, check=check, dtype=dtype, column=column,
                shape=f"{BATCH}x3x{plan.size}x{plan.size}", passed=verdict.passed,
                error=verdict.error, bound=verdict.bound,
            ))  # fmt: skip
    return records


def _double(model: str, plan: Plan) -> torch.nn.Module:
    import copy

    return copy.deepcopy(eager(model, plan.size)).double()


def _plain(model: str, plan: Plan, dtype: torch.dtype) -> torch.nn.Module:
    """Eager on the card in dtype."""
    import copy

    return copy.deepcopy(eager(model, plan.size)).to(plan.card.device, dtype)
