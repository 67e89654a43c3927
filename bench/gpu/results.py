"""What a run leaves: records in a JSON file and a CSV, written after every step, and a summary.

A record knows the run it is from (card, versions, commit, a hash of the sources); a later run with
the same of these goes on where the earlier one stopped. A dry run writes `gpu-dry-run.*` and marks
every record.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import evit_fast
from evit_fast import kernels

WARNING = "DRY RUN on a CPU: no number here says anything about a GPU"


@dataclass
class Record:
    """One check or one time. Empty text: does not apply; `note` says why there is no result.

    item: a model or an op; case: M5.2 and the like; check: what was compared or timed. error and
    bound: relative L2. us: median over the rounds, with p20 and p80. share: of `nearer`, the
    ceiling that the op meets first. ratio: this one's time over fused's, the median of ratios of
    the same round.
    """

    part: str
    item: str
    check: str
    case: str = ""
    shape: str = ""
    dtype: str = ""
    column: str = ""
    passed: bool | str = ""
    error: float | str = ""
    bound: float | str = ""
    us: float | str = ""
    us_p20: float | str = ""
    us_p80: float | str = ""
    images_per_s: float | str = ""
    gflops: float | str = ""
    gbs: float | str = ""
    share: float | str = ""
    nearer: str = ""
    ratio: float | str = ""
    ratio_p20: float | str = ""
    ratio_p80: float | str = ""
    note: str = ""
    step: str = ""
    dry_run: bool = True
    run: int = 0

    @property
    def key(self) -> tuple[str, ...]:
        return self.part, self.item, self.check, self.case, self.shape, self.dtype, self.column


def source_hash() -> str:
    """12 digits that change with the sources whose results these are."""
    folders = [Path(package.__file__).parent for package in (evit_fast, kernels)]
    digest = hashlib.sha256()
    for path in sorted(path for folder in folders for path in folder.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


class Store:
    """The records of one card's file, and those of the present run among them."""

    def __init__(self, folder: Path, name: str, stamp: dict[str, Any], dry_run: bool) -> None:
        self.path = folder / f"gpu-{'dry-run' if dry_run else name}.json"
        self.dry_run = dry_run
        self.runs: list[dict[str, Any]] = []
        self.records: dict[tuple[str, ...], Record] = {}
        if self.path.exists():
            saved = json.loads(self.path.read_text())
            self.runs = saved["runs"]
            found = (Record(**record) for record in saved["records"])
            self.records = {record.key: record for record in found}
        if stamp not in self.runs:
            self.runs.append(stamp)
        self.run = self.runs.index(stamp)

    def done(self, step: str) -> bool:
        """The present sources have passed this step on this card."""
        found = [r for r in self.present() if r.step == step]
        return bool(found) and all(record.passed is not False for record in found)

    def present(self) -> list[Record]:
        """Records of the present run."""
        return [record for record in self.records.values() if record.run == self.run]

    def add(self, step: str, records: Iterable[Record]) -> list[Record]:
        """Keeps and writes what a step found, in the place of what it found before; returns it."""
        found = list(records)
        self.records = {key: r for key, r in self.records.items() if r.step != step}
        for record in found:
            record.step, record.run, record.dry_run = step, self.run, self.dry_run
            self.records[record.key] = record
        self._write()
        return found

    def _write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        rows = [asdict(record) for record in self.records.values()]
        content = {"dry_run": self.dry_run, "runs": self.runs, "records": rows}
        if self.dry_run:
            content = {"warning": WARNING, **content}
        part = self.path.with_suffix(".part")  # a killed run leaves the last whole file
        part.write_text(json.dumps(content, indent=1) + "\n")
        os.replace(part, self.path)
        with open(self.path.with_suffix(".csv"), "w", newline="") as file:
            names = [field.name for field in fields(Record)]
            writer = csv.DictWriter(file, names, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
