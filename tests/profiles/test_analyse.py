"""Figures of a made-up machine and made-up rounds, by hand."""

from __future__ import annotations

import numpy as np
import pytest

from evit_fast.bench.runner import Result
from evit_fast.profiles import analyse, classes

# 100 GFLOP/s; ridges of 0.5, 1, 2 and 10 FLOPs a byte.
LIMITS = {
    "fma_gflops": 100.0,
    "levels": [
        {"name": "L1", "bytes": 1000, "copy_gbs": 200.0, "read_gbs": 150.0},
        {"name": "L2", "bytes": 10_000, "copy_gbs": 80.0, "read_gbs": 100.0},
        {"name": "L3", "bytes": 100_000, "copy_gbs": 50.0, "read_gbs": 50.0},
        {"name": "memory", "bytes": None, "copy_gbs": 9.0, "read_gbs": 10.0},
    ],
}


def entry(
    group,
    rounds,
    flops=0,
    nbytes=100,
    calls=1,
    stages=None,
    kind="aten::x",
    name="",
    resolution=0.0,
):
    return {
        "name": name or group, "kind": kind, "shape": "", "class": group, "kernel": "",
        "calls": calls, "flops": flops, "bytes": nbytes, "rounds": rounds, "stages": stages or {},
        "resolution": resolution, "part": "",
    }  # fmt: skip


def test_level_and_ridge() -> None:
    levels = [analyse.level_of(n, LIMITS)["name"] for n in (1000, 1001, 100_000, 100_001)]
    assert levels == ["L1", "L2", "L3", "memory"]
    assert [analyse.ridge(one, LIMITS) for one in LIMITS["levels"]] == [0.5, 1.0, 2.0, 10.0]


def test_roof() -> None:
    """Bytes fill the levels one after the other."""
    assert analyse.roof_us(0, 1000, LIMITS) == pytest.approx(0.005)
    assert analyse.roof_us(0, 10_000, LIMITS) == pytest.approx(0.005 + 0.09)
    assert analyse.roof_us(0, 200_000, LIMITS) == pytest.approx(0.005 + 0.09 + 1.8 + 10)
    assert analyse.roof_us(5_000_000, 10_000, LIMITS) == pytest.approx(50)


def test_an_op_against_the_ridge_of_one_call() -> None:
    """20 calls of 900 bytes: L1, not L3."""
    one = analyse.op(entry("elementwise", [4.0, 2.0, 3.0], 7200, 18_000, calls=20), LIMITS)
    assert (one["us"], one["level"], one["ridge"], one["intensity"]) == (3.0, "L1", 0.5, 0.4)
    assert one["memory_bound"] is True and one["roof_share"] == pytest.approx(0.03)
    two = analyse.op(entry("conv_gemm", [3.0], 9000, 18_000, calls=20), LIMITS)
    assert two["memory_bound"] is False


def test_a_time_within_its_resolution_is_not_held_against_the_roof() -> None:
    """3 us a call by a timer that counts whole ones."""
    shares = [
        analyse.op(
            entry("movement", [us], 0, 2000, calls=2, resolution=1.0), LIMITS
        )["roof_share"] for us in (6.0, 6.1)
    ]  # fmt: skip
    assert shares[0] is None and shares[1] == pytest.approx(0.01 / 6.1, rel=0.05)


def test_unknown_stays_unknown() -> None:
    one = analyse.op(entry("elementwise", [3.0], None, None), LIMITS)
    assert one["memory_bound"] is one["roof_share"] is one["level"] is None


def test_stages_have_their_share_of_the_op() -> None:
    stages = {"gather": [1.0, 1.0, 1.0], "qkv": [4.0, 4.0, 2.0]}
    one = analyse.op(entry("conv_gemm", [10.0] * 3, 1, 1, stages=stages, kind="cga"), LIMITS)
    assert [(s["class"], s["us"]) for s in one["stages"]] == [("movement", 2), ("conv_gemm", 8)]


def before():
    entries = [
        entry("conv_gemm", [50.0, 60.0, 55.0], 100_000, 1000),
        entry("normalisation", [20.0, 22.0, 18.0], 10, 1000),
        entry("movement", [10.0, 10.0, 10.0], 0, 1000),
        entry("depthwise", [5.0, 5.0, 5.0], 100, 1000),  # by the roofline only
        entry("softmax", [4.0, 4.0, 4.0], 900, 1000),  # by the paper only
    ]
    return analyse.runtime(Result("eager", "k", 0.0, [100.0, 110.0, 105.0]), entries, LIMITS, 2000)


def after(stages=True):
    inside = {"gather": [1.0, 2.0, 3.0], "qkv": [19.0, 18.0, 17.0]} if stages else {}
    entries = [entry("conv_gemm", [20.0] * 3, 100_000, 3000, stages=inside, kind="cga")]
    return analyse.runtime(Result("fused", "k", 0.0, [24.0, 25.0, 26.0]), entries, LIMITS, 2000)


def test_a_runtime() -> None:
    one, rounds = before()
    assert one["wall_us"] == 105 and one["overhead_us"] == 105 - (55 + 20 + 10 + 5 + 4)
    assert list(one["class_us"]) == list(classes.CLASSES)
    assert sum(one["class_us"].values()) == one["wall_us"]
    assert one["memory_bound_us"] == {"paper": 34.0, "paper_whole": 34.0, "roofline": 35.0}
    assert rounds["paper"].sum(axis=0).tolist() == [34.0, 36.0, 32.0]
    assert rounds["roofline"].sum(axis=0).tolist() == [35.0, 37.0, 33.0]
    assert one["movement_us"] == 10 and one["bytes"] == 5000 and one["traffic_ratio"] == 2.5


def test_a_fused_op_by_its_stages() -> None:
    one, rounds = after()
    assert one["memory_bound_us"] == {"paper": 2.0, "paper_whole": 0.0, "roofline": 0.0}
    assert one["class_us"]["movement"] == one["movement_us"] == 2.0
    assert one["class_us_whole"]["conv_gemm"] == 20.0
    assert rounds["paper"].tolist() == [[1.0, 2.0, 3.0]] and rounds["roofline"].shape == (0, 3)
    assert sum(one["class_us"].values()) == pytest.approx(one["wall_us"])


def test_without_stages_the_paper_s_figure_is_unknown() -> None:
    one, rounds = after(stages=False)
    assert one["memory_bound_us"]["paper"] is rounds["paper"] is None
    assert one["memory_bound_us"]["paper_whole"] == 0.0
    checks = {c["name"]: c for c in analyse.judge(one)}
    assert not checks["stages"]["ok"] and checks["roof"]["ok"]


def test_reduction_and_waterfall() -> None:
    (was, a), (now, b) = before(), after()
    found = analyse.reduction(was, now, "paper", (a["paper"], b["paper"]))
    assert found["reduction"] == round(1 - 2 / 34, 4)
    # The extremes of any draw: 3/32 is left, or 1/34 with rounds paired.
    low, high = found["low"], found["high"]
    assert 1 - 3 / 32 - 1e-4 <= low <= found["reduction"] <= high <= 1 - 1 / 34 + 1e-4
    assert found["low"] < found["high"]
    fall = found["waterfall"]
    assert fall["eliminated"] == 32 and fall["overhead"] == 11 - 5
    assert fall["before"] - sum(
        fall[key] for key in ("eliminated", "accelerated", "overhead")
    ) == pytest.approx(fall["after"])


def test_the_bootstrap_draws_both_in_the_same_round() -> None:
    """Twice as slow a round for both: the reduction does not move."""
    was, now = before()[0], after()[0]
    rounds = np.array([[10.0, 20.0, 40.0]])
    found = analyse.reduction(was, now, "paper", (rounds, rounds / 4))
    assert found["low"] == found["high"] == 0.75


def test_faster_than_the_roof_is_rejected() -> None:
    entries = [
        entry("conv_gemm", [1.0], 106_000, 100, name="too fast"),
        entry("conv_gemm", [1.0], 104_000, 100, name="within 5 %"),
    ]
    one, _ = analyse.runtime(Result("eager", "k", 0.0, [2.0]), entries, LIMITS, 100)
    (roof,) = [c for c in analyse.judge(one) if c["name"] == "roof"]
    assert not roof["ok"] and "too fast: 1.06" in roof["text"]
    assert "within" not in roof["text"]


def test_ops_that_take_longer_than_the_wall_are_named() -> None:
    one, _ = analyse.runtime(
        Result("eager", "k", 0.0, [2.0]), [entry("conv_gemm", [3.0])], LIMITS, 1
    )
    (found,) = [c for c in analyse.judge(one) if c["name"] == "overhead"]
    assert not found["ok"] and "150.0% of the wall time" in found["text"]


def test_a_cell_without_a_runtime() -> None:
    results = {
        "eager": Result("eager", problem="its output is off"),
        "fused": Result("fused", "k", 0.0, [2.0]),
    }
    name = {"model": "efficientvit_m0", "batch": 1, "size": 64, "threads": 1, "dtype": "float32"}
    made, checks = analyse.cell(name, results, {"fused": [entry("conv_gemm", [1.0])]}, LIMITS)
    assert [one["name"] for one in made["runtimes"]] == ["fused"] and made["reductions"] == []
    assert checks[0] == {
        "name": "efficientvit_m0 batch 1: eager measured", "ok": False, "text": "its output is off"
    }  # fmt: skip


def test_least_bytes() -> None:
    """Images and logits grow with the batch, weights do not; M5 has 12.436 million of them."""
    one, two = (analyse.least_bytes("efficientvit_m5", batch, 224) for batch in (1, 2))
    assert two - one == 4 * (3 * 224 * 224 + 1000)
    assert one - (two - one) == pytest.approx(4 * 12.436e6, rel=0.02)
