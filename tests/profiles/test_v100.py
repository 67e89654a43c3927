"""The model of a V100: against a case computed by hand, and what must hold for any kernel."""

from __future__ import annotations

import dataclasses
import json

import pytest

from evit_fast.config import VARIANTS
from evit_fast.cuda import compiled
from evit_fast.profiles import v100, v100_counts
from evit_fast.profiles.v100 import V100, cycles, time
from evit_fast.profiles.v100_counts import Counts

# 320 blocks of 128 threads, two on an SM: two waves.
HAND = Counts(
    blocks=320, threads=128, shared_bytes=48 << 10, registers=128, dram_bytes=9_000_000,
    issued=40_000, longest=10_000, hmma=16_000, fma=6_000, alu=4_000, xu=1_000,
    shared_waves=5_000, least_waves=4_000, lines=2_000, sectors=9_000, distinct=5_000, stored=500,
)  # fmt: skip
COUNTS = v100_counts.read()
ROWS = pytest.mark.parametrize("key", COUNTS, ids=lambda key: "-".join(key).replace(" ", "_"))


def test_by_hand():
    assert cycles(HAND) == {
        "tensor": 8_000,  # 16,000 / 4 m8n8k4 of 1024 multiply-adds, 512 a cycle
        "fp32": 3_000,  # 32 threads on 64 lanes
        "integer": 2_000,
        "conversion": 2_000,
        "shared": 7_000,
        "issue": 10_000,
        "l2": 8_000,  # 5,500 sectors of 32 bytes, 22 a cycle
    }
    t = time(HAND)
    assert t.blocks_per_sm == 2
    # 320 / (80 * 2) = 2 waves, each 2 * 10,000 busy + 2.2 * 10,000 waiting cycles at 1.53 GHz.
    assert t.us == pytest.approx(2 * (20_000 + 22_000) / 1530 + 2)
    assert t.bounds["issue"] == pytest.approx(40_000 / 1530)
    assert t.bounds["latency"] == pytest.approx(44_000 / 1530)
    assert t.bounds["dram"] == pytest.approx(10)
    assert t.bound == "latency"


def test_a_last_wave_that_is_not_full_has_fewer_blocks_on_an_sm():
    cycle = 1 / 1530
    assert time(HAND._replace(blocks=321)).us == pytest.approx(
        time(HAND).us + (10_000 + 22_000) * cycle
    )
    assert time(HAND._replace(blocks=1)).us == time(HAND._replace(blocks=80)).us


def test_memory_sets_the_time_where_it_is_slowest():
    t = time(HAND._replace(dram_bytes=9_000_000_000))
    assert (t.bound, t.us) == ("dram", pytest.approx(10_002))


def test_a_block_that_does_not_fit_is_an_error():
    with pytest.raises(ValueError, match="fit on no SM"):
        time(HAND._replace(shared_bytes=97 << 10))


@ROWS
def test_bounds_of_every_launch(key):
    _, c = COUNTS[key]
    t = time(c)
    assert t.bounds[t.bound] == max(t.bounds.values())
    assert t.us >= max(t.bounds.values())
    busy = max(v for unit, v in t.bounds.items() if unit not in ("latency", "dram"))
    assert t.us == pytest.approx(max(busy + t.bounds["latency"], t.bounds["dram"]) + V100.launch_us)
    assert 0 < c.distinct <= c.sectors and c.least_waves <= c.shared_waves
    assert c.longest <= c.issued <= c.longest * c.threads / 32 + 1


@ROWS
@pytest.mark.parametrize("rate", ["clock_ghz", "dram_gbs", "l2_bytes", "tensor", "shared_waves"])
def test_a_faster_card_is_never_slower(key, rate):
    _, c = COUNTS[key]
    times = [
        time(c, dataclasses.replace(V100, **{rate: getattr(V100, rate) * factor})).us
        for factor in (0.5, 1, 2, 4)
    ]
    assert times == sorted(times, reverse=True)


@pytest.mark.parametrize("model", VARIANTS)
def test_sums(model):
    rows = v100.model_rows(model, v100.BATCH, COUNTS)
    s = v100.summary(model, v100.BATCH, COUNTS)
    assert s["ms"] == pytest.approx(sum(r.calls * r.us for r in rows) / 1e3)
    assert s["images_per_s"] == pytest.approx(v100.BATCH / s["ms"] * 1e3)
    assert sum(s["share_of_op"].values()) == pytest.approx(1)
    assert sum(s["share_of_bound"].values()) == pytest.approx(1)
    ops = v100.model_shapes(model)
    assert sum(r.calls for r in rows if r.gflop) == len(ops)
    assert all(r.tensor_share < 1 for r in rows)


@pytest.mark.parametrize("model", VARIANTS)
def test_tensor_cores_multiply_no_less_than_the_matrices_ask(model):
    """Products of the FFN: exactly 2 C F a token, of whole blocks."""
    for (op, shape, side, _, batch), (_, c) in COUNTS.items():
        if op == "dw_ffn":
            C, F = (int(word.split("=")[1]) for word in shape.split(" ")[:2])
            tokens = int(batch) * int(side) ** 2
            done = c.blocks * c.hmma / 4 * 1024
            assert 1 <= done / (2 * C * F * tokens) < 1.2


@pytest.mark.parametrize("model", VARIANTS)
def test_sensitivity(model):
    changes = v100.sensitivity(model, v100.BATCH, COUNTS)
    assert list(changes) == v100.ASSUMPTIONS
    for name, (less, more) in changes.items():
        worse, better = (more, less) if name in ("stall", "launch_us") else (less, more)
        assert worse >= 0 >= better


def test_the_committed_pages_are_of_the_committed_counts(tmp_path):
    v100.write(list(VARIANTS), v100.BATCH, tmp_path)
    for name in ("v100-modelled.md", "v100-modelled.csv"):
        assert (tmp_path / name).read_text() == (v100.RESULTS / name).read_text(), "make v100"


def test_stall_is_what_the_cycle_model_says():
    """Cycles per block with two on an SM (Card's docstring), from the counts: 5 % too few at worst
    and 25 % too many.
    """
    found = []
    for shape, stage, known in (
        ("C=288 heads=3", "attention", 24_300), ("C=64 heads=4", "attention", 15_700),
        ("C=288 heads=3", "projection", 18_700),
    ):  # fmt: skip
        c = next(
            c for (op, s, *_), (name, c) in COUNTS.items()
            if op == "cga" and s.startswith(shape) and name == stage
        )  # fmt: skip
        units = cycles(c, dataclasses.replace(V100, l2_bytes=32))  # one SM alone
        found.append((max(units.values()) + V100.stall * c.longest / 2) / known)
    assert all(0.95 < ratio < 1.25 for ratio in found), found


def test_json(capsys):
    assert v100.main(["--model", "m0", "--json"]) == 0
    (one,) = json.loads(capsys.readouterr().out)
    assert one["label"] == "modelled" and one["paper_images_per_s"] == 27644


@pytest.mark.full
@pytest.mark.parametrize("model", ["efficientvit_m0", "efficientvit_m5"])
def test_counts_are_of_this_code(model):
    for s, side in dict.fromkeys(v100.model_shapes(model)):
        for key, (stage, c) in v100_counts.count(s, side, v100.BATCH).items():
            assert COUNTS[(*key, str(v100.BATCH))] == (stage, c), f"{key}: run make v100"


def test_registers_are_those_of_the_compiled_table():
    _, table = compiled.read_table()
    for s, side in dict.fromkeys(v100.model_shapes("m5")):
        plan = v100_counts.launches(s, side, v100.BATCH)
        for step, launch in enumerate(plan):
            counted = COUNTS[(s.op, v100_counts.shape_text(s), str(side), str(step), "2048")][1]
            special = compiled.Special(launch.kernel, s, side, v100.BATCH)
            key = compiled.row_key(special, v100_counts.DTYPE, v100_counts.ARCH)
            row = next(v for k, v in table.items() if k[:3] + k[4:] == key[:3] + key[4:])
            assert (int(row[0]), int(row[1]), int(row[2])) == (
                counted.registers, counted.shared_bytes, counted.threads,
            )  # fmt: skip
