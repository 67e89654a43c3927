"""The command line itself: help, version, doctor, explain, and ImageNet's names."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

import evit_fast
from evit_fast import columns, gpu, imagenet, walker
from evit_fast.cli import doctor
from evit_fast.cli.main import COMMANDS
from evit_fast.cuda import modules


def test_help_and_version(evit):
    assert evit("--version") == (0, evit_fast.__version__ + "\n", "")
    code, out, _ = evit("--help")
    assert code == 0 and all(name in out for name in COMMANDS)
    code, _, err = evit()
    assert code == 2 and "COMMAND" in err
    code, _, err = evit("dance")
    assert code == 2 and "invalid choice" in err


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself(evit, command):
    code, out, _ = evit(command, "--help")
    assert code == 0 and out.startswith(f"usage: evit-fast {command} ")


def test_doctor(evit):
    code, out, err = evit("doctor")
    assert code == 0 and err == ""
    assert len(out.splitlines()) == len(doctor.PROBES)
    facts = json.loads(evit("doctor", "--json")[1])
    assert list(facts) == list(doctor.PROBES)
    assert facts["evit_fast"].startswith(evit_fast.__version__)
    assert facts["instruction sets"].startswith("uses ")
    assert not any("cannot be asked" in fact for fact in facts.values())


def test_doctor_never_fails(evit, monkeypatch):
    def broken() -> str:
        raise OSError("out of order")

    monkeypatch.setitem(doctor.PROBES, "GPU", broken)
    monkeypatch.setitem(sys.modules, "evit_fast._native", None)
    monkeypatch.delattr(evit_fast, "_native", raising=False)
    code, out, _ = evit("doctor", "--json")
    facts = json.loads(out)
    assert code == 0 and facts["GPU"] == "cannot be asked: OSError: out of order"
    assert facts["native library"].startswith("missing: ")


def test_explain(evit, checkpoint):
    code, out, _ = evit("explain", "--model", "m5")
    assert code == 0
    for op in ("stem", "dw_ffn", "cga", "patch_merge", "classifier"):
        assert op in out
    rows = json.loads(evit("explain", "--model", "m5", "--json")[1])
    assert len(rows) == 32
    assert evit("explain", "--checkpoint", checkpoint)[0] == 0
    assert evit("explain")[0] == 2


def test_a_device_that_is_not_there(evit):
    if torch.cuda.is_available():
        pytest.skip("it is there")
    code, _, err = evit("explain", "--model", "m0", "--device", "cuda")
    assert code == 2 and "no CUDA device here" in err and "Traceback" not in err


def test_doctor_names_the_column_of_each_gpu(monkeypatch):
    cards = [("A", 8, 0), ("B", 7, 5)]
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: len(cards))

    def properties(i: int) -> SimpleNamespace:
        name, major, minor = cards[i]
        return SimpleNamespace(name=name, major=major, minor=minor, total_memory=80 << 30)

    def place(device: torch.device) -> gpu.Place:
        _, major, minor = cards[device.index]
        return gpu.Place("cuda", 10 * major + minor)

    class Kernel:
        @staticmethod
        def supports(s: object, dtype: torch.dtype, arch: int) -> str | None:
            return None if arch >= 80 else f"sm_{arch} is too old"

    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    monkeypatch.setattr(gpu, "place", place)
    monkeypatch.setattr(walker, "kernel", lambda name: Kernel)
    monkeypatch.setattr(modules, "missing", lambda arch: "cuda: no driver")
    columns.choose.cache_clear()
    walker.columns.cache_clear()
    try:
        assert doctor.PROBES["GPU"]() == (
            "A (sm_80, 80 GiB): the triton column; "
            "B (sm_75, 80 GiB): the reference column (cuda: no driver; sm_75 is too old)"
        )
        monkeypatch.setattr(modules, "missing", lambda arch: "")
        columns.choose.cache_clear()
        walker.columns.cache_clear()
        assert doctor.PROBES["GPU"]().endswith("B (sm_75, 80 GiB): the cuda column")
    finally:
        columns.choose.cache_clear()
        walker.columns.cache_clear()


def test_imagenet_names():
    names = imagenet.class_names()
    assert len(names) == 1000 and all(n.strip() == n and n for n in names)
    assert names[0] == "tench, Tinca tinca"
    assert names[281] == "tabby, tabby cat"
    assert names[999] == "toilet tissue, toilet paper, bathroom tissue"
    assert len(set(names)) == 999 and names[134] == names[517] == "crane"


def test_commands_are_light_to_load():
    """--help waits for nothing that only a run needs."""
    code = """
import builtins, sys
from evit_fast.cli.main import build_parser
build_parser()
print([m for m in ("torch", "numpy", "PIL", "tqdm") if m in sys.modules])
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[]"
