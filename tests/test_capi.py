"""The C API from a C program: the same bits as Python, no allocation in a run, errors as text."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch

import evit_fast
from evit_fast import _native
from evit_fast.bench.weights import randomize
from tests.native_build import ROOT, TREE, run


@pytest.fixture(scope="module")
def program(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("capi")
    warnings = ("-std=c11", "-O1", "-Wall", "-Wextra", "-Werror")
    source = ROOT / "tests/native/capi_test.c"
    run("gcc", *warnings, "-I", ROOT / "csrc/include", "-c", source, "-o", out / "main.o")
    wrap = "-Wl,--wrap=malloc,--wrap=_Znwm,--wrap=_Znam"
    library = TREE / "libevit_fast.a"
    run("g++", wrap, out / "main.o", library, "-pthread", "-ldl", "-o", out / "classify")
    return out / "classify"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    eager = evit_fast.create_model("m0", num_classes=10).eval()
    randomize(eager)
    fast = evit_fast.accelerate(eager)
    path = tmp_path_factory.mktemp("saved") / "m0.evit"
    evit_fast.save(fast, path)
    return fast, path


@pytest.mark.parametrize("threads", [1, 3])
def test_same_bits_as_python(program, model, tmp_path, threads):
    fast, path = model
    x = torch.randn(2, 3, 64, 80)
    x.numpy().tofile(tmp_path / "x")
    isa = run(program, path, tmp_path / "x", 2, 64, 80, threads, tmp_path / "y")
    assert isa.strip() == _native.isa()
    got = np.fromfile(tmp_path / "y", np.float32).reshape(2, 10)
    with torch.inference_mode():
        np.testing.assert_array_equal(got, fast(x).numpy())


def test_errors_are_sentences(program, model, tmp_path):
    _, path = model
    damaged = tmp_path / "damaged.evit"
    whole = path.read_bytes()
    damaged.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    for name, fact in ((damaged, "crc32"), (tmp_path / "none.evit", "No such file")):
        command = [program, name, "x", "1", "64", "64", "1", "y"]
        result = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
        assert result.returncode == 1
        assert result.stderr.startswith(f"evit_load: {name}: ")
        assert fact in result.stderr
