"""interpret/ and compile/ need two processes: Triton reads TRITON_INTERPRET once, at import.

`pytest tests` collects neither; `make test` and `make test-triton` run each in its own process.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

HERE = Path(__file__).parent
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
WANTED = {
    HERE / "interpret": INTERPRETED,
    HERE / "compile": not INTERPRETED and os.environ.get("EVIT_FAST_COMPILE_TESTS") == "1",
}
HOW = {
    HERE / "interpret": "tests/kernels/interpret runs in Triton's interpreter: set "
    "TRITON_INTERPRET=1, or run make test-triton",
    HERE / "compile": "tests/kernels/compile compiles: set EVIT_FAST_COMPILE_TESTS=1 and leave "
    "TRITON_INTERPRET unset, or run make test-triton",
}


def pytest_configure(config: pytest.Config) -> None:
    for argument in config.args:
        path = (config.invocation_params.dir / argument.split("::")[0]).resolve()
        for folder, wanted in WANTED.items():
            if not wanted and path.is_relative_to(folder):
                raise pytest.UsageError(HOW[folder])


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    return True if not WANTED.get(collection_path, True) else None
