"""tune: which candidate wins, what is refused, and what is remembered. No card: a fake one."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
import warnings

import pytest
import torch

pytest.importorskip("triton")

from evit_fast import tuned
from evit_fast.cli import tune, tune_columns
from evit_fast.cli.main import main
from evit_fast.cuda import modules
from evit_fast.kernels import cga, launches
from evit_fast.kernels.launches import Config, Table
from evit_fast.ops import OPS

SLOW, FAST, WRONG, BROKEN = (Config({"BT": n}, 4, 2) for n in (16, 32, 64, 128))
TABLE = Table({80: {("a", 2): SLOW, ("b", 2): SLOW}}, op="cga")


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A cache folder of its own, and nothing known of any other."""
    monkeypatch.setenv("EVIT_FAST_CACHE", str(tmp_path))
    monkeypatch.delenv("EVIT_FAST_TUNED", raising=False)
    monkeypatch.setattr(cga, "CONFIGS", TABLE)
    tuned._found.cache_clear()
    yield tmp_path
    tuned._found.cache_clear()


class FakeCard:
    """Launches are rows here. A row takes times[row] microseconds a call."""

    def __init__(self, times: dict[int, float]) -> None:
        self.times, self.timed = times, []

    def output(self, launches: list, y: torch.Tensor) -> torch.Tensor:
        if BROKEN in launches:
            raise RuntimeError("out of resource: shared memory,\n hardware limit 99")
        return torch.full((4,), 3.0 if WRONG in launches else 1.0)

    def times_us(self, variants: list) -> list[float]:
        self.timed.append(variants)
        return [sum(self.times[row.tiles["BT"]] for row in rows) for rows in variants]


def case(*parts: str, candidates: object) -> tune.Case:
    """An op that looks up the rows of `parts`, in this order."""

    def plan() -> list:
        return [TABLE.row(90, (part, 2)) for part in parts]

    return tune.Case("cga", "case", plan, torch.empty(4), candidates)


def search(cases: list, card: FakeCard) -> list[tune.Finding]:
    return list(tune.search(cases, 90, card, "float16"))


def test_the_fastest_candidate_wins():
    card = FakeCard({16: 10.0, 32: 8.0})
    (found,) = search([case("a", candidates=[SLOW, FAST])], card)
    assert (found.committed, found.best, found.tried) == (SLOW, FAST, 1)
    assert found.speedup == pytest.approx(1.25)


def test_the_committed_row_stays_where_nothing_is_clearly_faster():
    (found,) = search([case("a", candidates=[FAST])], FakeCard({16: 10.0, 32: 9.9}))
    assert found.best == SLOW and found.speedup == 1.0


def test_a_fast_row_with_another_result_is_out_and_never_timed():
    card = FakeCard({16: 10.0, 64: 1.0})
    (found,) = search([case("a", candidates=[WRONG])], card)
    assert found.best == SLOW and "differs" in found.refused[0]
    assert all(WRONG not in rows for variants in card.timed for rows in variants)


def test_a_row_that_does_not_run_is_out_in_one_line():
    (found,) = search([case("a", candidates=[BROKEN, FAST])], FakeCard({16: 10.0, 32: 5.0}))
    assert found.best == FAST
    assert "shared memory, hardware limit" in found.refused[0] and "\n" not in found.refused[0]


def test_nan_is_another_result():
    card = FakeCard({16: 10.0, 32: 5.0})
    card.output = lambda rows, y: torch.full((4,), float("nan") if FAST in rows else 1.0)
    (found,) = search([case("a", candidates=[FAST])], card)
    assert found.best == SLOW and found.refused


def test_classes_are_varied_one_at_a_time_and_have_candidates_of_their_own():
    card = FakeCard({16: 10.0, 32: 5.0})
    first, second = search([case("a", "b", candidates={"b": [FAST]})], card)
    assert (first.shape_class, first.best, first.tried) == (("a", 2), SLOW, 0)
    assert (second.shape_class, second.best) == (("b", 2), FAST)
    assert second.speedup == pytest.approx(20 / 15)
    assert [SLOW, FAST] in card.timed[-1] and [FAST, FAST] not in card.timed[-1]


def test_a_class_of_several_cases_takes_the_mean():
    cases = [case("a", candidates=[FAST]), case("a", "b", candidates={"a": [FAST]})]
    found, _ = search(cases, FakeCard({16: 10.0, 32: 5.0}))
    assert found.speedup == pytest.approx((2 * 20 / 15) ** 0.5)


def test_a_row_that_one_case_cannot_run_is_out_for_all():
    broken = case("a", candidates=[])
    plan = broken.plan
    broken = broken._replace(plan=lambda: [BROKEN if row == FAST else row for row in plan()])
    card = FakeCard({16: 10.0, 32: 5.0})
    (found,) = search([case("a", candidates=[FAST]), broken], card)
    assert found.best == SLOW and len(found.refused) == 1


def remembered(row: Config = FAST, key: tuple = ("a", 2), arch: int = 90) -> None:
    tuned.remember({("triton", "cga", arch, key): tune._plain(row)})


def test_what_is_remembered_comes_before_the_committed_row():
    assert TABLE.row(90, ("a", 2)) == SLOW
    remembered()
    assert TABLE.row(90, ("a", 2)) == FAST
    assert TABLE.row(90, ("b", 2)) == TABLE.row(80, ("a", 2)) == SLOW


def test_remembering_more_keeps_the_rest(folder):
    remembered()
    remembered(key=("b", 2))
    assert TABLE.row(90, ("a", 2)) == TABLE.row(90, ("b", 2)) == FAST
    assert [f.name for f in folder.iterdir()] == ["tuned.json"]


def test_a_tuned_row_is_not_used_where_it_is_switched_off(monkeypatch):
    remembered()
    monkeypatch.setenv("EVIT_FAST_TUNED", "0")
    tuned._found.cache_clear()
    assert TABLE.row(90, ("a", 2)) == SLOW


def test_the_file_is_read_once(folder):
    remembered()
    assert TABLE.row(90, ("a", 2)) == FAST
    (folder / "tuned.json").unlink()
    assert TABLE.row(90, ("a", 2)) == FAST


def test_another_version_measured_other_kernels(monkeypatch):
    remembered()
    monkeypatch.setattr(tuned, "__version__", "9.9.9")
    tuned._measured_with.cache_clear()
    tuned._found.cache_clear()
    assert TABLE.row(90, ("a", 2)) == SLOW
    monkeypatch.undo()
    tuned._measured_with.cache_clear()


def test_a_row_depends_on_the_source_of_its_kernel(monkeypatch):
    before = {op: tuned._measured_with("triton", op) for op in OPS}
    assert len(set(before.values())) == len(OPS)  # no source is missing
    monkeypatch.setitem(tuned.SOURCES, "triton", ("kernels/{op}*.py",))
    tuned._measured_with.cache_clear()
    assert all(tuned._measured_with("triton", op) != before[op] for op in OPS)
    tuned._measured_with.cache_clear()


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 99, "rows": {}}',
        '{"format": 1}',
        '{"format": 1, "rows": {"a": {}}}',
        '{"format": 1, "rows": {"triton|cga|90|x|y": {"tiles": {"BT": "16"}}}}',
        '{"format": 1, "rows": {"triton|cga|90|x|y": {"tiles": 3}}}',
        "\udcff",
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning(folder, text):
    (folder / "tuned.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.warns(RuntimeWarning, match=r"tuned.json cannot be used \(.*run evit-fast tune"):
        assert TABLE.row(90, ("a", 2)) == SLOW
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert TABLE.row(90, ("a", 2)) == SLOW  # said once
    with pytest.warns(RuntimeWarning):
        remembered()
    assert TABLE.row(90, ("a", 2)) == FAST


def test_a_row_of_other_tiles_is_not_used():
    remembered(Config({"BX": 32}, 4, 2))
    assert TABLE.row(90, ("a", 2)) == SLOW


@pytest.mark.parametrize("op", OPS)
def test_the_tables_of_the_kernels_look_their_rows_up(op, monkeypatch):
    monkeypatch.undo()
    table = importlib.import_module(f"evit_fast.kernels.{op}").CONFIGS
    assert isinstance(table, launches.Table) and table.op == op


def test_without_a_card_it_is_one_sentence(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for device in ("cuda", "cpu"):
        assert main(["tune", "--device", device]) == 2
        said = capsys.readouterr().err.strip()
        assert "torch has none here" in said and len(said.splitlines()) == 1


@pytest.mark.parametrize(
    ("flags", "says"), [(["--model", "m7"], "unknown model"), (["--op", "conv"], "--op conv")]
)
def test_wrong_flags_are_one_sentence(capsys, monkeypatch, flags, says):
    monkeypatch.setattr(tune, "_arch", lambda args: 90)
    assert main(["tune", *flags]) == 2
    assert says in capsys.readouterr().err


@pytest.fixture
def fake_card(monkeypatch):
    monkeypatch.setattr(tune, "_arch", lambda args: 90)
    monkeypatch.setattr(tune, "Card", lambda device: FakeCard({16: 10.0, 32: 8.0}))
    monkeypatch.setattr(tune, "_cases", lambda args, arch: [case("a", candidates=[FAST])])


def test_the_command_prints_both_rows_and_remembers_the_better(fake_card, capsys, folder):
    assert main(["tune"]) == 0
    out = capsys.readouterr().out
    assert "BT=16 warps=4 stages=2  ->  BT=32 warps=4 stages=2  1.25x" in out
    assert str(folder / "tuned.json") in out
    assert TABLE.row(90, ("a", 2)) == FAST


def test_a_row_that_is_no_longer_faster_is_forgotten(fake_card, monkeypatch):
    remembered()
    remembered(key=("b", 2))
    monkeypatch.setattr(tune, "Card", lambda device: FakeCard({16: 10.0, 32: 12.0}))
    assert main(["tune"]) == 0
    assert TABLE.row(90, ("a", 2)) == SLOW
    assert TABLE.row(90, ("b", 2)) == FAST  # not measured this time


def test_the_command_as_json(fake_card, capsys):
    assert main(["tune", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["rows"]
    assert row["best"] == {"tiles": {"BT": 32}, "num_warps": 4, "num_stages": 2}


def test_a_folder_that_cannot_be_written_is_one_sentence(fake_card, capsys, monkeypatch, folder):
    (folder / "file").write_text("")
    monkeypatch.setenv("EVIT_FAST_CACHE", str(folder / "file"))
    with pytest.warns(RuntimeWarning, match="cannot be used"):
        assert main(["tune"]) == 2
    assert "cannot be written" in capsys.readouterr().err


# ------------------------------------------------------------------ CUDA against Triton


def rival(times: dict[str, float], *, wrong: float = 0.0, why: str = "", name: str = "cga C=64"):
    """A case with a CUDA plan, and a card on which a column takes times[column]."""
    one = case("a", candidates=[])._replace(
        plan=lambda: ["triton"], cuda=lambda: ["cuda"], sizes=name, without_cuda=why
    )
    card = FakeCard({})
    card.output = lambda plan, y: torch.full((4,), 1.0 + wrong * (plan == ["cuda"]))
    card.times_us = lambda plans: [times[plan[0]] for plan in plans]
    return one, card


def test_both_columns_are_measured_and_the_means_remembered(folder):
    fast, card = rival({"cuda": 4.0, "triton": 8.0})
    slow, _ = rival({})
    cases, times = [fast, slow], iter([[4.0, 8.0], [9.0, 2.0]])
    card.times_us = lambda plans: next(times)
    (choice,) = tune_columns.compare(cases, card, 3e-3)
    assert (choice.cuda_us, choice.triton_us) == pytest.approx((6.0, 4.0))
    assert str(choice) == "cga C=64: triton (cuda 6.0, triton 4.0 us)"
    tuned.remember(tune_columns.rows([choice], 90))
    found = tuned.row("cuda", "cga", 90, "cga C=64")
    assert found == {"tiles": {}, "cuda_ns": 6000, "triton_ns": 4000}
    assert tuned.row("cuda", "cga", 80, "cga C=64") is None


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"wrong": 0.1}, "its result differs from triton's by 0.1"),
        ({"wrong": float("nan")}, "its result differs from triton's by nan"),
        ({"why": "cuda: no NVIDIA driver"}, "cuda: no NVIDIA driver"),
    ],
    ids=["wrong", "nan", "missing"],
)
def test_a_column_that_is_out_is_said_and_not_remembered(settings, says):
    one, card = rival({"cuda": 1.0, "triton": 8.0}, **settings)
    (choice,) = tune_columns.compare([one], card, 3e-3)
    assert says in choice.refused and choice.row is None and says in str(choice)
    tuned.remember(tune_columns.rows([choice], 90))
    assert tuned.row("cuda", "cga", 90, "cga C=64") is None


def test_a_kernel_that_fails_is_one_line():
    one, card = rival({})
    card.output = lambda plan, y: (_ for _ in ()).throw(RuntimeError("cuda: the launch\n failed"))
    (choice,) = tune_columns.compare([one], card, 3e-3)
    assert choice.refused == "RuntimeError: cuda: the launch failed"


def test_the_command_compares_the_columns(fake_card, monkeypatch, capsys):
    one, card = rival({"cuda": 1.0, "triton": 8.0})
    card.times_us = lambda plans: [1.0, 8.0][: len(plans)]
    monkeypatch.setattr(tune, "_cases", lambda args, arch: [one])
    monkeypatch.setattr(tune, "Card", lambda device: card)
    assert main(["tune"]) == 0
    assert "cga C=64: cuda (cuda 1.0, triton 8.0 us)" in capsys.readouterr().out
    assert main(["tune", "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["columns"]
    assert found["cuda_us"] == pytest.approx(1.0)
    assert tuned.row("cuda", "cga", 90, "cga C=64")["cuda_ns"] == 1000


def test_real_cases_have_a_cuda_plan(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(modules, "missing", lambda arch: "")
    args = tune.argparse.Namespace(
        model="m0", op="dw_ffn,cga", dtype="float16", batch=(1,), device="cpu"
    )
    for c in tune._cases(args, 90):
        assert not c.without_cuda and c.sizes.startswith(f"{c.op} C=")
        assert {launch.kernel.op for launch in c.cuda()} == {c.op}


def test_real_cases_look_their_rows_up_and_name_candidates(monkeypatch):
    """All but the card: every class that M0 uses has candidates that its plan takes."""
    monkeypatch.undo()
    args = tune.argparse.Namespace(
        model="m0", op=None, dtype="float16", batch=(1, 64), device="cpu"
    )
    cases = tune._cases(args, 90)
    assert {c.op for c in cases} == set(OPS)
    for c in cases:
        with tuned.trial({}) as trial:
            c.plan()
        assert trial.asked and all(op == c.op for op, _ in trial.asked)
        for op, shape_class in trial.asked:
            table = importlib.import_module(f"evit_fast.kernels.{op}").CONFIGS
            committed = table.row(90, shape_class)
            for row in tune._candidates([c], shape_class, committed):
                assert row.tiles.keys() == committed.tiles.keys()
                with tuned.trial({(op, shape_class): tune._plain(row)}):
                    assert row in [launch.config for launch in c.plan()]


def test_a_forward_imports_no_timer_and_needs_no_file(folder):
    code = "import evit_fast.tuned, sys; assert 'evit_fast.cli.tune' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
    assert TABLE.row(90, ("a", 2)) == SLOW and not list(folder.iterdir())
