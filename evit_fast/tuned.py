"""What `evit-fast tune` found on this machine: rows that replace committed ones.

    row("triton", "cga", 90, ("window", 2))    {"tiles": {...}, "num_warps": 8, ...} or None
    row("cuda", "cga", 90, "cga C=192 ..")     {"tiles": {}, "cuda_ns": 90, "triton_ns": 100}

A kernel file asks for the tiles of a shape class on an architecture, preferred.py for the times of
the two GPU columns; a row found here comes before the committed one. The file is tuned.json in
$EVIT_FAST_CACHE, else in the user's cache folder; it is read once a process. A row counts only for
the version of this package, of the column's compiler and of the source of the kernel that it was
measured with. EVIT_FAST_TUNED=0: committed rows only. Nothing here measures.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from evit_fast._version import __version__

FORMAT = 1
# What the rows of a column depend on.
_TRITON = ("kernels/{op}*.py", "kernels/dot.py", "kernels/relu.py")
SOURCES = {"triton": _TRITON, "cuda": (*_TRITON, "cuda/{op}.py", "cuda/kernels.py")}
# Column -> the packages whose versions decide speed. "cuda" compares it with triton.
COMPILERS = {"triton": ("triton",), "cuda": ("triton", "nvidia-cuda-nvrtc-cu12")}

Row = Mapping[str, Any]
Key = tuple[str, str, int, str]  # column, op, architecture, repr of the shape class


@dataclass
class Trial:
    """Rows that are tried out, by (op, shape class); `asked` fills with what plans look up."""

    rows: Mapping[tuple[str, Any], Row]
    asked: list[tuple[str, Any]] = field(default_factory=list)


_trial: Trial | None = None


def row(column: str, op: str, arch: int, shape_class: Any) -> Row | None:
    """The tuned row, None where there is none: use the committed one."""
    if _trial is not None:
        _trial.asked.append((op, shape_class))
        return _trial.rows.get((op, shape_class))
    found = _found()
    return found.get((column, op, arch, repr(shape_class))) if found else None


@contextmanager
def trial(rows: Mapping[tuple[str, Any], Row]) -> Iterator[Trial]:
    """Inside, `rows` are the only tuned rows there are: for measuring, in a process of its own."""
    global _trial
    _trial = Trial(rows)
    try:
        yield _trial
    finally:
        _trial = None


def remember(rows: Mapping[tuple[str, str, int, Any], Row | None]) -> Path:
    """Writes (column, op, arch, shape class) -> row to the file, and returns its path; None removes
    a row. The file appears whole or not at all. OSError: it cannot be written.
    """
    target = path()
    entries = _read(target)
    for (*place, shape_class), value in rows.items():
        name = _name((*place, repr(shape_class)))
        entries.pop(name, None)
        if value is not None:
            entries[name] = dict(value)
    target.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    text = json.dumps({"format": FORMAT, "rows": entries}, indent=1, sort_keys=True)
    descriptor, temporary = tempfile.mkstemp(dir=target.parent, prefix="tuned-", suffix=".tmp")
    try:
        with open(descriptor, "w") as f:
            f.write(text + "\n")
        os.replace(temporary, target)
    except BaseException:
        os.unlink(temporary)
        raise
    _found.cache_clear()
    return target


def path() -> Path:
    """The file, there or not."""
    if chosen := os.environ.get("EVIT_FAST_CACHE"):
        return Path(chosen).expanduser() / "tuned.json"
    import platformdirs

    return platformdirs.user_cache_path("evit_fast", appauthor=False) / "tuned.json"


@cache
def _found() -> dict[Key, Row]:
    """The rows of the file that count here."""
    found = {}
    if os.environ.get("EVIT_FAST_TUNED") == "0":
        return found
    for name, value in _read(path()).items():
        column, op, arch, shape_class, _ = name.split("|")
        key = (column, op, int(arch), shape_class)
        if _name(key) == name:
            found[key] = value
    return found


def _read(file: Path) -> dict[str, Row]:
    try:
        content = json.loads(file.read_text())
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']}, not {FORMAT}")
        for name, value in content["rows"].items():
            column, _, arch, _, _ = name.split("|")
            numbers = [*value.values(), *value["tiles"].values()]
            known = column in SOURCES and arch.isdigit()
            if not known or {type(n) for n in numbers if n is not value["tiles"]} != {int}:
                raise ValueError(f"no row: {name}")
        return content["rows"]
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        warnings.warn(
            f"{file} cannot be used ({' '.join(str(e).split())[:80]}); kernels run with the "
            "committed tiles: remove it, or run evit-fast tune",
            RuntimeWarning,
            stacklevel=2,
        )
        return {}


def _name(key: Key) -> str:
    """A row in the file: its key, and all that it was measured with."""
    column, op, arch, shape_class = key
    return "|".join([column, op, str(arch), shape_class, _measured_with(column, op)])


@cache
def _measured_with(column: str, op: str) -> str:
    root = Path(__file__).parent
    digest = hashlib.sha256()
    for pattern in SOURCES[column]:
        # Installed, kernels/ lies inside the package; in a checkout beside it.
        found = [f for place in (root, root.parent) for f in place.glob(pattern.format(op=op))]
        for source in sorted(found):
            digest.update(source.read_bytes())
    if column == "cuda":
        from evit_fast.cuda.sources import headers

        for text in headers(f'#include "{op}.cuh"\n').values():
            digest.update(text.encode())
    compilers = " ".join(f"{name} {_version(name)}" for name in COMPILERS[column])
    return f"evit_fast {__version__} {compilers} {digest.hexdigest()[:12]}"


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "none"
