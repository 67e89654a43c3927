"""Settings of every test process: one thread for BLAS, OpenMP and torch, any number for ours."""

from __future__ import annotations

import os
import shutil
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Teams of more ranks than this machine has processors: correctness must not depend on it.
os.environ.setdefault("EVIT_FAST_MAX_THREADS", "256")
# Committed tiles, whatever was tuned on this machine; and no test touches the user's own caches.
os.environ["EVIT_FAST_TUNED"] = "0"
os.environ["EVIT_FAST_CACHE"] = tempfile.mkdtemp(prefix="evit_fast_tests_")

import pytest
import torch

_CACHE = os.environ["EVIT_FAST_CACHE"]


def pytest_unconfigure(config: pytest.Config) -> None:
    shutil.rmtree(_CACHE, ignore_errors=True)


@pytest.fixture(autouse=True)
def settings():
    """Each test starts from the same seed, one torch thread, and grad mode on."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.enable_grad():
        yield
    torch.set_num_threads(1)
