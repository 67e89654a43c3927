"""The build: what the wheel holds, what may be imported, what the compiler made of the kernels."""

from __future__ import annotations

import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import evit_fast
from tests.native_build import ROOT, compile_cpp, isa_objects, run, tool

MAPPED = ("kernels", "bench", "profiles")


def isas() -> list[str]:
    """The instruction sets of this machine's architecture, as csrc/cpu/isa.h lists them, and their
    timed forms."""
    machine = "X86" if run("uname", "-m").strip() == "x86_64" else "ARM"
    text = (ROOT / "csrc/cpu/isa.h").read_text()
    block = re.search(rf"#define EVIT_ISAS_{machine}\(X\)[^#]*", text).group()
    names = re.findall(r'X\((\w+), *"', block)
    return [name + form for name in names for form in ("", "_stages")]


# --- packages


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    out = tmp_path_factory.mktemp("wheel")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "-q")
    run(*pip, "--no-deps", "--no-build-isolation", "-w", out, ROOT)
    (path,) = out.glob("*.whl")
    return zipfile.ZipFile(path)


def test_wheel_holds_every_package_and_nothing_else(wheel):
    names = {Path(name) for name in wheel.namelist()}
    tops = {name.parts[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"evit_fast"}
    for folder in ("evit_fast", *MAPPED):
        inside = Path("evit_fast") if folder == "evit_fast" else Path("evit_fast", folder)
        for path in (ROOT / folder).rglob("*.py"):
            assert inside / path.relative_to(ROOT / folder) in names, f"{path} is not in the wheel"
    assert any(name.name.startswith("_native") and name.suffix == ".so" for name in names)
    for path in (ROOT / "evit_fast/data").glob("*"):
        assert path.relative_to(ROOT) in names, f"{path} is not in the wheel"
    for name in ("LOG.md", "report.html.jinja"):
        assert Path("evit_fast/profiles", name) in names


def test_wheel_names_the_command_and_the_licence(wheel):
    (points,) = (name for name in wheel.namelist() if name.endswith("entry_points.txt"))
    assert "evit-fast = evit_fast.cli.main:main" in wheel.read(points).decode()
    assert any(name.endswith("licenses/LICENSE") for name in wheel.namelist())


@pytest.mark.parametrize("folder", MAPPED)
def test_mapped_folder_has_one_name(folder):
    run(sys.executable, "-c", f"import evit_fast.{folder}", cwd="/")
    wrong = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True
    )
    assert wrong.returncode == 1
    assert f"ImportError: this folder is the package evit_fast.{folder}" in wrong.stderr


# --- objects


@pytest.mark.parametrize("isa", isas())
def test_no_weak_symbols(isa):
    """A weak symbol is a shared template: the linker could keep this instruction set's copy."""
    for path in isa_objects(isa):
        weak = [
            line
            for line in run("nm", "--demangle", "--defined-only", path).splitlines()
            if re.match(r"[0-9a-f]+ [WVuw] ", line) and "DW.ref" not in line
        ]
        assert not weak, f"{path.name} for {isa} defines shared symbols:\n" + "\n".join(weak)


def functions(path: Path) -> dict[str, list[str]]:
    """Demangled name -> instructions, of every function in an object file."""
    found: dict[str, list[str]] = {}
    name = ""
    dump = run("objdump", "--disassemble", "--demangle", "--no-show-raw-insn", path)
    for line in dump.splitlines():
        if header := re.match(r"[0-9a-f]+ <(.*)>:$", line):
            name = header.group(1)
            found.setdefault(name, [])
        elif instruction := re.match(r" +[0-9a-f]+:\t(.*)", line):
            found[name].append(instruction.group(1).strip())
    return found


def stack_accesses(body: list[str]) -> list[str]:
    """Instructions that move a vector register to or from the stack.

    Not vmovq and vmovd: there GCC parks one general register in the low part of a vector register.
    """
    frame = ["%rsp"]
    if any(re.search(r"\bmov +%rsp,%rbp", line) for line in body):
        frame.append("%rbp")  # else rbp is one more pointer
    return [
        line
        for line in body
        if re.search(r"%[xyz]mm", line)
        and any(f"({register}" in line for register in frame)
        and not re.match(r"vmov[qd] ", line)
    ]


def own_name(function: str) -> str:
    """`tile` of `void evit::cpu::avx2::(anonymous namespace)::tile<4>(Args const&)`."""
    return re.split(r"[<(]", function.replace("(anonymous namespace)::", ""))[0].split("::")[-1]


@pytest.mark.parametrize("isa", [isa for isa in isas() if not isa.startswith("scalar")])
def test_tiles_stay_in_registers(isa):
    spilled, tiles = [], set()
    for path in isa_objects(isa):
        for function, body in functions(path).items():
            if not own_name(function).endswith("tile"):
                continue
            tiles.add(own_name(function))
            if accesses := stack_accesses(body):
                spilled.append(f"{path.name} {function}: {len(accesses)}, {accesses[0]}")
    assert not spilled, f"{isa}: vector registers on the stack:\n" + "\n".join(spilled)
    shared = set() if isa.endswith("_stages") else {"tile"}  # gemm.cpp has one form
    assert {"scores_tile", "values_tile", "conv_tile"} | shared <= tiles


# --- embedded sources

PRINT_SOURCES = r"""
#include <stdio.h>
#include "common/embedded.h"
int main() {
  printf("%d\n", evit::kCudaSourceCount);
  for (const auto* s = evit::kCudaSources; s->name != nullptr; s++) {
    printf("%s\n%s", s->name, s->text);
  }
}
"""


def test_embedded_source_is_the_file(tmp_path):
    text = '#define A(x) "a;b[c]\\n" // ${HOME} @X@ \\\n  ]] "quoted" ;\n// \u00e9\n'
    (tmp_path / "a.cuh").write_text(text)
    (tmp_path / "b.cuh").write_text("b\n")
    generated = tmp_path / "sources.cpp"
    files = f"{tmp_path}/a.cuh;{tmp_path}/b.cuh"
    script = ROOT / "cmake/embed.cmake"
    run(tool("cmake"), f"-DOUT={generated}", f"-DFILES={files}", "-P", script)
    main = tmp_path / "main.cpp"
    main.write_text(PRINT_SOURCES)
    program = compile_cpp(tmp_path / "print", str(main), str(generated))
    assert run(program) == f"2\na.cuh\n{text}b.cuh\nb\n"


def test_a_missing_native_library_is_one_sentence(monkeypatch):
    monkeypatch.delattr(evit_fast, "_native", raising=False)
    monkeypatch.setitem(sys.modules, "evit_fast._native", None)
    with pytest.raises(ImportError, match="run `make build`"):
        from evit_fast import _native  # noqa: F401
