"""`evit-fast profile`: what it writes and prints, and one sentence for every wrong use.

No test asserts a time.
"""

from __future__ import annotations

import copy
import gzip
import json
import sys

import pytest

from evit_fast.cli import profile
from evit_fast.cli.main import main
from evit_fast.profiles import classes, measure, trace

LIMITS = {  # far above any machine
    "fma_gflops": 1e6, "threads": 1, "isa": "none", "date": "2026-01-02",
    "levels": [
        {"name": name, "bytes": nbytes, "copy_gbs": 1e5, "read_gbs": 1e5}
        for name, nbytes in (("L1", 32 << 10), ("L2", 1 << 20), ("L3", 32 << 20), ("memory", None))
    ],
}  # fmt: skip
QUICK = ["--model", "m0", "--batch", "1", "--size", "64", "--rounds", "2", "--round-ms", "1"]


@pytest.fixture
def evit(capsys, monkeypatch):
    """Runs the command in this process -> (exit code, stdout, stderr)."""

    def run(*arguments):
        words = ["profile", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", ["evit-fast", *words])
        capsys.readouterr()
        try:
            code = main(words)
        except SystemExit as e:  # argparse
            code = e.code
        return code, *capsys.readouterr()

    monkeypatch.setattr(measure, "ceilings_path", lambda: pytest.fail("a cache of the user's"))
    monkeypatch.setattr(measure, "ceilings", lambda threads, again=False: LIMITS)
    return run


def test_one_run(evit, tmp_path) -> None:
    """Two runtimes through real processes; JSON, file, trace and table agree."""
    out = tmp_path / "new" / "results"
    path = tmp_path / "t.json.gz"
    code, printed, err = evit(*QUICK, "--peers", "eager", "--json", "--out", out, "--trace", path)
    assert code == 0, err
    document = json.loads(printed)
    (file,) = out.iterdir()
    assert json.loads(file.read_text()) == document == measure.read(file)
    assert file.name.startswith("profile-") and file.name.endswith("-m0-b1-t1.json")
    assert (document["format"], document["version"]) == ("evit_fast.profile", 1)
    assert document["command"].startswith("evit-fast profile --model m0 --batch 1")
    assert document["ceilings"] == LIMITS
    for key in ("machine", "date", "commit", "device", "environment"):
        assert document[key]
    (cell,) = document["cells"]
    assert [one["name"] for one in cell["runtimes"]] == ["eager", "fused"]
    for one in cell["runtimes"]:
        assert list(one["class_us"]) == list(one["class_us_whole"]) == list(classes.CLASSES)
        assert [op["us"] for op in one["ops"]] == sorted(
            (o["us"] for o in one["ops"]), reverse=True
        )
    text = profile.table(document)
    assert "efficientvit_m0  batch 1  1 threads" in text and "\neager " in text
    assert "memory-bound time (roofline) against eager: -" in text
    events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "thread_name"} == {"eager", "fused"}
    cga = next(e for e in events if e["name"] == "cga M0.1 (block 1)")
    assert cga["args"]["shape"] == "1x4x4x64" and cga["args"]["flops"] > 0 and cga["dur"] > 0


def test_a_trace_nests_stages() -> None:
    call = {
        "name": "cga M0.1 (block 1)", "kind": "cga", "group": "conv_gemm", "start": 100.0,
        "us": 9.0, "shape": "1x14x14x64", "flops": 5, "bytes": 6, "kernel": "k",
        "stages": [("gather", 2.0), ("qkv", 7.0)],
    }  # fmt: skip
    cell = {"model": "m", "batch": 1, "threads": 1}
    found = [e for e in trace.events([(cell, {"fused": [call, {**call, "start": 109.0}]})])]
    spans = [(e["name"], e["cat"], e["ts"], e["dur"]) for e in found if e["ph"] == "X"]
    assert spans[:3] == [
        ("cga M0.1 (block 1)", "conv_gemm", 0.0, 9.0),
        ("gather", "movement", 0.0, 2.0),
        ("qkv", "conv_gemm", 2.0, 7.0),
    ]
    assert spans[3][2] == 9.0


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model", "m9"], "unknown model 'm9'"),
        (["--model", "m5..m0"], "the range is empty"),
        (["--peers", "tensorflow"], "'tensorflow' cannot be profiled; known are eager, folded"),
        (["--peers", "eager,litert"], "'litert' cannot be profiled"),
        (["--batch", "x"], "--batch x: expected"),
        (["--batch", "0"], "--batch: expected numbers of at least 1"),
        (["--device", "tpu"], "--device tpu: expected cpu or cuda"),
        (["different", "a", "b"], "or: diff A.json B.json"),
        (["diff", "a"], "or: diff A.json B.json"),
    ],
)
def test_wrong_use(evit, arguments, sentence) -> None:
    code, out, err = evit(*arguments)
    assert code == 2 and out == ""
    assert sentence in err and err.count("\n") == 1 and err.startswith("evit-fast profile: ")


def test_no_gpu(evit, monkeypatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    code, _, err = evit("--device", "cuda")
    assert code == 2 and "this machine has no GPU that torch can use" in err


@pytest.mark.parametrize("flag", ["--html", "--trace", "--out"])
def test_a_path_that_cannot_be_written_is_refused_before_measuring(
    evit, flag, tmp_path, monkeypatch
) -> None:
    monkeypatch.setattr(measure, "cell", lambda *a, **k: pytest.fail("it measured"))
    file = tmp_path / "file"
    file.write_text("")
    code, out, err = evit(*QUICK, flag, file / "below")
    assert code == 2 and out == "" and "cannot be written" in err and err.count("\n") == 1
    assert list(tmp_path.iterdir()) == [file]


def test_a_report_without_its_writer(evit, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(profile, "DRAWING", ("jinja2", "no_such_module"))
    code, _, err = evit(*QUICK, "--html", tmp_path / "a.html")
    assert code == 2 and "--html needs no_such_module: pip install" in err


def document(wall=100.0, version=1, paper=30.0):
    runtime = {
        "name": "fused", "wall_us": wall, "overhead_us": 4.0,
        "memory_bound_us": {"paper": paper, "paper_whole": 0.0, "roofline": None},
    }  # fmt: skip
    cell = {
        "model": "efficientvit_m0", "batch": 1, "size": 224, "threads": 1, "dtype": "float32",
        "runtimes": [runtime],
    }  # fmt: skip
    return {
        "format": "evit_fast.profile", "version": version, "machine": "a machine", "commit": "abc",
        "date": "2026-01-02", "cells": [cell],
    }  # fmt: skip


@pytest.fixture
def saved(tmp_path):
    def save(name, content):
        (tmp_path / name).write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path / name

    return save


def test_diff(evit, saved) -> None:
    a, b = saved("a.json", document()), saved("b.json", document(50.0, paper=None))
    code, out, _ = evit("diff", a, b, "--json")
    rows = {row["what"]: row for row in json.loads(out)}
    assert code == 0 and list(rows) == ["wall", "memory-bound, paper", "overhead"]
    assert rows["wall"]["ratio"] == 0.5 and rows["memory-bound, paper"]["ratio"] is None
    code, out, _ = evit("diff", a, b)
    assert code == 0 and "efficientvit_m0 b1 t1 fused wall" in out and "0.50" in out


def test_diff_of_what_is_no_profile(evit, saved, tmp_path) -> None:
    good = saved("good.json", document())
    other = copy.deepcopy(document())
    other["cells"][0]["batch"] = 2
    for path, sentence in (
        (tmp_path / "absent.json", "No such file"),
        (saved("text.json", "hello"), "not JSON"),
        (saved("list.json", [1]), "not a profile"),
        (saved("other.json", {"format": "x"}), "not a profile"),
        (saved("v2.json", document(version=2)), "a profile of version 2, but this is version 1"),
        (saved("b2.json", other), "share no model, batch, threads and runtime"),
    ):
        code, out, err = evit("diff", good, path)
        assert code == 2 and out == "" and sentence in err and err.count("\n") == 1, path


def test_rejected_measurements_end_in_1(evit, monkeypatch) -> None:
    one = {"model": "m", "batch": 1, "threads": 1, "dtype": "float32", "runtimes": [],
           "reductions": []}  # fmt: skip
    for name, code in (("a roof", 1), ("a measured", 1), ("a not installed", 0), ("a bytes", 0)):
        checks = [{"name": name, "ok": False, "text": "because"}]
        monkeypatch.setattr(
            measure, "cell", lambda *a, checks=checks, **k: (one, checks, {"fused": []})
        )
        got, out, _ = evit(*QUICK)
        assert got == code and f"{name}: because" in out
