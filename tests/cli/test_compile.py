"""compile: what it fills a folder with, its exit codes and sentences; that forwards find it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from evit_fast import cubins, nvrtc
from evit_fast.cuda import ahead
from evit_fast.cuda.sources import unit


class Compiler:
    """In NVRTC's place."""

    version = "12.9"
    fails = ""

    def compile(self, source, name, arch, options, headers) -> nvrtc.Cubin:
        if self.fails and name.startswith(self.fails):
            raise nvrtc.CompileError(f"nvrtc: {name} does not compile", "")
        return nvrtc.Cubin(f"{name} {arch}".encode(), "", {})


@pytest.fixture
def compiler(monkeypatch) -> Compiler:
    made = Compiler()
    monkeypatch.setattr(nvrtc, "find", lambda arch=None: made)
    return made


def test_it_fills_a_folder_for_cards_that_are_not_here(evit, compiler, tmp_path):
    out = tmp_path / "cubins"
    flags = ("--model", "m0", "--arch", "sm_70,90", "--dtype", "float16", "--out", out, "--json")
    code, text, err = evit("compile", *flags)
    facts = json.loads(text)
    assert code == 0, err
    files = list(out.glob("*.cubin"))
    assert len(files) == facts["compiled"] > 20 and facts["there"] == 0
    assert facts["bytes"] == sum(f.stat().st_size for f in files)
    for arch in ("sm_70", "sm_90"):
        for op in ("stem", "dw_ffn", "cga", "patch_merge", "classifier"):
            assert any(f.name.startswith(op) and f"-{arch}-" in f.name for f in files), (op, arch)
    again = json.loads(evit("compile", *flags)[1])
    assert (again["compiled"], again["there"]) == (0, len(files))


def test_a_forward_finds_what_was_compiled(evit, compiler, tmp_path, monkeypatch):
    flags = ("--model", "m0", "--arch", "70", "--out", tmp_path / "cubins")
    assert evit("compile", *flags)[0] == 0
    kernels, refused = ahead.kernels_of_model(ahead_config(), torch.float16, 70)
    assert not refused
    monkeypatch.setenv("EVIT_FAST_CACHE", str(tmp_path / "cubins"))
    compiler.fails = "c"  # nothing may be compiled any more
    for kernel in kernels:
        assert cubins.get(unit(kernel, 70)) == f"{kernel.name}.cu 70".encode()


def ahead_config():
    from evit_fast.config import resolve

    return resolve("m0")


def test_a_kernel_that_fails_is_an_exit_code_of_1(evit, compiler, tmp_path):
    compiler.fails = "cga_attention"
    out = tmp_path / "cubins"
    code, text, err = evit("compile", "--model", "m0", "--arch", "70", "--out", out, "--json")
    facts = json.loads(text)
    assert code == 1 and facts["failed"] and facts["compiled"]
    assert {f["kernel"] for f in facts["failed"]} == {"cga_attention.cu"}
    assert "cga_attention.cu does not compile" in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (["--arch", "volta"], "--arch volta: expected architectures"),
        (["--arch", "90a"], "--arch 90a: expected architectures"),
        (["--arch", "60"], "need sm_70 or newer, this is sm_60"),
        (["--arch", "70", "--dtype", "bfloat16"], "bfloat16 needs sm_80"),
        (["--arch", "70", "--model", "m7"], "unknown model"),
        (["--arch", "70", "--threads", "0"], "at least 1"),
        ([], "--arch"),
    ],
)
def test_wrong_use_is_one_sentence(flags, says, evit, compiler, tmp_path):
    code, _, err = evit("compile", *flags, "--out", tmp_path / "cubins")
    assert code == 2 and says in err


def test_a_folder_that_cannot_be_used(evit, compiler, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = evit("compile", "--arch", "70", "--model", "m0", "--out", tmp_path / "file")
    assert code == 2 and "is not a folder" in err and len(err.strip().splitlines()) == 1


def test_some_architectures_can_and_some_cannot(evit, compiler, tmp_path):
    out = tmp_path / "cubins"
    flags = ("--model", "m0", "--arch", "75,80", "--dtype", "bfloat16", "--out", out)
    code, text, err = evit("compile", *flags)
    assert code == 1 and "efficientvit_m0 on sm_75: cuda: bfloat16 needs sm_80" in err
    assert "kernels compiled, 0 were there, 0 failed" in text


@pytest.mark.skipif(not nvrtc.found(), reason="no NVRTC")
def test_nvrtc_takes_the_units():
    """The real compiler, one kernel: options and headers are all that it needs."""
    kernels, _ = ahead.kernels_of_model(ahead_config(), torch.float16, 70)
    one = unit(next(k for k in kernels if k.name == "dw_ffn_sum"), 70)
    library = nvrtc.find(70)
    cubin = library.compile(one.source, one.name, one.arch, one.options, one.headers)
    assert cubin.code[:4] == b"\x7fELF" and "dw_ffn_sum" in cubin.resources


def test_nothing_is_read_from_the_tree(evit, compiler, tmp_path, monkeypatch):
    read = Path.read_text

    def guarded(path: Path, *args, **kwargs) -> str:
        assert path.suffix != ".cuh", path
        return read(path, *args, **kwargs)

    monkeypatch.setattr(Path, "read_text", guarded)
    assert evit("compile", "--model", "m0", "--arch", "80", "--out", tmp_path / "cubins")[0] == 0
