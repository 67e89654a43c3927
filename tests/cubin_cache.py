"""What the tests of the cubin cache share: a compiler that counts, a folder's names, warnings."""

from __future__ import annotations

import contextlib
import random
import warnings
from pathlib import Path

CODE = random.Random(0).randbytes(468)


class Compiler:
    """Returns `code` and counts its calls."""

    def __init__(self, code: bytes = CODE) -> None:
        self.code, self.calls = code, 0

    def __call__(self) -> bytes:
        self.calls += 1
        return self.code


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@contextlib.contextmanager
def no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@contextlib.contextmanager
def one_warning(what: str):
    """Exactly one warning, which says `what`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield
    (warning,) = caught
    assert warning.category is RuntimeWarning and what in str(warning.message)
