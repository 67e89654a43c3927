"""Machine code of a cubin as text, by nvdisasm.

CUDA 13's nvdisasm, in the triton wheel that torch brings, knows sm_75 and later. For sm_70 it is
the one of CUDA 12, in the triton 3.6.0 wheel; `make .venv/nvdisasm/nvdisasm` takes it from there,
and EVIT_FAST_NVDISASM names it.
"""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import tempfile
from collections import Counter
from pathlib import Path

OLD = 75  # sm_75 is the first that CUDA 13 knows
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\d+\s+)?([A-Z][A-Z0-9_.]*)")


def nvdisasm(arch: int) -> Path:
    """The tool for sm_<arch>. RuntimeError: which one is missing, and how to get it."""
    named = os.environ.get("EVIT_FAST_NVDISASM")
    if arch < OLD:
        kept = Path(__file__).parents[2] / ".venv" / "nvdisasm" / "nvdisasm"
        tool = Path(named) if named else kept
        if not tool.exists():
            raise RuntimeError(
                f"cuda: reading sm_{arch} code needs the nvdisasm of CUDA 12, which is not at "
                f"{tool}: make .venv/nvdisasm/nvdisasm, or set EVIT_FAST_NVDISASM"
            )
        return tool
    spec = importlib.util.find_spec("triton")
    folders = (spec.submodule_search_locations if spec else None) or ()
    for folder in folders:
        tool = Path(folder) / "backends" / "nvidia" / "bin" / "nvdisasm"
        if tool.exists():
            return tool
    raise RuntimeError(f"cuda: reading sm_{arch} code needs nvdisasm: pip install triton==3.7.1")


def disassemble(cubin: bytes, arch: int) -> str:
    """The code as nvdisasm -c prints it."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as f:
        f.write(cubin)
        f.flush()
        done = subprocess.run([nvdisasm(arch), "-c", f.name], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"nvdisasm failed on sm_{arch} code: {done.stderr.strip()}")
    return done.stdout


def instructions(code: str) -> Counter[str]:
    """How often each instruction stands in a disassembly, with its modifiers: "HMMA.884.F32..."."""
    return Counter(_INSTRUCTION.findall(code))
