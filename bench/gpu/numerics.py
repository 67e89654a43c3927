"""Right: every kernel at every block shape, and every model, against float64.

The float64 side runs on the CPU, so that one fault of a card cannot be on both sides.
"""

from __future__ import annotations

from collections.abc import Iterator

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
    """One record per column: the worst of all maps, batch 1 and 2; and one for NaN."""
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
    records = []
    for column, verdicts in found.items():
        worst, shape = max(verdicts, key=lambda pair: max(pair[0].error, pair[0].worst / 20) /
                           pair[0].bound)  # fmt: skip
        common = dict(part="numerics", item=case.op, case=case.name, dtype=dtype, column=column)
        records.append(Record(
            **common, check="float64", shape=f"{case.side}: {s.line(dtype=kind)}",
            passed=all(verdict.passed for verdict, _ in verdicts),
            error=worst.error, bound=worst.bound,
            note=f"worst of {len(verdicts)} maps and batches: {shape}",
        ))  # fmt: skip
        records.append(Record(
            **common, check="NaN where the reference has it", passed=same_nan(plan, case, program,
            rounded, column, kind),
        ))  # fmt: skip
    return records


def same_nan(plan: Plan, case: Case, program: OneOp, rounded, column: str, kind) -> bool:
    """One NaN among the tokens of the first image; the second image stays clean."""
    H, W = maps(plan, case)[-2]
    x = tokens(case, BATCH, H, W, kind).to(plan.card.device)
    x[(0, 0, H // 2, W // 2) if case.op == "stem" else (0, H // 2, W // 2, 0)] = float("nan")
    with torch.inference_mode():
        plain = OPS[case.op].reference(x, rounded, case.shape)
    return torch.equal(program(x, column).isnan(), plain.isnan())


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
