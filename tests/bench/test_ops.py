"""Benchmarks of the ops: `pytest tests/bench/test_ops.py --benchmark-only` times every shape in
every instruction set (pytest-benchmark); without that plugin the specs and the runner are tested.

No test asserts a time.
"""

from __future__ import annotations

import csv
import importlib.util
import os

import pytest
import torch

from evit_fast import _native
from evit_fast.bench import callgrind, ceilings, op_runner, report
from evit_fast.bench import cases as bench_cases
from evit_fast.export import relative_error
from evit_fast.fold import fold

OPS = op_runner.OP_NAMES
QUICK = ["--model", "m0", "--batch", "1", "--rounds", "2", "--round-ms", "1"]


def _ids(op: str) -> list[str]:
    """Names of an op's cases, without making the weights of six models at collection."""
    if op in ("stem", "classifier"):
        known = {"stem": ("M0", "M1", "M5"), "classifier": ("M0", "M2", "M3", "M4")}
        return list(known[op])
    stages = (1, 2, 3) if op != "patch_merge" else (2, 3)
    return [f"M{i}.{stage}" for i in range(6) for stage in stages]


@pytest.fixture
def instruction_set(request):
    """The native library capped at request.param; skips where the machine lacks it."""
    if request.param not in _native.isas():
        pytest.skip(f"this machine has no {request.param}")
    before = _native.isa()
    _native.set_max_isa(request.param)
    yield request.param
    _native.set_max_isa(before)


if importlib.util.find_spec("pytest_benchmark"):

    @pytest.mark.parametrize("instruction_set", ["scalar", "avx2", "avx512"], indirect=True)
    @pytest.mark.parametrize(
        ("op", "name"), [(op, n) for op in OPS for n in _ids(op)], ids=lambda part: part
    )
    def test_speed(benchmark, op: str, name: str, instruction_set: str) -> None:
        found = {case.name: case for case in bench_cases.cases(op)}
        if name not in found:
            pytest.skip("an earlier model has this shape")
        case = found[name]
        x = bench_cases.images(case, 1)
        native = bench_cases.Native(case, x)
        flops, nbytes = bench_cases.cost(case, 1)
        benchmark.extra_info.update(flops=flops, bytes=nbytes, isa=instruction_set)
        benchmark.group = f"{op} {name}"
        benchmark(native)
        assert relative_error(native.output(), bench_cases.in_double(case, x)) < 1e-5


@pytest.mark.parametrize("name", ["efficientvit_m0", "efficientvit_m5"])
def test_specs_name_every_op_of_a_model(name: str) -> None:
    """Each line of the program has a case of its shape and map size, and eager of that case agrees
    with the reference of its folded weights."""
    folded = fold(bench_cases._model(name), (0.0,), (1.0,))
    known = {op: bench_cases.cases(op, [name]) for op in OPS}
    for shape, _ in folded:
        assert shape in {case.shape for case in known[shape.op]}
    sides = {op: [case.side for case in found] for op, found in known.items()}
    assert sides["stem"] == [224] and sides["classifier"] == [4]
    assert sides["cga"] == [14, 7, 4] and sides["patch_merge"] == [14, 7]
    assert [case.name[2:] for case in known["dw_ffn"]] == [".1", ".2", ".3"]
    for op in OPS:
        case = known[op][-1]
        x = bench_cases.images(case, 2)
        native = bench_cases.Native(case, x)
        native()
        assert relative_error(native.output(), bench_cases.in_double(case, x)) < 1e-5, op


def test_one_run(tmp_path, capsys) -> None:
    """Every variant checked and timed, warm and cold; CSV and screen agree."""
    argv = [*QUICK, "--op", "cga,classifier", "--cache", "warm,cold", "--out", str(tmp_path)]
    before = _native.isa(), torch.get_num_threads(), os.sched_getaffinity(0)
    assert op_runner.main(argv) == 0
    assert (_native.isa(), torch.get_num_threads(), os.sched_getaffinity(0)) == before
    (path,) = tmp_path.glob("ops-*.csv")
    with open(path, newline="") as file:
        rows = list(csv.DictReader(file))
    variants = [("eager", ""), ("folded", ""), *(("fused", isa) for isa in _native.isas())]
    assert len(rows) == 4 * 2 * len(variants)  # cga in three stages, one classifier
    assert [row["column"] for row in rows[: len(variants)]] == [column for column, _ in variants]
    for row in rows:
        assert not row["note"] and float(row["us_p20"]) <= float(row["us"]) <= float(row["us_p80"])
        assert float(row["relative_error"]) < 1e-5 and float(row["share"]) > 0
        assert row["bound"] == "fma" or row["bound"] in ceilings.working_sets()
        assert float(row["ratio_to_eager"]) > 0 and row["ratio_to_compile"] == ""
    assert {row["case"] for row in rows if row["op"] == "cga"} == {"M0.1", "M0.2", "M0.3"}
    assert len(capsys.readouterr().out.splitlines()) == len(rows)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.OPS_BEGIN}\nold\n{report.OPS_END}\nafter\n")
    assert report.main([str(path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert "old" not in text and text.endswith(f"{report.OPS_END}\nafter\n")
    assert text.count("| cga | M0.") == 3 and text.count("| classifier | M0 |") == 1


def test_a_wrong_output_is_not_timed(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(op_runner, "FUSED_BOUND", 1e-12)
    argv = [*QUICK, "--op", "classifier", "--isa", "scalar", "--peers", "", "--out", str(tmp_path)]
    assert op_runner.main(argv) == 1
    (path,) = tmp_path.glob("ops-*.csv")
    (row,) = csv.DictReader(path.read_text().splitlines())
    assert row["us"] == "" and "off by" in row["note"]


def test_wrong_use(capsys) -> None:
    assert op_runner.main(["--op", "softmax"]) == 2
    assert "--op: unknown 'softmax'; known are stem, dw_ffn" in capsys.readouterr().err
    assert op_runner.main(["--isa", "sse9"]) == 2
    assert op_runner.main(["--model", "m9"]) == 2


def test_ceilings() -> None:
    """What the loops say fits what they did; no bound on how fast."""
    measured = ceilings.measure(_native.isas()[0], rounds=1)
    assert measured["fma_gflops"] > 0 and measured["clock_ghz"] > 0
    assert measured["ports"] >= 1
    width = 2 * measured["lanes"] * measured["fma_per_cycle"]
    assert measured["fma_gflops"] == pytest.approx(measured["clock_ghz"] * width, rel=0.5)
    text = ceilings.describe(measured)
    assert "GHz x 4 floats" in text and "copy GB/s: L1" in text
    slow = {**measured, "isa": "avx2", "ports": 2, "port_share": 0.6}
    assert "60% of" in ceilings.describe(slow) and "under 95 %" in ceilings.describe(slow)
    sizes = ceilings.cache_bytes()
    assert ceilings.level_of(1) == "L1" and ceilings.level_of(sizes["L1"] + 1) == "L2"
    assert ceilings.level_of(1 << 40) == "memory"


def test_ceiling_refuses() -> None:
    isa = _native.isas()[0]
    with pytest.raises(ValueError, match="unknown loop 'nap'; expected clock, fma, read or copy"):
        _native.ceiling("nap", isa, 1)
    with pytest.raises(ValueError, match="no instruction set 'sse9'"):
        _native.ceiling("fma", "sse9", 1)
    with pytest.raises(ValueError, match="read needs a buffer of at least 1024 bytes"):
        _native.ceiling("read", isa, 1)


def test_callgrind_drift() -> None:
    def row(shape: str, instructions: object, compiler: str = "g++ 12") -> dict:
        return {"op": "cga", "case": "M0.1", "shape": shape, "instructions": instructions,
                "compiler": compiler}  # fmt: skip

    before = [row("a", "1000"), row("b", "1000"), row("c", "1000", "g++ 9")]
    now = [row("a", 1029), row("b", 969), row("c", 1500), row("d", 1)]
    said = callgrind.drift(now, before)
    assert said == [
        "cga M0.1: 969 instructions, -3.1% from 1000",
        "cga M0.1: 1500 instructions, +50.0% from 1000 (was g++ 9)",
        "cga M0.1: no committed count; write it with --write",
    ]


def test_committed_counts_cover_every_shape() -> None:
    with open(callgrind.RESULT, newline="") as file:
        known = {(row["op"], row["case"]) for row in csv.DictReader(file)}
    assert known == {(op, case.name) for op in OPS for case in bench_cases.cases(op)}
