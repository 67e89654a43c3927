"""The committed tables of what a compiler made of every kernel: a line per kernel, a cell per card.

    # triton 3.7.1; per card: registers/shared_bytes/mma
    op,kernel,shape,...,sm_80,sm_86
    cga,cga_window_kernel,C=64 ...,128/4096/9,120/4096/9

In memory a row is one cell: its key is the line's fields with the architecture among them.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

Rows = dict[tuple[str, ...], tuple[str, ...]]


def read(path: Path, key: Sequence[str]) -> tuple[str, Rows]:
    """(version of the compiler, {row key: values}); ("", {}) where there is no table.

    key: names of the key's fields, "arch" among them.
    """
    if not path.exists():
        return "", {}
    at, width = key.index("arch"), len(key) - 1
    with open(path, newline="") as f:
        version = re.match(r"# \w+ ([^\s;]+)", f.readline())[1]
        header, *lines = csv.reader(f)
    rows = {}
    for line in lines:
        fields, cells = line[:width], line[width:]
        for name, cell in zip(header[width:], cells, strict=True):
            if cell:
                arch = name.removeprefix("sm_")
                rows[(*fields[:at], arch, *fields[at:])] = tuple(cell.split("/"))
    return version, rows


def write(
    path: Path,
    key: Sequence[str],
    values: Sequence[str],
    compiler: str,
    rows: Mapping[tuple[str, ...], tuple[str, ...]],
) -> None:
    """compiler: name and version, "triton 3.7.1"; values: names of a cell's numbers."""
    at = key.index("arch")
    lines: dict[tuple[str, ...], dict[str, str]] = {}
    for row, cell in rows.items():
        lines.setdefault(row[:at] + row[at + 1 :], {})[f"sm_{row[at]}"] = "/".join(cell)
    cards = sorted({name for line in lines.values() for name in line}, key=order)
    with open(path, "w", newline="") as f:
        f.write(f"# {compiler}; per card: {'/'.join(values)}\n")
        out = csv.writer(f, lineterminator="\n")
        out.writerow([*key[:at], *key[at + 1 :], *cards])
        for line in sorted(lines, key=lambda line: tuple(map(order, line))):
            out.writerow([*line, *(lines[line].get(card, "") for card in cards)])


def order(text: str) -> list:
    """Numbers in text in the order of their values: C=64 before C=128, sm_86 before sm_100."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", text)]
