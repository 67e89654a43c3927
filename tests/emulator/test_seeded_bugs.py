"""Seeded bugs: each is seen by the detectors that bugs/table.py names for it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from tests.close import assert_close, budget
from tests.emulator.bugs.table import BUGS, Bug
from tests.emulator.building import HEADERS, ORDERS
from tests.emulator.cases import plan, reference
from tests.emulator.sanitize.running import run_apart
from tests.emulator.test_sanitizers import small

DETECTORS = ("numbers", "emulator", "tsan", "asan")
DTYPE = torch.float16


def patched(bug: Bug, folder: Path) -> Path:
    """csrc/cuda with the bug in it."""
    copy = folder / "cuda"
    shutil.copytree(HEADERS, copy)
    text = (copy / bug.file).read_text()
    assert text.count(bug.old) == 1, f"{bug.name}: {bug.file} has changed"
    (copy / bug.file).write_text(text.replace(bug.old, bug.new))
    return copy


def sees(detector: str, bug: Bug, headers: Path) -> bool:
    """Runs the op; `numbers` and the emulator's checks are one build, in three orders."""
    s, w, x = small(bug.op)
    x = x.to(DTYPE)
    build = detector if detector in ("tsan", "asan") else "plain"
    for order in ORDERS if build == "plain" else ("ascending",):
        p = plan(s, w, x, bug.arch, DTYPE, edge=0)
        outcome = run_apart(p.launches, build, order, headers=headers)
        if outcome.said == detector:
            return True
        if detector == "numbers" and outcome.said == "clean":
            try:
                assert_close(p.y, reference(s, w, x), budget(DTYPE))
            except AssertionError:
                return True
    return False


@pytest.mark.parametrize("bug", BUGS, ids=lambda b: b.name.replace(" ", "-"))
def test_is_seen(bug: Bug, tmp_path: Path):
    headers = patched(bug, tmp_path)
    seen = {detector: sees(detector, bug, headers) for detector in bug.seen_by}
    assert all(seen.values()), seen


@pytest.mark.parametrize("detector", DETECTORS)
@pytest.mark.parametrize(("op", "arch"), sorted({(b.op, b.arch) for b in BUGS}))
def test_shipped_kernels_have_none(op: str, arch: int, detector: str):
    shipped = Bug("none", op, arch, "", "", "", ())
    assert not sees(detector, shipped, HEADERS)
