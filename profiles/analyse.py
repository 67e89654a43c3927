"""What a measured forward says: memory-bound time by both definitions, what is left over, and how
much less it is than before.

paper     time in the classes that the paper calls memory-bound; a fused op by its stages
roofline  time in ops whose FLOPs per byte are below the ridge of the level that holds their bytes:
          multiply-adds a second over bytes a second, both measured. A fused op is one op.

The bandwidth of a level is the better of reading and copying. The roof of an op is kinder than its
level: of bytes that fill several levels each may hold its share.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from evit_fast import _native
from evit_fast.bench.runner import Result, spread
from evit_fast.config import resolve
from evit_fast.model_ops import CLASSES as LOGITS
from evit_fast.model_ops import model_ops
from evit_fast.profiles import classes

ROOF_SHARE_MOST = 1.05  # above it the measurement is rejected
OVERHEAD_LEAST = -0.05  # of the wall time: below it the profiler has slowed the ops down
RESOLVED = 3  # times the resolution of its timer a call must take to be held against the roof
RESAMPLES, LOW, HIGH = 1000, 0.025, 0.975
DEFINITIONS = ("paper", "roofline")


def bandwidth(level: dict[str, Any]) -> float:
    """Bytes a microsecond."""
    return max(level["copy_gbs"], level["read_gbs"]) * 1e3


def level_of(nbytes: float, limits: dict[str, Any]) -> dict[str, Any]:
    """The nearest level that holds so many bytes."""
    levels = limits["levels"]
    return next((one for one in levels if one["bytes"] and nbytes <= one["bytes"]), levels[-1])


def ridge(level: dict[str, Any], limits: dict[str, Any]) -> float:
    """FLOPs per byte at which a level's bandwidth and the multiply-adds take the same time."""
    return limits["fma_gflops"] * 1e3 / bandwidth(level)


def roof_us(flops: float, nbytes: float, limits: dict[str, Any]) -> float:
    """The least time: of the multiply-adds, or of the bytes, those that fit L1 at its bandwidth,
    those that fit L2 beside them at that of L2, and so on."""
    left, below, spent = nbytes, 0.0, 0.0
    for level in limits["levels"]:
        part = left if level["bytes"] is None else min(left, max(level["bytes"] - below, 0.0))
        spent += part / bandwidth(level)
        left -= part
        below = max(below, level["bytes"] or 0.0)
    spent += left / bandwidth(limits["levels"][-1])
    return max(flops / (limits["fma_gflops"] * 1e3), spent)


def op(entry: dict[str, Any], limits: dict[str, Any]) -> dict[str, Any]:
    """An op of the document from what an instrument found: us, FLOPs and bytes are of all its
    calls in a forward, the level is that of one call."""
    us, calls = statistics.median(entry["rounds"]), entry["calls"]
    flops, moved = entry["flops"], entry["bytes"]
    times = {stage: statistics.median(rounds) for stage, rounds in entry["stages"].items()}
    scale = us / sum(times.values()) if any(times.values()) else 0.0
    found = {
        **{key: entry[key] for key in ("name", "kind", "shape", "class", "part")},
        "us": round(us, 2), "calls": calls, "flops": flops, "bytes": moved,
        "intensity": None, "level": None, "ridge": None, "memory_bound": None, "roof_share": None,
        "kernel": entry["kernel"],
        "stages": [
            {"stage": stage, "class": classes.stage_class(stage), "us": round(one * scale, 2)}
            for stage, one in times.items()
        ],
    }  # fmt: skip
    if flops is None or not moved:
        return found
    level = level_of(moved / calls, limits)
    at = ridge(level, limits)
    least = calls * roof_us(flops / calls, moved / calls, limits)
    resolved = us > RESOLVED * calls * entry["resolution"]
    found.update(
        intensity=round(flops / moved, 3), level=level["name"], ridge=round(at, 3),
        memory_bound=flops / moved < at, roof_share=round(least / us, 4) if resolved else None,
    )  # fmt: skip
    return found


def runtime(
    result: Result, entries: Sequence[dict[str, Any]], limits: dict[str, Any], least_bytes: int
) -> tuple[dict[str, Any], dict[str, np.ndarray | None]]:
    """(a runtime of the document, its memory-bound time round by round and by definition).

    Without stages nobody knows what of a fused op is memory-bound: the paper's figure is None.
    """
    wall, low, high = spread(result.rounds)
    ops = [op(entry, limits) for entry in entries]
    staged = all(one["stages"] for one in ops if one["kind"] in classes.FUSED)
    known = all(one["memory_bound"] is not None for one in ops)
    bound = [
        entry["rounds"] for entry, one in zip(entries, ops, strict=True) if one["memory_bound"]
    ]
    rounds = {
        "paper": _table(_paper_rounds(entries), len(result.rounds)) if staged else None,
        "roofline": _table(bound, len(result.rounds)) if known else None,
    }
    overhead = round(wall - sum(one["us"] for one in ops), 1)
    by_class = _by_class([part for one in ops for part in one["stages"] or [one]], overhead)
    whole = _by_class(ops, overhead)
    moved = (
        sum(one["bytes"] for one in ops) if all(one["bytes"] is not None for one in ops) else None
    )
    ops.sort(key=lambda one: -one["us"])
    return {
        "name": result.peer, "kernel": result.kernel,
        "wall_us": round(wall, 1), "wall_us_p20": round(low, 1), "wall_us_p80": round(high, 1),
        "rounds_us": [round(us, 1) for us in result.rounds],
        "relative_error": result.relative_error, "ops": ops, "overhead_us": overhead,
        "class_us": by_class, "class_us_whole": whole,
        "memory_bound_us": {
            "paper": _of_paper(by_class) if staged else None,
            "paper_whole": _of_paper(whole),
            "roofline": _sum(one for one in ops if one["memory_bound"]) if known else None,
        },
        "movement_us": _sum(part for one in ops for part in _still(one)),
        "bytes": moved, "traffic_ratio": None if moved is None else round(moved / least_bytes, 3),
    }, rounds  # fmt: skip


def _paper_rounds(entries: Sequence[dict[str, Any]]) -> list[Sequence[float]]:
    """Times round by round of what the paper calls memory-bound: ops, or stages inside them."""
    found = []
    for entry in entries:
        parts = [(classes.stage_class(stage), times) for stage, times in entry["stages"].items()]
        parts = parts or [(entry["class"], entry["rounds"])]
        found += [times for kind, times in parts if kind in classes.MEMORY_BOUND]
    return found


def _table(parts: Sequence[Sequence[float]], rounds: int) -> np.ndarray:
    """Times [parts, rounds], where there are no parts too."""
    return np.asarray(parts, dtype=float).reshape(len(parts), rounds)


def _still(one: dict[str, Any]) -> list[dict[str, Any]]:
    """What only moves data: an op without FLOPs, a stage that copies, a kernel named after it."""
    if one["stages"]:
        return [stage for stage in one["stages"] if stage["class"] == "movement"]
    still = one["class"] == "movement" if one["flops"] is None else one["flops"] == 0
    return [one] if still else []


def _sum(parts: Iterable[dict[str, Any]]) -> float:
    return round(sum(part["us"] for part in parts), 1)


def _by_class(parts: Sequence[dict[str, Any]], overhead: float) -> dict[str, float]:
    found = {name: _sum(p for p in parts if p["class"] == name) for name in classes.CLASSES}
    return {**found, "overhead": overhead}


def _of_paper(by_class: dict[str, float]) -> float:
    return round(sum(by_class[name] for name in classes.MEMORY_BOUND), 1)


def reduction(
    before: dict[str, Any], after: dict[str, Any], definition: str,
    rounds: tuple[np.ndarray, np.ndarray],
) -> dict[str, Any]:  # fmt: skip
    """How much of the memory-bound time is gone; low, high: a bootstrap over rounds, 95 %.

    rounds: times [parts, rounds] of each side, drawn together: they ran side by side.
    """
    was, now = (one["memory_bound_us"][definition] for one in (before, after))
    count = min(times.shape[1] for times in rounds)
    picked = np.random.default_rng(0).integers(count, size=(RESAMPLES, count))
    a, b = (np.median(times[:, picked], axis=2).sum(axis=0) for times in rounds)
    found = 1 - b / np.where(a > 0, a, np.inf)
    gone, calm = was - now, before["overhead_us"] - after["overhead_us"]
    total = before["wall_us"] - after["wall_us"]
    return {
        "from": before["name"], "to": after["name"], "definition": definition,
        "before_us": was, "after_us": now,
        "reduction": round(1 - now / was, 4) if was else 0.0,
        "low": round(float(np.quantile(found, LOW)), 4),
        "high": round(float(np.quantile(found, HIGH)), 4),
        "waterfall": {
            "before": before["wall_us"], "eliminated": round(gone, 1),
            "accelerated": round(total - gone - calm, 1), "overhead": round(calm, 1),
            "after": after["wall_us"],
        },
    }  # fmt: skip


def least_bytes(model: str, batch: int, size: int) -> int:
    """Images, folded weights and logits in float32: what any program has to touch."""
    weights = sum(_native.op_bytes(s.line()) for s, _ in model_ops(resolve(model), size))
    return 4 * batch * (3 * size * size + LOGITS) + weights


def cell(
    name: dict[str, Any], results: dict[str, Result],
    profiled: dict[str, Sequence[dict[str, Any]]], limits: dict[str, Any],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:  # fmt: skip
    """(a cell of the document, what was checked). name: the model and how it ran."""
    least = least_bytes(name["model"], name["batch"], name["size"])
    label = f"{name['model']} batch {name['batch']}"
    runtimes, rounds, checks = [], {}, []
    for peer, result in results.items():
        if result.problem:
            why = "not installed" if result.missing else "measured"
            checks.append(_check(f"{label}: {peer} {why}", False, result.problem))
            continue
        one, rounds[peer] = runtime(result, profiled[peer], limits, least)
        runtimes.append(one)
        checks += [_check(f"{label}: {peer} {c['name']}", c["ok"], c["text"]) for c in judge(one)]
    by_name = {one["name"]: one for one in runtimes}
    fused = by_name.get("fused")
    reductions = [
        reduction(one, fused, kind, (rounds[peer][kind], rounds["fused"][kind]))
        for peer, one in by_name.items()
        for kind in DEFINITIONS
        if fused and peer != "fused" and _known(rounds[peer][kind], rounds["fused"][kind])
    ]
    return {**name, "runtimes": runtimes, "reductions": reductions}, checks


def _known(*rounds: np.ndarray | None) -> bool:
    return all(times is not None for times in rounds)


def judge(one: dict[str, Any]) -> list[dict[str, Any]]:
    """Whether the times of a runtime can be believed, and what of it is unknown."""
    over = [f"{o['name']}: {o['roof_share']:.2f}" for o in one["ops"]
            if (o["roof_share"] or 0) > ROOF_SHARE_MOST]  # fmt: skip
    text = f"faster than the roof, so rejected: {'; '.join(over)}" if over else (
        f"no op is faster than {ROOF_SHARE_MOST} of its roof"
    )  # fmt: skip
    found = [_check("roof", not over, text)]
    share = one["overhead_us"] / one["wall_us"]
    found.append(_check(
        "overhead", share >= OVERHEAD_LEAST, f"the ops take {1 - share:.1%} of the wall time"
    ))  # fmt: skip
    unknown = sum(o["us"] for o in one["ops"] if o["memory_bound"] is None)
    if unknown:
        part = unknown / one["wall_us"]
        found.append(_check(
            "bytes", False,
            f"nobody says what {part:.1%} of the wall time moves: no figure by the roofline",
        ))  # fmt: skip
    if one["name"] == "fused" and one["memory_bound_us"]["paper"] is None:
        found.append(_check(
            "stages", False,
            "the native library gives no times of stages: no figure by the paper's classes; "
            "fused ops counted whole bound the reduction from above",
        ))  # fmt: skip
    return found


def _check(name: str, ok: bool, text: str) -> dict[str, Any]:
    return {"name": name, "ok": ok, "text": text}
