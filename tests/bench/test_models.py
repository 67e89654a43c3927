"""The benchmark of whole models: one small run through real processes, and what is made of it.

No test asserts a time.
"""

from __future__ import annotations

import csv
import json
import re

import pytest
import torch

from evit_fast.bench import models, peers, report, runner
from evit_fast.bench.weights import randomize
from evit_fast.cli.flags import UsageError
from evit_fast.export import relative_error
from evit_fast.model import create_model

QUICK = ["--model", "m0", "--batch", "1", "--size", "64", "--rounds", "3", "--round-ms", "1"]


def test_one_run(tmp_path, capsys, monkeypatch) -> None:
    """Every peer checked and timed; a missing one named; CSV, JSON and screen agree."""
    absent = peers.PEERS["openvino"]._replace(needs=("evit_fast_has_no_such_module",))
    monkeypatch.setitem(peers.PEERS, "openvino", absent)
    names = ["fused", "eager", "folded"]
    names += [] if peers.PEERS["onnxruntime"].missing() else ["onnxruntime"]
    argv = [*QUICK, "--peers", ",".join([*names, "openvino"]), "--out", str(tmp_path)]
    assert models.main(argv) == 0
    (path,) = tmp_path.glob("models-*.csv")
    with open(path, newline="") as file:
        rows = {row["column"]: row for row in csv.DictReader(file)}
    assert list(rows) == [*names, "openvino"]
    saved = json.loads(path.with_suffix(".json").read_text())
    (cell,) = saved["cells"]
    limits = cell["ceilings"]
    assert len(cell["rounds_fma_gflops"]) == 3 and limits["isa"] in rows["fused"]["machine"]
    assert set(limits["read"]) == set(limits["copy"]) == {"L1", "L2", "L3", "memory"}
    for name in names:
        row = rows[name]
        assert row["op"] == "efficientvit_m0" and row["shape"] == "1x3x64x64"
        assert row["rounds"] == "3" and len(cell["rounds_us"][name]) == 3
        assert float(row["us_p20"]) <= float(row["us"]) <= float(row["us_p80"])
        assert float(row["relative_error"]) < 1e-5
        assert 0 < float(row["share"]) < 1.1
        assert row["machine"] and row["commit"] and row["date"] and row["kernel"]
    assert rows["eager"]["ratio_to_eager"] == rows["fused"]["fused_ratio"] == "1.0"
    assert rows["openvino"]["us"] == ""
    assert rows["openvino"]["note"] == "evit_fast_has_no_such_module is not installed"
    text = capsys.readouterr().out
    assert re.search(r"^openvino +evit_fast_has_no_such_module is not installed$", text, re.M)


def test_a_wrong_output_is_not_timed(tmp_path, monkeypatch) -> None:
    """The others are; the exit code says that something failed."""
    monkeypatch.setattr(runner, "PEER_BOUND", 1e-12)
    assert models.main([*QUICK, "--peers", "folded", "--out", str(tmp_path)]) == 1
    (path,) = tmp_path.glob("models-*.json")
    (cell,) = json.loads(path.read_text())["cells"]
    assert len(cell["rounds_us"]["fused"]) == 3 and cell["rounds_us"]["folded"] == []
    assert list(cell["problems"]) == ["folded"]
    assert "off by" in cell["problems"]["folded"] and "1e-12 is" in cell["problems"]["folded"]


def test_a_process_that_dies_is_reported(monkeypatch) -> None:
    command = "import os, sys; print('no such luck', file=sys.stderr, flush=True); os._exit(3)"
    monkeypatch.setattr(runner, "COMMAND", command)
    cell = runner.measure(
        "efficientvit_m0", 1, 1, ["folded"], rounds=2, round_s=1e-3, size=64, seed=0, cpus=None
    )
    (found,) = cell.results
    assert found.problem == "its process ended with 3: no such luck"
    assert found.rounds == [] and not found.missing


def test_model_names() -> None:
    full = [f"efficientvit_m{i}" for i in range(6)]
    assert models.model_names("m0..m5") == full
    assert models.model_names("m1..m2,M5,m1") == [full[1], full[2], full[5]]
    assert models.model_names("efficientvit_m3") == [full[3]]
    with pytest.raises(ValueError, match="the range is empty"):
        models.model_names("m5..m0")


def test_wrong_use(capsys) -> None:
    assert models.main(["--peers", "tensorflow"]) == 2
    assert "unknown peer 'tensorflow'; known are fused, eager" in capsys.readouterr().err
    assert models.main(["--model", "m9"]) == 2
    assert "unknown model 'm9'" in capsys.readouterr().err
    with pytest.raises(UsageError):
        models._peers("eager,nothing")


def test_folded_eager_equals_eager() -> None:
    model = randomize(create_model("m1").eval(), seed=2)
    x = torch.randn(1, 3, 224, 224, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = model.double()(x.double()).numpy()
        folded = peers.fold_batch_norms(model)
        got = folded(x).numpy()
    assert not [m for m in folded.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)]
    assert relative_error(got, expected) < 1e-5


def test_quantiles() -> None:
    assert runner.spread([3.0, 1.0, 2.0, 5.0, 4.0]) == pytest.approx((3.0, 1.8, 4.2))
    assert runner.spread([7.0]) == (7.0, 7.0, 7.0)


def _row_results() -> list[runner.Result]:
    return [
        runner.Result("fused", "k", 1e-7, [100.0, 200.0, 300.0]),
        runner.Result("eager", "t", 1e-7, [300.0, 400.0, 600.0]),
        runner.Result("openvino", missing=True, problem="openvino is not installed"),
    ]


def _rows() -> list[report.Row]:
    cell = runner.Cell(_row_results(), [{"fma_gflops": rate} for rate in (20.0, 10.0, 40.0)])
    return report.rows(
        cell, model="efficientvit_m0", batch=4, threads=1, size=224,
        cost=(1_000_000, 2_000_000),
        stamp={"machine": "a machine", "commit": "abc", "date": "2026-01-02"},
    )  # fmt: skip


def test_rows_take_ratios_round_by_round() -> None:
    fused, eager, absent = _rows()
    assert (fused.us, fused.images_per_s) == (200.0, 20_000.0)
    assert (fused.gflops, fused.gbs) == (5.0, 10.0)
    # 10, 5 and 3.3 GFLOP/s of 20, 10 and 40: shares of the same round.
    assert (fused.share, fused.fma_gflops, absent.share) == (0.5, 20.0, "")
    # 3, 2, 2: the medians' own ratio happens to be the same, the spread is not.
    assert (eager.fused_ratio, eager.fused_ratio_p20, eager.fused_ratio_p80) == (2.0, 2.0, 2.6)
    assert fused.ratio_to_eager == 2.0
    assert absent.us == absent.fused_ratio == "" and absent.note == "openvino is not installed"


def test_screen_is_aligned() -> None:
    _, header, fused, eager, absent = report.screen(_rows()).splitlines()
    at = header.index("ms") + 2
    assert fused[:at].endswith("0.200") and eager[:at].endswith("0.400")
    assert absent.split("  ")[-1].strip() == "openvino is not installed"
    assert "2.00x" in eager and "x" not in fused.partition("0.200")[2]


def test_readme_between_its_markers(tmp_path) -> None:
    path = tmp_path / "models-x.csv"
    report.write_csv(path, _rows())
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    assert report.main([str(path), "--readme", str(readme)]) == 0
    text = readme.read_text()
    assert text.startswith(f"before\n{report.BEGIN}\n") and text.endswith(f"{report.END}\nafter\n")
    assert "old" not in text
    best = "**2.00×** (eager (timm), 17%)"
    assert f"| M0 | 20000 | 0.20 | 50% | {best} | **2.00×** (2.00–2.60) |" in text
    assert "a machine" in text and "commit abc, 2026-01-02" in text
    assert "openvino: openvino is not installed." in text
    assert report.main([str(path), "--readme", str(readme)]) == 0
    assert readme.read_text() == text


def test_readme_without_markers(tmp_path, capsys) -> None:
    path = tmp_path / "models-x.csv"
    report.write_csv(path, _rows())
    readme = tmp_path / "README.md"
    readme.write_text("nothing here\n")
    assert report.main([str(path), "--readme", str(readme)]) == 2
    assert report.BEGIN in capsys.readouterr().err
    assert readme.read_text() == "nothing here\n"
