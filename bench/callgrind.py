"""Instructions of every op and shape, counted by callgrind: what no busy machine disturbs.

    python -m evit_fast.bench.callgrind            compares with profiles/results/callgrind-avx2.csv
    python -m evit_fast.bench.callgrind --write    writes that file anew

One image, one thread, AVX2 (valgrind knows no AVX-512), through the C API of a build of its own.
Exit code 1 when a count is more than 3 % off the committed one. Counts belong to a compiler: the
file names it. Needs the source tree, cmake, ninja, g++ and valgrind with its headers.
"""

from __future__ import annotations

import argparse
import csv
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TREE = ROOT / "build" / "callgrind"
RESULT = ROOT / "profiles" / "results" / "callgrind-avx2.csv"
FIELDS = ("op", "case", "shape", "instructions", "flops_per_instruction", "compiler", "date")
DRIFT = 0.03


def _run(*command: object, **options: Any) -> str:
    """What a command that must succeed prints. RuntimeError with its last words."""
    done = subprocess.run(
        [str(part) for part in command], capture_output=True, text=True, **options
    )
    if done.returncode:
        last = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
        raise RuntimeError(f"callgrind: {command[0]} ended with {done.returncode}: {last}")
    return done.stdout


def build() -> Path:
    """The runner, linked with a static library of the same sources and flags as the module."""
    for tool in ("cmake", "ninja", "g++", "valgrind"):
        if shutil.which(tool) is None:
            raise RuntimeError(f"callgrind: {tool} was not found; install it")
    _run("cmake", "-S", ROOT, "-B", TREE, "-G", "Ninja", "-DEVIT_FAST_PYTHON=OFF")
    _run("cmake", "--build", TREE, "--target", "evit_fast")
    runner = TREE / "runner"
    _run(
        "g++", "-O1", "-I", ROOT / "csrc" / "include", Path(__file__).with_name(
            "callgrind_runner.cpp"), TREE / "libevit_fast.a", "-pthread", "-o", runner,
    )  # fmt: skip
    return runner


def count(cases: Sequence[Any], runner: Path) -> list[int]:
    """Instructions of one call of each case with one image."""
    from evit_fast import _native

    lines = []
    for i, case in enumerate(cases):
        program = case.shape.line()
        lines.append(f"c{i} 1 {case.side} {case.side} {_native.op_bytes(program)} {program}\n")
    with tempfile.TemporaryDirectory(prefix="evit_fast_callgrind_") as name:
        _run(
            "valgrind", "--tool=callgrind", f"--callgrind-out-file={name}/out", runner,
            input="".join(lines), env={**os.environ, "EVIT_FAST_MAX_ISA": "avx2"},
        )  # fmt: skip
        found: dict[int, int] = {}
        for path in Path(name).iterdir():
            text = path.read_text()
            label = re.search(r"^desc: Trigger: Client Request: c(\d+)$", text, re.M)
            total = re.search(r"^(?:summary|totals): (\d+)", text, re.M)
            if label and total:
                found[int(label[1])] = int(total[1])
    if missing := [case for i, case in enumerate(cases) if i not in found]:
        raise RuntimeError(f"callgrind: no count of {missing[0].op} {missing[0].name}")
    return [found[i] for i in range(len(cases))]


def rows(models: Sequence[str], ops: Sequence[str]) -> list[dict[str, Any]]:
    """One per op and shape, counted now."""
    from evit_fast.bench import machine
    from evit_fast.bench.cases import cases, cost

    chosen = [case for op in ops for case in cases(op, models)]
    runner = build()
    compiler = _run("g++", "--version").splitlines()[0]
    return [
        {
            "op": case.op,
            "case": case.name,
            "shape": f"{case.shape.line()[len(case.op) + 1 : -5]} {case.side}x{case.side}",
            "instructions": instructions,
            "flops_per_instruction": round(cost(case, 1)[0] / instructions, 2),
            "compiler": compiler,
            "date": machine.today(),
        }
        for case, instructions in zip(chosen, count(chosen, runner), strict=True)
    ]


def drift(now: list[dict[str, Any]], before: list[dict[str, str]]) -> list[str]:
    """A sentence for each count that is more than 3 % off; a case without a committed count too."""
    known = {(row["op"], row["shape"]): row for row in before}
    said = []
    for row in now:
        name = f"{row['op']} {row['case']}"
        old = known.get((row["op"], row["shape"]))
        if old is None:
            said.append(f"{name}: no committed count; write it with --write")
            continue
        change = row["instructions"] / int(old["instructions"]) - 1
        if abs(change) > DRIFT:
            other = "" if old["compiler"] == row["compiler"] else f" (was {old['compiler']})"
            said.append(
                f"{name}: {row['instructions']} instructions, {change:+.1%} from "
                f"{old['instructions']}{other}"
            )
    return said


def main(argv: Sequence[str] | None = None) -> int:
    from evit_fast.bench.models import model_names
    from evit_fast.bench.op_runner import OP_NAMES

    parser = argparse.ArgumentParser(
        prog="evit_fast.bench.callgrind", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--model", default="m0..m5", help="m5, m0,m3, m0..m5 (m0..m5)")
    parser.add_argument("--op", default=",".join(OP_NAMES), help="which ops (all)")
    parser.add_argument("--write", action="store_true", help="write the committed file anew")
    args = parser.parse_args(argv)
    try:
        now = rows(model_names(args.model), args.op.split(","))
    except (RuntimeError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2
    for row in now:
        print(
            f"{row['op']:<12}{row['case']:<6}{row['instructions']:>12} instructions"
            f"{row['flops_per_instruction']:>7.2f} FLOPs each"
        )
    if args.write:
        RESULT.parent.mkdir(parents=True, exist_ok=True)
        with open(RESULT, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(now)
        return 0
    before: list[dict[str, str]] = []
    if RESULT.exists():
        with open(RESULT, newline="") as file:
            before = list(csv.DictReader(file))
    said = drift(now, before)
    print("\n".join(said) or f"every count is within {DRIFT:.0%} of {RESULT.name}")
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
