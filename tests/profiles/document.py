"""A document of profiles, made by hand: small, with sums that add up; no measurement."""

from __future__ import annotations

from typing import Any

CLASSES = (
    "conv_gemm", "depthwise", "attention", "softmax", "normalisation", "elementwise", "movement",
    "pooling", "overhead",
)  # fmt: skip
PAPER = ("softmax", "normalisation", "elementwise", "movement")
FMA_GFLOPS = 118.2
LEVELS = [
    {"name": "L1", "bytes": 32768, "copy_gbs": 235.0, "read_gbs": 224.0},
    {"name": "L2", "bytes": 1 << 20, "copy_gbs": 92.0, "read_gbs": 99.0},
    {"name": "L3", "bytes": 32 << 20, "copy_gbs": 38.0, "read_gbs": 41.0},
    {"name": "memory", "bytes": None, "copy_gbs": 17.5, "read_gbs": 20.5},
]
# kind, class, us of one image, calls, Mflop, Mbyte, what fused op it is part of
EAGER = (
    ("aten::convolution", "conv_gemm", 900.0, 4, 62.0, 3.1, "stem"),
    ("aten::convolution", "conv_gemm", 2600.0, 40, 200.0, 9.0, "dw_ffn"),
    ("aten::convolution", "conv_gemm", 700.0, 24, 30.0, 2.2, "cga"),
    ("aten::convolution", "conv_gemm", 500.0, 10, 36.0, 2.9, "patch_merge"),
    ("aten::addmm", "conv_gemm", 40.0, 1, 0.4, 0.8, "classifier"),
    ("aten::convolution", "depthwise", 480.0, 22, 3.5, 2.4, "dw_ffn"),
    ("aten::convolution", "depthwise", 260.0, 12, 0.6, 0.5, "cga"),
    ("aten::bmm", "attention", 330.0, 24, 5.0, 0.8, "cga"),
    ("aten::_softmax", "softmax", 190.0, 12, 0.5, 0.4, "cga"),
    ("aten::native_batch_norm", "normalisation", 1300.0, 60, 3.0, 11.0, "dw_ffn"),
    ("aten::native_batch_norm", "normalisation", 400.0, 8, 1.0, 4.0, "stem"),
    ("aten::relu_", "elementwise", 420.0, 30, 0.9, 6.0, "dw_ffn"),
    ("aten::add", "elementwise", 310.0, 22, 0.7, 5.5, "dw_ffn"),
    ("aten::mul", "elementwise", 60.0, 12, 0.1, 0.3, "cga"),
    ("aten::cat", "movement", 240.0, 12, 0.0, 1.2, "cga"),
    ("aten::copy_", "movement", 520.0, 40, 0.0, 3.3, "cga"),
    ("aten::mean", "pooling", 70.0, 3, 0.1, 0.9, "patch_merge"),
)
# kind, class, us, calls, Mflop, Mbyte, stages (name, class, share of the time)
FUSED = (
    ("stem", "conv_gemm", 650.0, 1, 63.0, 0.9,
     (("gemm", "conv_gemm", 0.97), ("write-back", "movement", 0.03))),
    ("dw_ffn", "conv_gemm", 1900.0, 14, 205.0, 3.0,
     (("dw", "depthwise", 0.1), ("gemm", "conv_gemm", 0.86), ("write-back", "movement", 0.04))),
    ("cga", "conv_gemm", 620.0, 8, 36.0, 1.1,
     (("gather", "movement", 0.08), ("gemm", "conv_gemm", 0.6), ("dw", "depthwise", 0.07),
      ("attention", "attention", 0.17), ("softmax", "softmax", 0.08))),
    ("patch_merge", "conv_gemm", 430.0, 2, 37.0, 1.6,
     (("gemm", "conv_gemm", 0.92), ("pool", "pooling", 0.08))),
    ("classifier", "conv_gemm", 30.0, 1, 0.4, 0.8,
     (("pool", "pooling", 0.1), ("gemm", "conv_gemm", 0.9))),
)  # fmt: skip
# runtime -> time of each class against eager's, overhead against eager's, kernel
PEERS = {
    "eager": ({}, 1.0, "timm 1.0.31, torch 2.13.0"),
    "folded": ({"normalisation": 0.0, "movement": 0.9}, 0.8, "torch 2.13.0"),
    "compile": ({"normalisation": 0.0, "elementwise": 0.35, "movement": 0.6}, 0.3, "torch 2.13.0"),
    "onnxruntime": (
        {"normalisation": 0.0, "elementwise": 0.3, "movement": 0.5, "conv_gemm": 0.75},
        0.2,
        "onnxruntime 1.32.0",
    ),
}
EAGER_OVERHEAD_US = 900.0
SCALE = {"m0": 0.2, "m1": 0.4, "m2": 0.45, "m3": 0.55, "m4": 0.65, "m5": 1.0}


def _op(name: str, kind: str, cls: str, us: float, calls: int, mflop: float, mbyte: float) -> dict:
    flops, nbytes = mflop * 1e6, mbyte * 1e6
    footprint = nbytes / calls
    level = next(
        (v for v in LEVELS if v["bytes"] is not None and footprint <= v["bytes"]), LEVELS[-1]
    )
    ridge = FMA_GFLOPS / level["copy_gbs"]
    intensity = flops / nbytes
    roof_us = max(flops / FMA_GFLOPS, nbytes / level["copy_gbs"]) / 1e3
    return {
        "name": name, "kind": kind, "shape": "[16, 192, 14, 14]", "class": cls, "us": us,
        "calls": calls, "flops": flops, "bytes": nbytes, "intensity": intensity,
        "level": level["name"], "ridge": ridge, "memory_bound": intensity < ridge,
        "roof_share": min(roof_us / us, 1.0), "kernel": "mkldnn",
    }  # fmt: skip


def _peer_ops(name: str, scale: float, batch: int, copies: int) -> list[dict]:
    factors = PEERS[name][0]
    found = []
    for kind, cls, us, calls, mflop, mbyte, part in EAGER:
        factor = factors.get(cls, 1.0)
        if factor == 0.0:
            continue
        for i in range(copies):
            work = scale * batch / copies
            amounts = us * factor * work, calls, mflop * work, mbyte * work
            op = _op(f"{kind} {part}.{i}", kind, cls, *amounts)
            found.append({**op, "part": part})
    return found


def _fused_ops(model: str, scale: float, batch: int) -> list[dict]:
    found = []
    for kind, cls, us, calls, mflop, mbyte, stages in FUSED:
        for i in range(min(calls, 4)):
            work = scale * batch / min(calls, 4)
            amounts = us * work, 1, mflop * work, mbyte * work
            op = _op(f"{kind} {model.upper()}.{i + 1}", kind, cls, *amounts)
            op["stages"] = [
                {"stage": stage, "class": of, "us": op["us"] * share} for stage, of, share in stages
            ]
            found.append({**op, "part": kind, "kernel": "evit_fast avx512"})
    return found


def _runtime(name: str, kernel: str, ops: list[dict], overhead: float, least_bytes: float) -> dict:
    spent = sum(op["us"] for op in ops)
    wall = spent + overhead
    resolved, whole = dict.fromkeys(CLASSES, 0.0), dict.fromkeys(CLASSES, 0.0)
    resolved["overhead"] = whole["overhead"] = overhead
    for op in ops:
        whole[op["class"]] += op["us"]
        for stage in op.get("stages") or [op]:
            resolved[stage["class"]] += stage["us"]
    total = sum(op["bytes"] for op in ops)
    return {
        "name": name, "kernel": kernel, "wall_us": wall, "wall_us_p20": wall * 0.985,
        "wall_us_p80": wall * 1.03, "rounds_us": [wall * 0.985, wall, wall * 1.03],
        "relative_error": 4.5e-7, "ops": ops, "overhead_us": overhead, "class_us": resolved,
        "class_us_whole": whole,
        "memory_bound_us": {
            "paper": sum(resolved[c] for c in PAPER),
            "paper_whole": sum(whole[c] for c in PAPER),
            "roofline": sum(op["us"] for op in ops if op["memory_bound"]),
        },
        "movement_us": resolved["movement"], "bytes": total, "traffic_ratio": total / least_bytes,
    }  # fmt: skip


def _reduction(before: dict, after: dict, definition: str) -> dict:
    low, high = before["memory_bound_us"][definition], after["memory_bound_us"][definition]
    reduction = 1 - high / low
    removed = before["wall_us"] - after["wall_us"]
    overhead = before["overhead_us"] - after["overhead_us"]
    eliminated = low - high
    return {
        "from": before["name"], "to": after["name"], "definition": definition, "before_us": low,
        "after_us": high, "reduction": reduction, "low": reduction - 0.012,
        "high": min(reduction + 0.009, 1.0),
        "waterfall": {
            "before": before["wall_us"], "eliminated": eliminated,
            "accelerated": removed - eliminated - overhead, "overhead": overhead,
            "after": after["wall_us"],
        },
    }  # fmt: skip


def _cell(model: str, batch: int, copies: int) -> dict:
    short = model.rpartition("_")[2]
    scale = SCALE[short]
    least = (12.4e6 * scale + batch * 224 * 224 * 3 + batch * 1000) * 4
    runtimes = [
        _runtime(
            name, kernel, _peer_ops(name, scale, batch, copies), EAGER_OVERHEAD_US * factor, least
        )
        for name, (_, factor, kernel) in PEERS.items()
    ]
    fused = _runtime("fused", "evit_fast avx512", _fused_ops(short, scale, batch), 40.0, least)
    runtimes.append(fused)
    return {
        "model": model, "batch": batch, "size": 224, "threads": 1, "dtype": "float32",
        "runtimes": runtimes,
        "reductions": [
            _reduction(before, fused, definition)
            for before in runtimes[:-1]
            for definition in ("paper", "roofline")
        ],
    }  # fmt: skip


def document(
    models: tuple[str, ...] = ("efficientvit_m5",),
    batches: tuple[int, ...] = (1, 16),
    copies: int = 1,
) -> dict[str, Any]:
    """copies: rows that each op of a peer is split into; 8 make it as long as a real one."""
    return {
        "format": "evit_fast.profile", "version": 1,
        "machine": "AMD EPYC (family 25 model 17), avx512", "device": "cpu", "date": "2026-11-24",
        "commit": "db4a8a51",
        "command": "evit-fast profile --model m0..m5 --device cpu --batch 1,16 --html report.html",
        "environment": {"python": "3.11.2", "torch": "2.13.0+cpu", "allocator": "tcmalloc"},
        "ceilings": {
            "fma_gflops": FMA_GFLOPS, "threads": 1, "levels": LEVELS, "date": "2026-11-24",
        },
        "cells": [_cell(model, batch, copies) for model in models for batch in batches],
        "checks": [
            {"name": "sum of the ops", "ok": True, "text": "ops and overhead add up to the wall"},
            {"name": "D1 misses", "ok": False, "text": "counted 31 % more than cachegrind <did>"},
        ],
    }  # fmt: skip
