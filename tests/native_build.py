"""Builds the C++ tests of tests/native and finds what the project's own build left."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / f"native-{sysconfig.get_config_var('SOABI')}"  # as in setup.py


def run(*command: object, **options) -> str:
    """Runs a command that must succeed within 5 minutes and returns what it printed."""
    options = {"timeout": 300} | options
    result = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )
    assert result.returncode == 0, f"{command[0]} ended with {result.returncode}:\n" + (
        result.stdout[-2000:] + result.stderr[-4000:]
    )
    return result.stdout


def tool(name: str) -> str:
    """The cmake or ninja that the build uses: the one beside this Python, else the system's."""
    beside = Path(sys.executable).with_name(name)
    return str(beside) if beside.exists() else name


def compile_cpp(out: Path, *sources: str, flags: tuple[str, ...] = ()) -> Path:
    """Compiles C++ files, named from the project's root, into the program `out`."""
    paths = [ROOT / source for source in sources]
    run(
        "g++", "-std=c++17", "-g", "-O1", "-I", ROOT / "csrc", *flags, *paths, "-pthread", "-o", out
    )
    return out


def allocation_counter(folder: Path) -> Path:
    """The library that counts the allocations of a process it is preloaded into."""
    source = "tests/native/count_allocations.cpp"
    return compile_cpp(folder / "libcount.so", source, flags=("-shared", "-fPIC"))


def isa_objects(isa: str) -> list[Path]:
    """The object files of one CPU instruction set in the project's build."""
    found = sorted(TREE.glob(f"CMakeFiles/evit_{isa}.dir/**/*.o"))
    assert found, f"no objects of {isa} under {TREE}; run make build"
    return found
