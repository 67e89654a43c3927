"""What a measurement ran on: processor, instruction set, which cores, which commit, when."""

from __future__ import annotations

import datetime
import os
import platform
import re
import subprocess
from pathlib import Path

CPUINFO = Path("/proc/cpuinfo")
SIBLINGS = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"


def processor() -> str:
    """`AMD EPYC 9B14 (family 25 model 17)`: hypervisors shorten names, family and model stay."""
    if not CPUINFO.exists():
        return platform.processor() or platform.machine()
    text = CPUINFO.read_text()
    facts = dict(re.findall(r"^(model name|cpu family|model)\s*:\s*(.*)$", text, re.M))
    name = re.sub(r"\s+", " ", facts.get("model name", platform.machine())).strip()
    if "cpu family" in facts and "model" in facts:
        name += f" (family {facts['cpu family']} model {facts['model']})"
    return name


def instruction_set() -> str:
    """The one that the fused ops use here, EVIT_FAST_MAX_ISA applied."""
    from evit_fast import _native

    return _native.isa()


def describe() -> str:
    """Processor and instruction set: the `machine` column."""
    return f"{processor()}, {instruction_set()}"


def slug(text: str) -> str:
    """`text` as part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def cores(count: int) -> list[int] | None:
    """`count` logical processors that share no core, the last ones usable here (the first serves
    interrupts); None where a process cannot be pinned or there are too few."""
    if not hasattr(os, "sched_getaffinity"):
        return None
    chosen: list[int] = []
    taken: set[str] = set()
    for cpu in sorted(os.sched_getaffinity(0), reverse=True):
        path = Path(SIBLINGS.format(cpu))
        core = path.read_text().strip() if path.exists() else str(cpu)
        if core not in taken:
            taken.add(core)
            chosen.append(cpu)
    return sorted(chosen[:count]) if len(chosen) >= count else None


def _git(*arguments: str) -> str:
    """What git prints about the tree that holds this file; empty where there is none."""
    command = ["git", "-C", str(Path(__file__).resolve().parent), *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def commit() -> str:
    """Short hash, `+` when files differ from it; the version outside the project's own tree."""
    from evit_fast import __version__

    top = _git("rev-parse", "--show-toplevel")
    # An environment may lie in the tree of another project: that one's commit says nothing.
    if not top or not (Path(top) / "evit_fast" / "_version.py").exists():
        return __version__
    return _git("describe", "--always", "--abbrev=8", "--dirty=+") or __version__


def today() -> str:
    return datetime.date.today().isoformat()
