"""`make gpu` where there is no card: the dry run, what it writes, and that nobody mistakes it.

No test asserts a time.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from evit_fast.bench.gpu import __main__ as gpu
from evit_fast.bench.gpu import bench, card, numerics, repeats, results, subjects, summary
from evit_fast.bench.gpu.card import Card, Ceilings, timing
from evit_fast.bench.gpu.results import WARNING, Record, Store
from evit_fast.kernels import picture
from tests import close

STAMP = {"card": "a card", "arch": 90, "driver": "1", "torch": "2", "triton": "3", "commit": "abc",
         "sources": "123"}  # fmt: skip
needs_no_card = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")


def run(tmp_path, *argv: str) -> int:
    """The script behind its change of process."""
    return gpu.run(gpu.parser().parse_args([*argv, "--out", str(tmp_path)]))


@pytest.fixture
def stamp(monkeypatch):
    """Whoever edits the sources meanwhile: two runs are of the same."""
    monkeypatch.setattr(Card, "stamp", lambda self: STAMP)


@pytest.fixture
def reference(monkeypatch, stamp):
    """The reference column in the place of the kernels, which take Triton's interpreter."""
    monkeypatch.setattr(subjects, "COLUMNS", ("reference",))


class _Cuda:
    """As much of torch.cuda as the script uses, over CPU tensors. A captured call runs once, when
    it is captured.
    """

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            self.at = 0.0

        def record(self) -> None:
            self.at = time.perf_counter()

        def synchronize(self) -> None:
            assert self.at

        def elapsed_time(self, end) -> float:
            return (end.at - self.at) * 1e3

    class Stream:
        def wait_stream(self, other) -> None: ...

    class CUDAGraph:
        def replay(self) -> None: ...

    def current_stream(self) -> Stream:
        return self.Stream()

    def stream(self, stream):
        return contextlib.nullcontext()

    graph = stream

    def synchronize(self) -> None: ...

    empty_cache = synchronize

    def get_device_properties(self, index: int):
        return SimpleNamespace(L2_cache_size=1 << 16)


@pytest.fixture
def pretended_card(monkeypatch, stamp):
    """The script believes in a card; ops run in the native CPU column, in float32."""
    made = subjects.fused
    without = lambda *args, graphs=None, **options: made(*args, **options)  # noqa: E731
    for module in (subjects, numerics, repeats, bench):
        monkeypatch.setattr(module, "fused", without, raising=False)
    monkeypatch.setattr(subjects, "COLUMNS", ("cpu", "cuda"))
    for name in [name for name in dir(_Cuda) if not name.startswith("_")]:
        monkeypatch.setattr(torch.cuda, name, getattr(_Cuda(), name))
    monkeypatch.setattr(Card, "device", torch.device("cpu"))
    monkeypatch.setattr(card, "PRODUCT", 64)
    monkeypatch.setattr(card, "COPIED", 1 << 16)
    monkeypatch.setattr(card, "here", lambda: Card("NVIDIA Pretended", 90, False))
    monkeypatch.setattr(bench.peers, "GROUPS", (("eager", "folded", "graph", "jit"),))


@needs_no_card
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_code_of_a_card(tmp_path, pretended_card, capsys) -> None:
    """Every part as a card has it: sizes, batches, graphs, events, ceilings, peers."""
    argv = ("--models", "m0", "--dtypes", "float32", "--batches", "1,3", "--repeats", "3")
    assert run(tmp_path, *argv, "--rounds", "2") == 0, capsys.readouterr().out
    saved = json.loads((tmp_path / "gpu-nvidia-pretended.json").read_text())
    assert saved["dry_run"] is False and not any(r["dry_run"] for r in saved["records"])
    records = saved["records"]
    assert {record["part"] for record in records} == set(gpu.PARTS)
    timed = {r["column"]: r for r in records if r["part"] == "bench" and r["check"] == "batch 3"}
    assert set(timed) == {"cpu", "eager", "folded", "graph", "jit"}
    assert all(record["us"] > 0 and record["error"] < 1e-5 for record in timed.values())
    assert {r["nearer"] for r in records if r["share"] != ""} <= {"float32 FLOP/s", "L2", "memory"}
    shapes = [r["shape"] for r in records if r["item"] == "cga" and r["part"] == "ops"]
    assert len(shapes) == 6 and any(shape.startswith("3x14x14 cga C=64") for shape in shapes)
    text = (tmp_path / "gpu-nvidia-pretended.md").read_text()
    assert "over the best peer" in text and WARNING not in text
    assert "captured by the caller, graph" in {r["check"] for r in records}
    assert run(tmp_path, *argv, "--rounds", "2") == 0
    assert "  ops/" not in capsys.readouterr().out.rpartition("column cuda")[2]  # all done


@needs_no_card
@pytest.mark.timeout(1800)  # two minutes of a processor, in the interpreter
@pytest.mark.parametrize(
    "parts", ["ops", pytest.param(",".join(gpu.PARTS), marks=pytest.mark.full, id="all")]
)
def test_dry_run(tmp_path, parts) -> None:
    """On the CPU, kernels interpreted: it says so first, and so does what it leaves."""
    variables = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    variables["PYTHONPATH"] = os.pathsep.join(os.path.abspath(p or ".") for p in sys.path)
    done = subprocess.run(
        [sys.executable, "-m", "evit_fast.bench.gpu", "--parts", parts, "--out", str(tmp_path)],
        capture_output=True, text=True, env=variables, timeout=1700,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[0] == WARNING
    assert summary.owed() in done.stdout and "every check passed" in done.stdout
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"gpu-dry-run.json", "gpu-dry-run.csv", "gpu-dry-run.md"}
    saved = json.loads((tmp_path / "gpu-dry-run.json").read_text())
    assert saved["dry_run"] is True and saved["warning"] == WARNING
    records = saved["records"]
    assert {record["part"] for record in records} == set(parts.split(","))
    assert all(record["dry_run"] is True for record in records)
    ops = {"stem", "dw_ffn", "cga", "patch_merge", "classifier"}
    assert ops <= {record["item"] for record in records if record["column"] == "triton"}
    with open(tmp_path / "gpu-dry-run.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(records) and {row["dry_run"] for row in rows} == {"True"}
    text = (tmp_path / "gpu-dry-run.md").read_text()
    assert text.startswith(f"**{WARNING}") and "images/s" not in text


def test_interpreter_is_set_before_triton(monkeypatch) -> None:
    """Without a card the process becomes one with TRITON_INTERPRET=1; with one it never is."""
    calls = []
    monkeypatch.setattr(os, "execve", lambda *args: calls.append(args))
    monkeypatch.setattr(gpu, "run", lambda args: 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    gpu.main(["--parts", "ops"])
    ((path, argv, variables),) = calls
    assert path == sys.executable and argv[1:] == ["-m", gpu.MODULE, "--parts", "ops"]
    assert variables["TRITON_INTERPRET"] == "1"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert gpu.main([]) == 0 and len(calls) == 1
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    assert gpu.main([]) == 2


@needs_no_card
def test_a_wrong_kernel_fails_the_run(tmp_path, reference, monkeypatch, capsys) -> None:
    """One gain off by a percent in one op: its step and the run fail, the others pass."""
    right = subjects.OneOp.__call__

    def wrong(self, x, column):
        return right(self, x, column) * (1.01 if self.line.startswith("cga") else 1.0)

    monkeypatch.setattr(numerics.OneOp, "__call__", wrong)
    monkeypatch.setattr(numerics, "check_model", lambda *args: [])
    assert run(tmp_path, "--parts", "numerics") == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("FAILED")]
    assert len(failed) == 1 and "numerics/cga-M0" in failed[0]
    records = json.loads((tmp_path / "gpu-dry-run.json").read_text())["records"]
    assert {r["item"] for r in records if r["passed"] is False} == {"cga"}
    monkeypatch.setattr(numerics.OneOp, "__call__", right)  # only what failed runs again
    assert run(tmp_path, "--parts", "numerics") == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "  numerics/" in line]
    assert len([line for line in lines if "cga-M0" in line]) == 1
    assert not [line for line in lines if "dw_ffn" in line]


@needs_no_card
def test_a_large_batch_is_checked_image_by_image(tmp_path, reference, monkeypatch, capsys) -> None:
    """One bit off in the third image of dw_ffn, NaN lost in cga."""
    right = subjects.OneOp.__call__

    def wrong(self, x, column):
        y = right(self, x, column)
        if self.line.startswith("dw_ffn") and len(y) > 2:
            y[2].view(torch.int16).view(-1)[0] += 1
        return y.nan_to_num() if self.line.startswith("cga") else y

    monkeypatch.setattr(numerics.OneOp, "__call__", wrong)
    monkeypatch.setattr(numerics, "check_model", lambda *args: [])
    assert run(tmp_path, "--parts", "numerics") == 1
    records = json.loads((tmp_path / "gpu-dry-run.json").read_text())["records"]
    assert [(r["item"], r["check"]) for r in records if r["passed"] is False] == [
        ("dw_ffn", "float64, large batch"),
        ("cga", "NaN where the reference has it"),
    ]
    assert "float64, large batch: copies of an image have" in capsys.readouterr().out


@needs_no_card
def test_what_a_step_raises_is_its_result(tmp_path, reference, monkeypatch, capsys) -> None:
    def broken(*args):
        raise RuntimeError("no such luck\nand more")

    monkeypatch.setattr(numerics, "check_op", broken)
    monkeypatch.setattr(numerics, "check_model", lambda *args: [])
    assert run(tmp_path, "--parts", "numerics") == 1
    assert capsys.readouterr().out.count("RuntimeError: no such luck\n") == 5


@needs_no_card
def test_lost_bits_fail(tmp_path, reference, monkeypatch, capsys) -> None:
    """A model that answers differently each time, in its last bits."""
    made = subjects.fused

    def shaky(*args, **options):
        model, calls = made(*args, **options), []

        def forward(x):
            calls.append(1)
            return model(x) * (1 + 2e-3 * (len(calls) % 2))

        return forward

    monkeypatch.setattr(repeats, "fused", shaky)
    assert run(tmp_path, "--parts", "graphs,repeats") == 1
    text = capsys.readouterr().out
    assert "raw == graph" in text and "repeats are bit-equal: 2 repeats" in text


@needs_no_card
def test_budget_starts_nothing_that_does_not_fit(tmp_path, reference, capsys) -> None:
    assert run(tmp_path, "--budget", "0") == 0
    text = capsys.readouterr().out
    assert "\nok" not in text and "did not fit in 0 s" in text
    budget = gpu.Budget(100)
    assert budget.fits("a", 90) and not budget.fits("a", 110)
    budget.took("a", 150)
    assert not budget.fits("a", 1) and budget.fits("b", 90)


@needs_no_card
@pytest.mark.parametrize("fault", ["raises", "wrong"])
def test_a_peer_that_is_wrong_or_broken_is_not_timed(
    tmp_path, reference, monkeypatch, fault
) -> None:
    build = bench.peers.build

    def broken(name, *args):
        forward = build(name, *args)
        if name != "folded":
            return forward
        if fault == "raises":
            raise RuntimeError("no such luck")
        return lambda: 1.1 * forward()

    monkeypatch.setattr(bench.peers, "build", broken)
    assert run(tmp_path, "--parts", "bench") == 0
    records = json.loads((tmp_path / "gpu-dry-run.json").read_text())["records"]
    by_column = {record["column"]: record for record in records}
    note = {"raises": "RuntimeError: no such luck", "wrong": "ValueError: off by 1.0e-01"}[fault]
    assert by_column["folded"]["note"].startswith(note)
    assert by_column["folded"]["us"] == by_column["folded"]["passed"] == ""
    assert by_column["reference"]["ratio"] == 1.0 and by_column["eager"]["us"] > 0


@needs_no_card
@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (("--parts", "speed"), "--parts: unknown 'speed'; here are numerics, graphs"),
        (("--peers", "compile"), "--peers: unknown 'compile'; here are eager, folded"),
        (("--dtypes", "bfloat16"), "--dtypes: unknown 'bfloat16'; here are float16, float32"),
        (("--models", "m9"), "unknown model 'm9'"),
        (("--batches", "0"), "--batches: expected numbers of at least 1"),
    ],
)
def test_wrong_use(tmp_path, capsys, argv, sentence) -> None:
    assert run(tmp_path, *argv) == 2
    assert sentence in capsys.readouterr().err


def test_a_later_run_goes_on(tmp_path) -> None:
    """The same card and sources: what passed is done. Other sources, or a failure: it is not."""
    store = Store(tmp_path, "a-card", STAMP, dry_run=False)
    store.add("one", [Record("numerics", "cga", "float64", passed=True)])
    store.add("two", [Record("numerics", "stem", "float64", passed=False)])
    again = Store(tmp_path, "a-card", STAMP, dry_run=False)
    assert again.done("one") and not again.done("two") and not again.done("three")
    other = Store(tmp_path, "a-card", {**STAMP, "sources": "456"}, dry_run=False)
    assert not other.done("one") and other.present() == []
    other.add("two", [Record("numerics", "stem", "ran", passed=True)])
    saved = json.loads((tmp_path / "gpu-a-card.json").read_text())
    assert [(r["item"], r["run"], r["dry_run"]) for r in saved["records"]] == [
        ("cga", 0, False),
        ("stem", 1, False),
    ]
    assert saved["dry_run"] is False and "warning" not in saved and len(saved["runs"]) == 2


def test_a_dry_run_has_a_name_of_its_own(tmp_path) -> None:
    store = Store(tmp_path, "nvidia-h100", STAMP, dry_run=True)
    store.add("one", [Record("bench", "m0", "batch 1", us=1.0, dry_run=False)])
    (path,) = tmp_path.glob("*.json")
    assert path.name == "gpu-dry-run.json"
    assert json.loads(path.read_text())["records"][0]["dry_run"] is True
    assert Card("a card", 0, True).slug == "dry-run"


def _bench(column: str, us: float, ratio: float, **more) -> Record:
    return Record("bench", "efficientvit_m0", "batch 8", dtype="float16", column=column,
                  us=us, ratio=ratio, images_per_s=8e6 / us, **more)  # fmt: skip


def test_summary_takes_the_best_peer(tmp_path) -> None:
    store = Store(tmp_path, "a-card", STAMP, dry_run=False)
    store.add("quick", [_bench("triton", 100.0, 1.0, passed=True), _bench("eager", 500.0, 5.0),
                        _bench("graph", 210.0, 2.1)])  # fmt: skip
    store.add("slow", [_bench("compile-max", 160.0, 1.6)])
    record = Record("numerics", "cga", "float64", dtype="float16", column="triton", passed=True,
                    error=1e-3, bound=4e-3)  # fmt: skip
    store.add("right", [record])
    op = Record("ops", "cga", "batch 8", "M5.1", dtype="float16", column="triton", us=12.0,
                ratio=1.0, gflops=100.0, gbs=50.0, share=0.42, nearer="L2")  # fmt: skip
    store.add("op", [op])
    text = summary.markdown(store)
    assert (
        "| efficientvit_m0 | triton | 80,000 | 100.0 | 1.60× (compile-max) | 5.00× | 2.10×" in text
    )
    assert "| numerics | triton | float16 | 1 of 1 | 0.25 |" in text
    assert "| cga | M5.1 | triton | 12.00 | 100 | 50 | 42% of L2 |" in text
    assert WARNING not in text


def test_the_stamp_changes_with_the_sources(tmp_path, monkeypatch) -> None:
    found = Card("a card", 90, False).stamp()
    assert set(STAMP) <= set(found) and found["sources"] == results.source_hash()
    package = SimpleNamespace(__file__=str(tmp_path / "__init__.py"))
    monkeypatch.setattr(results, "kernels", package)
    before = results.source_hash()
    (tmp_path / "cga.py").write_text("FEW = 64\n")
    assert len({found["sources"], before, results.source_hash()}) == 3


def test_ratios_are_of_the_same_round() -> None:
    found = timing([400.0, 300.0, 600.0], [200.0, 100.0, 300.0])
    assert (found["us"], found["ratio"], found["ratio_p80"]) == (400.0, 2.0, 2.6)


def test_the_nearer_ceiling() -> None:
    limits = Ceilings({"float16": 1e12}, memory=1e9, cache=4e9, cache_bytes=2000, launch_us=1.0)
    assert limits.least_us(2_000_000, 100, "float16") == (pytest.approx(2.0), "float16 FLOP/s")
    assert limits.least_us(10, 1000, "float16") == (pytest.approx(0.25), "L2")
    assert limits.least_us(10, 3000, "float16") == (pytest.approx(3.0), "memory")


def test_bounds_are_those_of_the_tests() -> None:
    assert {d: close.FLOOR[d] for d in subjects.FLOOR} == subjects.FLOOR
    want = torch.ones(100, dtype=torch.float64)
    off = want.clone()
    off[0] += 0.5  # 5 % in the norm
    assert not subjects.judge(off, want, torch.float16, want).passed
    assert subjects.judge(off, want, torch.float16, want + 0.03).passed  # plain is off by 3 %
    off[0] = float("nan")
    assert not subjects.judge(off, want, torch.float16, off).passed


def test_the_log_lists_what_is_owed() -> None:
    text = summary.owed()
    for part in gpu.PARTS:
        assert f"--parts {part}" in text, f"profiles/LOG.md, {summary.OWED}: nothing about {part}"


# --- the picture of kernels/README.md


def test_picture_and_table_are_those_computed() -> None:
    """`python -m evit_fast.kernels.picture` rewrites both."""
    stages = picture.traffic()
    assert (picture.FOLDER / "cga.svg").read_text(encoding="utf-8") == picture.svg(stages)
    readme = (picture.FOLDER / "README.md").read_text(encoding="utf-8")
    assert readme == picture.update(readme, stages)
    first = stages[0]
    assert first.x == 14 * 14 * 192 * 2 and first.windows == 4
    assert first.on_chip["scores"] == 4 * 3 * 49 * 49 * 4
    assert first.kernels == 1 or first.moved == first.weights + 5 * first.x
    for stage in stages:
        assert stage.moved < stage.eager_moved
        shown = replace(stage, x=stage.x + 1024)
        assert picture.svg([shown, *stages[1:]]) != picture.svg(stages)
        assert picture.table([shown, *stages[1:]]) != picture.table(stages)


def test_eager_is_counted_tensor_by_tensor() -> None:
    with picture._Count() as count:
        a = torch.empty(4, 8, device="meta")  # allocates: no kernel
        b = a.view(8, 4).T  # a view: none either
        (b + 1).relu()  # two kernels, each reads and writes 128 bytes
    assert (count.kernels, count.read, count.written) == (2, 256, 256)
